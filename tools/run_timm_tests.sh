#!/usr/bin/env bash
# Usage: bash tools/run_timm_tests.sh [--source FOLDER] [PART OF A MODEL'S NAME]
#
# Runs timm's own tests of models (tests/test_models.py of its source distribution) on the models that this package
# registers: forward and backward passes, configs and heads, features, FX graphs. torch.jit.script is left out: it is
# not supported here, and deprecated by PyTorch.
#
#   --source   an unpacked source distribution of the installed timm; without it, pip fetches one
#   --help     show this text

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$root"
activate

source=
name=groupmamba
while (($#)); do
    case $1 in
        --source) source=$(realpath "${2:?--source needs a folder}"); shift 2 ;;
        --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' tools/run_timm_tests.sh; exit ;;
        -*) echo "run_timm_tests.sh: unknown argument '$1'; accepted are --source, --help and a name" >&2; exit 1 ;;
        *) name=$1; shift ;;
    esac
done

if [[ -z $source ]]; then
    fetched=$(mktemp -d)
    trap 'rm -rf "$fetched"' EXIT
    version=$(python -c 'from importlib.metadata import version; print(version("timm"))')
    python -m pip --disable-pip-version-check download --quiet --no-deps --no-binary timm --dest "$fetched" "timm==$version"
    tar xzf "$fetched/timm-$version.tar.gz" -C "$fetched"
    source=$fetched/timm-$version
fi

cd "$source"  # for the settings of timm's tests
python -m pytest -p groupmamba_mm tests/test_models.py -k "groupmamba and $name and not torchscript"
