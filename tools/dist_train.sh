#!/usr/bin/env bash
# Train with several processes on one machine, or on each of several machines.
#
#   tools/dist_train.sh CONFIG NPROC [arguments of train.py]
#
# NPROC processes a machine, one for each GPU; on a machine without a GPU they run on the CPU.
# For several machines set NNODES, MASTER_ADDR and PORT alike on each, and NODE_RANK to its number.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "error: usage: $0 CONFIG NPROC [arguments of train.py]" >&2
    exit 2
fi
config=$1
nproc=$2
shift 2

tools=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$nproc" \
    "$tools/train.py" "$config" --launcher pytorch "$@"
