#!/usr/bin/env bash
# Train in a Slurm job, one process for each GPU.
#
#   tools/slurm_train.sh PARTITION JOB CONFIG WORK_DIR [arguments of train.py]
#
# GPUS processes in all (default 8), GPUS_PER_NODE on each machine (default 8), CPUS_PER_TASK for
# each (default 5), the port in PORT (default 29500), more options for srun in SRUN_ARGS.
# In a batch job with "#SBATCH --requeue --signal=USR1@120", a signal saves the training and requeues
# the job, which then resumes; REQUEUE=0 leaves the requeueing away.
# GPUS_PER_NODE=0 asks for no GPU at all: the GPUS processes then run on CPUs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
require_arguments 4 'PARTITION JOB CONFIG WORK_DIR [arguments of train.py]' "$@"
resume_argument=(--resume)
launch_slurm "$1" "$2" "$tools/train.py" "$3" --work-dir "$4" "${@:5}"
