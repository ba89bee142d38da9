# Sourced by dist_*.sh and slurm_*.sh: start a Python command in several processes.
#   tools                                       this folder
#   launch_torchrun NPROC SCRIPT ARGUMENTS...   NPROC processes on this machine, see dist_train.sh
#   launch_slurm PARTITION JOB SCRIPT ARGUMENTS...   GPUS processes in a Slurm job, see slurm_train.sh

# slurm_train.sh sets what a requeued training gets as arguments.
resume_argument=()

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-${OMP_NUM_THREADS:-1}}

# require_arguments LEAST USAGE ARGUMENTS...: end with the usage if there are too few.
require_arguments() {
    local least=$1 usage=$2
    shift 2
    if (($# < least)); then
        echo "error: usage: $0 $usage" >&2
        exit 2
    fi
}

# run_and_pass_signals COMMAND...: run it, pass signals on, and end with its exit code, or with that of
# a training that a signal ended with its state saved.
exit_stopped=75
run_and_pass_signals() {
    local child code=0 stopped=''
    "$@" &
    child=$!
    trap 'stopped=TERM; kill -TERM "$child"' TERM
    trap 'stopped=INT' INT  # a terminal sends it to the command too
    trap 'stopped=USR1; kill -USR1 "$child"' USR1
    # a signal ends the first wait early
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    trap - TERM INT USR1
    # srun has a code of its own for a signal, whatever its processes made of it
    if [[ -n $stopped && $code -ne 0 ]]; then
        code=$exit_stopped
    fi
    return "$code"
}

launch_torchrun() {
    local nproc=$1 nodes=${NNODES:-1} address=${MASTER_ADDR:-127.0.0.1} port=${PORT:-29500}
    local restarts=0 arguments=() rendezvous
    shift
    while (($#)); do
        case $1 in
        --max-restarts) restarts=${2:?--max-restarts needs a number}; shift 2 ;;
        --max-restarts=*) restarts=${1#*=}; shift ;;
        *) arguments+=("$1"); shift ;;
        esac
    done
    if [[ ! $restarts =~ ^[0-9]+$ ]]; then
        echo "error: --max-restarts $restarts is no number" >&2
        exit 2
    fi
    if ((restarts > 0)) || [[ $nodes == *:* ]]; then
        # torchrun's static rendezvous keeps the addresses of processes that are gone
        rendezvous=(--rdzv_backend=c10d --rdzv_endpoint="$address:$port"
                    --rdzv_id="${RUN_ID:-groupmamba}")
        if [[ $nodes == 1 ]]; then
            rendezvous+=(--local_addr="$address")
        fi
    else
        rendezvous=(--node_rank="${NODE_RANK:-0}" --master_addr="$address" --master_port="$port")
    fi
    run_and_pass_signals python "$tools/_torchrun.py" \
        --nnodes="$nodes" \
        "${rendezvous[@]}" \
        --max_restarts="$restarts" \
        --signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
        --nproc_per_node="$nproc" \
        "${arguments[@]}" --launcher pytorch
}

launch_slurm() {
    local partition=$1 job=$2 gpus_per_node=${GPUS_PER_NODE:-8} resources=() resume=()
    shift 2
    export MASTER_PORT=${MASTER_PORT:-${PORT:-29500}}
    if ((gpus_per_node > 0)); then
        resources=(--gres="gpu:$gpus_per_node" --ntasks-per-node="$gpus_per_node")
    fi
    # a job that Slurm has requeued
    if ((${SLURM_RESTART_COUNT:-0} > 0)); then
        resume=("${resume_argument[@]}")
    fi
    local code=0
    # SRUN_ARGS is meant to be split into words.
    # shellcheck disable=SC2086
    run_and_pass_signals srun -p "$partition" \
        --job-name="$job" \
        "${resources[@]}" \
        --ntasks="${GPUS:-8}" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 \
        ${SRUN_ARGS:-} \
        python -u "$@" --launcher slurm "${resume[@]}" || code=$?
    if ((code == exit_stopped)) && [[ -n ${SLURM_JOB_ID:-} && ${REQUEUE:-1} == 1 ]]; then
        echo "The training was stopped with its state saved: requeueing job $SLURM_JOB_ID" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
