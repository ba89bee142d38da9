#!/usr/bin/env bash
# Train with several processes on one machine, or on each of several machines.
#
#   tools/dist_train.sh CONFIG NPROC [--max-restarts N] [arguments of train.py]
#
# NPROC processes a machine, one for each GPU; on a machine without a GPU they run on the CPU.
# For several machines set NNODES, MASTER_ADDR and PORT alike on each, and NODE_RANK to its number.
# --max-restarts N: when a process dies, all of them start again and resume, up to N times; with
# NNODES=MIN:MAX also on fewer machines. A signal (TERM, INT, USR1) saves and ends with code 75.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
require_arguments 2 'CONFIG NPROC [--max-restarts N] [arguments of train.py]' "$@"
launch_torchrun "$2" "$tools/train.py" "$1" "${@:3}"
