#!/usr/bin/env bash
# Set up the environment (tools/install.sh --tests) and run the tests but the slow ones. Arguments go to pytest:
#   bash tools/run_tests.sh tests/test_ops -k scan
#   bash tools/run_tests.sh -m slow     the slow ones; .ci/run runs both
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$root"

case ${1:-} in
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' tools/run_tests.sh; exit ;;
esac

report_time() {
    echo "Set-up and tests took $SECONDS s"
}
trap report_time EXIT

bash tools/install.sh --tests
activate
# yapf writes a cache at its first import; processes that do so at once read halves of it.
python -c "import yapf"
# Two processes at once; -n in the arguments comes later and counts.
# Without paths: all of tests/ (pytest.ini).
python -m pytest -n 2 --durations=10 -m "not slow" "$@"
