#!/usr/bin/env bash
# Test in a Slurm job, one process for each GPU.
#
#   tools/slurm_test.sh PARTITION JOB CONFIG CHECKPOINT [arguments of test.py]
#
# The variables are those of slurm_train.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
require_arguments 4 'PARTITION JOB CONFIG CHECKPOINT [arguments of test.py]' "$@"
launch_slurm "$1" "$2" "$tools/test.py" "$3" "$4" "${@:5}"
