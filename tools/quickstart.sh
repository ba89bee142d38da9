#!/usr/bin/env bash
# Usage: bash tools/quickstart.sh [--task cls|det|seg|all] [--family paper|official|both]
#
# From nothing to a picture: installs what the task needs (tools/install.sh), makes the demo data, trains and tests a
# tiny model, and draws its predictions. Everything it makes is in data/demo and work_dirs/quickstart.
#
#   --task     what to train: cls, image classification (the default); det, detection and instance segmentation;
#              seg, semantic segmentation; or all, one after the other. det and seg start from the weights of cls if
#              those are there, else from scratch
#   --family   of cls: the model as the paper describes it (the default), as the official code was released, or both
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

case $task in
    cls | det | seg) tasks=("$task") ;;
    all) tasks=(cls det seg) ;;
    *) fail "unknown task '$task'; accepted are cls, det, seg and all" ;;
esac
case $family in
    paper) models=(groupmamba-pico) ;;
    official) models=(groupmamba-official-pico) ;;
    both) models=(groupmamba-pico groupmamba-official-pico) ;;
    *) fail "unknown family '$family'; accepted are paper, official and both" ;;
esac

times=()
epochs=4  # of cls, two less than its config has, so that there is a picture after minutes

# timed TITLE COMMAND...: run the command in sight, and keep how long it took for the summary.
timed() {
    local title=$1 start=$SECONDS
    shift
    printf '\n== %s: %s\n' "$title" "$*"
    "$@"
    times+=("$(printf '%5d s  %s' $((SECONDS - start)) "$title")")
}

# One function per task: train, test and draw.
run_cls() {
    local model config out
    for model in "${models[@]}"; do
        config=configs/demo/${model}_demo-cls.py out=work_dirs/quickstart/${model}_demo-cls
        timed "$model: train" python tools/train.py "$config" --work-dir "$out" \
            --cfg-options train_cfg.max_epochs=$epochs param_scheduler.1.end=$epochs
        timed "$model: test" python tools/test.py "$config" "$(<"$out/last_checkpoint")" \
            --work-dir "$out" --show-dir "$out/show" --out "$out/results.pkl"
        timed "$model: draw" python tools/analysis_tools/prediction_grid.py "$config" \
            "$out/results.pkl" --out "$out/predictions.png"
        made+=("$out/predictions.png" "$out/results.pkl" "$(<"$out/last_checkpoint")" "$out/show/")
    done
}

run_det() { run_dense mask-rcnn_groupmamba-pico_demo-det results.pkl; }
run_seg() { run_dense groupmamba-pico_upernet_demo-seg labels; }

# run_dense NAME RESULTS: train, test and draw the config of this name.
run_dense() {
    local config=configs/demo/$1.py out=work_dirs/quickstart/$1 options=() classifier
    classifier=work_dirs/quickstart/groupmamba-pico_demo-cls/last_checkpoint
    if [[ -f $classifier && -f $(<"$classifier") ]]; then
        options=(--cfg-options model.backbone.init_cfg._delete_=True
            model.backbone.init_cfg.type=Pretrained
            "model.backbone.init_cfg.checkpoint=$(<"$classifier")"
            model.backbone.init_cfg.prefix=backbone.)
    fi
    timed "$1: train" python tools/train.py "$config" --work-dir "$out" "${options[@]}"
    timed "$1: test" python tools/test.py "$config" "$(<"$out/last_checkpoint")" \
        --work-dir "$out" --show-dir "$out/show" --out "$out/$2"
    timed "$1: draw" python tools/analysis_tools/gallery.py "$config" "$out/$2" \
        --out "$out/gallery.png"
    made+=("$out/gallery.png" "$out/$2" "$(<"$out/last_checkpoint")" "$out/show/")
}

made=(data/demo/)

for task in "${tasks[@]}"; do
    needs=()
    [[ $task != cls ]] || needs=(--classification)
    timed "$task: install" bash tools/install.sh "${needs[@]}"
    activate
    timed "$task: demo data" python tools/dataset_converters/make_demo_data.py data/demo \
        --task "$task"
    "run_$task"
done

printf '\nTime\n'
printf '  %s\n' "${times[@]}" "$(printf '%5d s  in all' "$SECONDS")"
printf '\nMade\n'
printf '  %s\n' "${made[@]}"
