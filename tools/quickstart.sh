#!/usr/bin/env bash
# Usage: bash tools/quickstart.sh [--task cls] [--family paper|official|both]
#
# From nothing to a picture: installs (tools/install.sh), makes the demo data, trains and tests a tiny model, and draws
# its predictions. Everything it makes is in data/demo and work_dirs/quickstart.
#
#   --task     what to train: cls, image classification (the default)
#   --family   the model as the paper describes it (the default), as the official code was released, or both
#   --help     show this text

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$root"

fail() {
    echo "quickstart.sh: $*" >&2
    exit 1
}

task=cls
family=paper
while (($#)); do
    case $1 in
        --task | --family) declare "${1#--}=${2:?"$1 needs a value"}"; shift 2 ;;
        --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' tools/quickstart.sh; exit ;;
        *) fail "unknown argument '$1'; accepted are --task, --family and --help" ;;
    esac
done

case $family in
    paper) models=(groupmamba-pico) ;;
    official) models=(groupmamba-official-pico) ;;
    both) models=(groupmamba-pico groupmamba-official-pico) ;;
    *) fail "unknown family '$family'; accepted are paper, official and both" ;;
esac

times=()

# timed TITLE COMMAND...: run the command in sight, and keep how long it took for the summary.
timed() {
    local title=$1 start=$SECONDS
    shift
    printf '\n== %s: %s\n' "$title" "$*"
    "$@"
    times+=("$(printf '%5d s  %s' $((SECONDS - start)) "$title")")
}

# One function per task: train, test and draw the model named by its config.
run_cls() {
    local config=configs/demo/$1_demo-cls.py out=work_dirs/quickstart/$1_demo-cls
    timed "$1: train" python tools/train.py "$config" --work-dir "$out"
    timed "$1: test" python tools/test.py "$config" "$(<"$out/last_checkpoint")" \
        --work-dir "$out" --show-dir "$out/show" --out "$out/results.pkl"
    timed "$1: draw" python tools/analysis_tools/prediction_grid.py "$config" "$out/results.pkl" \
        --out "$out/predictions.png"
    made+=("$out/predictions.png" "$out/results.pkl" "$(<"$out/last_checkpoint")" "$out/show/")
}

[[ $task == cls ]] || fail "unknown task '$task'; accepted is cls"
made=(data/demo/)

timed "install" bash tools/install.sh
activate
timed "demo data" python tools/dataset_converters/make_demo_data.py data/demo
for model in "${models[@]}"; do
    "run_$task" "$model"
done

printf '\nTime\n'
printf '  %s\n' "${times[@]}" "$(printf '%5d s  in all' "$SECONDS")"
printf '\nMade\n'
printf '  %s\n' "${made[@]}"
