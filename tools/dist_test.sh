#!/usr/bin/env bash
# Test with several processes on one machine, or on each of several machines.
#
#   tools/dist_test.sh CONFIG CHECKPOINT NPROC [arguments of test.py]
#
# Processes and variables are those of dist_train.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
require_arguments 3 'CONFIG CHECKPOINT NPROC [arguments of test.py]' "$@"
launch_torchrun "$3" "$tools/test.py" "$1" "$2" "${@:4}"
