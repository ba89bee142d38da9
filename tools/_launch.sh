# Sourced by dist_*.sh and slurm_*.sh: start a Python command in several processes.
#   tools                                       this folder
#   launch_torchrun NPROC SCRIPT ARGUMENTS...   NPROC processes on this machine, see dist_train.sh
#   launch_slurm PARTITION JOB SCRIPT ARGUMENTS...   GPUS processes in a Slurm job, see slurm_train.sh

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# require_arguments LEAST USAGE ARGUMENTS...: end with the usage if there are too few.
require_arguments() {
    local least=$1 usage=$2
    shift 2
    if (($# < least)); then
        echo "error: usage: $0 $usage" >&2
        exit 2
    fi
}

launch_torchrun() {
    local nproc=$1
    shift
    python -m torch.distributed.run \
        --nnodes="${NNODES:-1}" \
        --node_rank="${NODE_RANK:-0}" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" \
        --master_port="${PORT:-29500}" \
        --nproc_per_node="$nproc" \
        "$@" --launcher pytorch
}

launch_slurm() {
    local partition=$1 job=$2 gpus_per_node=${GPUS_PER_NODE:-8} resources=()
    shift 2
    export MASTER_PORT=${MASTER_PORT:-${PORT:-29500}}
    if ((gpus_per_node > 0)); then
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
        python -u "$@" --launcher slurm
}
