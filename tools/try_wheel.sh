#!/usr/bin/env bash
# Usage: bash tools/try_wheel.sh [--mmcv WHEEL]
#
# Builds this package's wheel, installs it with the extras that the README names into an empty virtual environment, at
# the tested versions, and does there, in an empty folder outside the checkout, what a user does first: list configs,
# build, predict with each library's inferencer, export, load again. Before that, without an extra: the errors that
# name one. Needs about 8 GB below the folder for temporary files (TMPDIR), which are removed at the end.
#
#   --mmcv     a wheel of mmcv compiled for this Python and the tested torch, as tools/install.sh keeps one; without
#              it mmcv is compiled, 7 to 18 minutes on two cores
#   --help     show this text
#
# Environment variables:
#   PYTHON     what makes the environment (default: python3)

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pins=$root/requirements/tested.txt
extras=mm,demo,export,hub
mmcv=

while (($#)); do
    case $1 in
        --mmcv) mmcv=$(realpath "${2:?--mmcv needs a wheel}"); shift 2 ;;
        --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "$root/tools/try_wheel.sh"; exit ;;
        *) echo "try_wheel.sh: unknown argument '$1'; accepted are --mmcv and --help" >&2; exit 1 ;;
    esac
done

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
unset PYTHONPATH

step() {
    local title=$1 start=$SECONDS
    shift
    if ! "$@" >"$place/log" 2>&1; then
        tail -n 30 "$place/log" >&2
        echo "try_wheel.sh: '$title' failed; its last lines are above" >&2
        exit 1
    fi
    echo "- $title ($((SECONDS - start)) s)"
}

# Built from a copy, to leave no build folder behind.
mkdir "$place/source" "$place/empty"
cp -a "$root"/{pyproject.toml,setup.py,MANIFEST.in,README.md,LICENSE,model-index.yml,requirements,configs,groupmamba_mm} \
    "$place/source"
step "An empty environment" "${PYTHON:-python3}" -m venv "$place/venv"
python=$place/venv/bin/python
pip=("$python" -m pip --disable-pip-version-check --no-input)
step "This package's wheel" "${pip[@]}" wheel --no-deps --wheel-dir "$place/wheel" "$place/source"
wheel=$(compgen -G "$place/wheel/*.whl")
step "The wheel, without an extra" "${pip[@]}" install -c "$pins" "$wheel"

cd "$place/empty"
"$python" -I "$root/tools/_wheel_trial.py" bare
step "Build tools" "${pip[@]}" install -c "$pins" setuptools wheel ninja packaging
step "mmcv" "${pip[@]}" install -c "$pins" --no-build-isolation "${mmcv:-onedl-mmcv}"
step "The wheel with the extras $extras" "${pip[@]}" install -c "$pins" --no-build-isolation "$wheel[$extras]"
"$python" -I "$root/tools/_wheel_trial.py" full
echo "All of it works in an empty environment ($SECONDS s)"
