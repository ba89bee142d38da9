#!/usr/bin/env bash
# Test in a Slurm job, one process for each GPU.
#
#   tools/slurm_test.sh PARTITION JOB CONFIG CHECKPOINT [arguments of test.py]
#
# GPUS processes in all (default 8), GPUS_PER_NODE on each machine (default 8), CPUS_PER_TASK for
# each (default 5), the port in PORT (default 29500), more options for srun in SRUN_ARGS.
# GPUS_PER_NODE=0 asks for no GPU at all: the GPUS processes then run on CPUs.
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "error: usage: $0 PARTITION JOB CONFIG CHECKPOINT [arguments of test.py]" >&2
    exit 2
fi
partition=$1
job=$2
config=$3
checkpoint=$4
shift 4

tools=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MASTER_PORT=${MASTER_PORT:-${PORT:-29500}}

gpus_per_node=${GPUS_PER_NODE:-8}
resources=()
if [ "$gpus_per_node" -gt 0 ]; then
    resources=(--gres="gpu:$gpus_per_node" --ntasks-per-node="$gpus_per_node")
fi

# SRUN_ARGS is meant to be split into words.
# shellcheck disable=SC2086
srun -p "$partition" \
    --job-name="$job" \
    "${resources[@]}" \
    --ntasks="${GPUS:-8}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    python -u "$tools/test.py" "$config" "$checkpoint" --launcher slurm "$@"
