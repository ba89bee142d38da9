#!/usr/bin/env bash
# Usage: bash tools/install.sh [--classification | --tests]
#
# Installs the tested versions (requirements/tested.txt) and this checkout (editable) into the active virtual or conda
# environment, else into .venv in the checkout. mmcv's operators, which detection and segmentation need, are compiled
# once per torch and Python version and kept as a wheel. A second run takes seconds; after a failure a rerun goes on
# where it stopped. What was installed for more tasks before stays.
#
#   --classification   only what classification needs: no mmdet, no mmseg, nothing to compile
#   --tests            also install what the tests, the linter and the documentation need
#   --help             show this text
#
# Environment variables:
#   PYTHON             what makes .venv: a Python 3.11 or 3.12 (default: the first of python3, python3.11, python3.12)
#   GROUPMAMBA_CACHE   where the mmcv wheels and the log are kept (default: ~/.cache/groupmamba_mm)
#   MAX_JOBS           compilers to run at once (default: the number of cores)

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$root"

cache=${GROUPMAMBA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/groupmamba_mm}
log=$cache/install.log
pins=$root/requirements/tested.txt
mmcv_version=$(sed -n 's/^onedl-mmcv==//p' "$pins")
python=$env_dir/bin/python
stamp=$env_dir/groupmamba_mm.installed  # of a finished install: its key, and the requirements that went in
wanted=(runtime mminstall demo hub)  # then dense, then the files of --tests: each a beginning of the next
level=dense
child=  # the running step

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

for arg in "$@"; do
    case $arg in
        --classification) level=classification ;;
        --tests) level=tests ;;
        --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' tools/install.sh; exit ;;
        *) fail "unknown argument '$arg'; accepted are --classification, --tests and --help" ;;
    esac
done

# All that is called below. macOS has some of it in Homebrew only.
require_programs() {
    local program missing=()
    for program in flock setsid sha256sum nproc mktemp sed grep sort paste head tail cut tr; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [[ ${#missing[@]} == 0 ]] || fail "these programs are missing: ${missing[*]}. Install them (Debian, Ubuntu:" \
        "apt-get install util-linux coreutils; macOS: brew install flock util-linux coreutils, and put their folders" \
        "on PATH as brew says)"
}

cleanup() {
    [[ -z $child ]] || kill -TERM -- "-$child" 2>/dev/null || true  # the step and all it started
    wait
    rm -rf "$cache"/partial.*  # ours alone: made under the lock
}

# step TITLE COMMAND...: run the command into the log; show that it lives, how long it took, and on failure why.
step() {
    local title=$1 start=$SECONDS beat=$SECONDS progress
    shift
    echo "- $title"
    printf '\n=== %s: %s\n' "$title" "$*" >>"$log"
    setsid "$@" >>"$log" 2>&1 </dev/null &  # a group of its own, so that an interruption ends all of it
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - beat >= 30)); then
            beat=$SECONDS
            progress=$(tail -n 50 "$log" | grep -oE '^ *\[[0-9]+/[0-9]+\]' | tail -n 1 || true)  # ninja's count
            echo "  ... $((beat - start)) s$progress"
        fi
    done
    if ! wait "$child"; then
        tail -n 25 "$log" >&2
        fail "'$title' failed after $((SECONDS - start)) s. Its last lines are above, all of it is in $log." \
            "Mend the cause and run this script again: it goes on from here."
    fi
    child=
    echo "  done in $((SECONDS - start)) s"
}

python_fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.11 python3.12}; do
        python_fits "$candidate" && command -v "$candidate" && return
    done
    candidate=${PYTHON:-python3}
    fail "the tested set is for Python 3.11 and 3.12, and $candidate is $("$candidate" --version 2>&1 || true):" \
        "install one of these and name it, PYTHON=/path/to/python3.11 bash tools/install.sh"
}

# What decides which operators of mmcv are built: the compute capabilities of the GPUs, and the release of nvcc.
# nvcc is looked for where torch's build will look.
gpus=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd ';' || true)
nvcc=$(PATH=${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin command -v nvcc || true)
nvcc_release=$([[ -z $nvcc ]] || "$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')

# All that an install depends on. A change of any of it makes the next run do the whole of it again.
install_key() {
    {
        cat requirements/*.txt pyproject.toml setup.py groupmamba_mm/version.py tools/install.sh tools/_*.py
        "$python" --version
        echo "$root|$gpus|$nvcc_release"
    } | sha256sum | cut -d ' ' -f 1
}

# What an earlier run installed for more tasks is kept, at the versions of today.
choose_requirements() {
    local installed
    installed=$([[ ! -x $python ]] || "$python" tools/_verify_install.py installed dense tests || true)
    [[ $level != classification || $installed != *dense* ]] || level=dense
    [[ $level != dense || $installed != *tests* ]] || level=tests
    case $level in
        dense) wanted+=(dense) ;;
        tests) wanted+=(dense tests export docs analysis) ;;
    esac
}

# Leaves none, cpu, or CUDA's version and the GPUs', in operators.
choose_operators() {
    local torch_cuda
    if [[ $level == classification ]]; then
        operators=none
        echo "  mmcv operators: none, classification does without"
        return
    fi
    torch_cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")')
    operators=cpu
    if [[ -z $gpus ]]; then
        echo "  mmcv operators: CPU only, as nvidia-smi shows no GPU"
    elif [[ -z $torch_cuda ]]; then
        echo "  mmcv operators: CPU only, as this torch is built without CUDA"
    elif [[ ${nvcc_release%%.*} != "${torch_cuda%%.*}" ]]; then
        echo "  mmcv operators: CPU only. There is a GPU, but nvcc is ${nvcc_release:-missing} and torch's CUDA is" \
            "$torch_cuda: install that CUDA toolkit (and set CUDA_HOME to it) and run this again to get CUDA operators"
    else
        operators=cu$torch_cuda-sm${gpus//;/-sm}
        operators=${operators//./}  # cu130-sm80-sm90
        echo "  mmcv operators: CUDA $torch_cuda for compute capability $gpus, with $nvcc"
    fi
}

# Leaves the path of the wheel in mmcv_wheel.
provide_mmcv_wheel() {
    local folder partial build
    folder=$cache/mmcv-$mmcv_version-none
    [[ $operators == none ]] || folder=$cache/mmcv-$mmcv_version-$("$python" -c '
import sys, torch
print("torch%s-%s-cp%d%d" % (torch.__version__, sys.argv[1], *sys.version_info[:2]))' "$operators")
    mmcv_wheel=$(compgen -G "$folder/*.whl" || true)
    if [[ -n $mmcv_wheel ]]; then
        if "$python" tools/_verify_install.py wheel "$mmcv_wheel" "$operators"; then
            echo "  built before: $mmcv_wheel"
            return
        fi
        echo "  removing $folder and building again"
        rm -rf "$folder"
    fi
    partial=$(mktemp -d "$cache/partial.XXXXXX")
    mkdir "$partial/tmp" "$partial/wheel"
    # Past pip's own cache, which does not know which torch a wheel was built for.
    build=("${pip[@]}" wheel -v --no-deps --no-cache-dir --wheel-dir "$partial/wheel")
    if [[ $operators == none ]]; then  # in an isolated environment, where its setup.py finds no torch
        step "mmcv without operators" env TMPDIR="$partial/tmp" PIP_BUILD_CONSTRAINT="$pins" "${build[@]}" \
            "onedl-mmcv==$mmcv_version"
    else
        compile_mmcv
    fi
    mmcv_wheel=$(compgen -G "$partial/wheel/*.whl")
    "$python" tools/_verify_install.py wheel "$mmcv_wheel" "$operators" ||
        fail "mmcv was not built whole; the reason is in $log"
    mv "$partial/wheel" "$folder"
    mmcv_wheel=$folder/$(basename "$mmcv_wheel")
}

# Builds into $partial/wheel.
compile_mmcv() {
    local source build_env compiler=${CXX:-c++} cflags
    command -v "$compiler" >/dev/null || fail "mmcv's operators need a C++ compiler, and '$compiler' is not there:" \
        "install one (Debian, Ubuntu: apt-get install build-essential) or set CXX"
    step "mmcv's source" "${pip[@]}" download --no-deps --no-binary onedl-mmcv --no-build-isolation \
        --dest "$partial/tmp" "onedl-mmcv==$mmcv_version"
    "$python" -m tarfile -e "$partial"/tmp/*.tar.gz "$partial/tmp"
    source=$(compgen -G "$partial/tmp/*/setup.py")
    source=${source%/setup.py}

    # mmcv's setup.py compiles for CUDA when torch sees a GPU or FORCE_CUDA is 1, so both answers have to be given.
    # CFLAGS replaces Python's own flags, the optimisation among them. -g0 leaves out the debug symbols.
    cflags="-O2 -DNDEBUG -g0 ${CFLAGS:-}"
    build_env=(TMPDIR="$partial/tmp" MAX_JOBS="${MAX_JOBS:-$(nproc)}")
    if [[ $operators == cpu ]]; then
        build_env+=(FORCE_CUDA=0 CUDA_VISIBLE_DEVICES=)
        # Most of the time goes into torch's headers, in each of 78 files. gcc reads them precompiled where it finds
        # a .gch that was made with the same options, and passes over any other; clang would end in an error.
        if [[ $("$compiler" --version) == *"Free Software Foundation"* ]]; then
            step "Precompiling torch's headers" "$python" tools/_precompile_headers.py "$source" "$compiler" "$cflags"
            cflags+=" -include pytorch_cpp_helper.hpp"
        fi
    else
        build_env+=(FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$gpus")
    fi
    step "Compiling mmcv's operators (once)" env "${build_env[@]}" CFLAGS="$cflags" "${build[@]}" \
        --no-build-isolation "$source"
}

leave_if_done() {
    [[ -f $stamp && $(<"$stamp") == "$(install_key) ${wanted[*]}"* ]] || return 0  # more may be installed than is wanted
    if "$python" tools/_verify_install.py quick "${wanted[@]}"; then
        echo "Installed before in $env_dir, nothing to do ($SECONDS s)"
        exit 0
    fi
    echo "The environment has changed since the last install: repairing it"
}

require_programs
choose_requirements
leave_if_done  # before anything is written: the cache may be read-only then
mkdir -p "$cache" 2>/dev/null && [[ -w $cache ]] || fail "the cache $cache cannot be written: name another folder," \
    "GROUPMAMBA_CACHE=/path/to/folder bash tools/install.sh"
exec 9>"$cache/install.lock"
if ! flock -n 9; then
    echo "Another install is running ($cache/install.lock is held); waiting for it"
    flock 9
fi
trap cleanup EXIT
trap 'exit 130' INT TERM
leave_if_done  # by the install that was waited for

: >"$log"
echo "Installing into $env_dir"
if [[ $env_dir == "$root/.venv" && ! -x $env_dir/bin/pip ]]; then  # pip comes last, so without it .venv is half made
    base_python=$(find_python)
    step "Making .venv with $base_python" "$base_python" -m venv --clear "$env_dir"
fi
python_fits "$python" || fail "the tested set is for Python 3.11 and 3.12, and $env_dir has" \
    "$("$python" --version 2>&1 || true): activate an environment with one of these, or none to get a .venv"
pip=("$python" -m pip --disable-pip-version-check --no-input)
rm -f "$stamp"  # from here on the environment is in motion
"$python" tools/_verify_install.py preflight

# Python compiles what it imports by itself; compiling all of torch ahead takes longer than it saves.
install=("${pip[@]}" install --no-compile)

"${pip[@]}" --version >/dev/null 2>&1 || step "Adding pip to the environment" "$python" -m ensurepip
step "Build tools" "${install[@]}" -c "$pins" pip setuptools wheel ninja packaging
step "torch and torchvision (4.7 GB the first time)" "${install[@]}" -c "$pins" torch torchvision numpy
choose_operators
if [[ $operators != none ]] || ! "$python" tools/_verify_install.py mmcv >>"$log" 2>&1; then  # else any build of it will do
    provide_mmcv_wheel
    # By force: the same version may be there, without operators or built for another torch.
    step "mmcv" "${install[@]}" --no-deps --no-index --force-reinstall "$mmcv_wheel"
fi
files=("${wanted[@]/%/.txt}")
step "OpenMMLab's libraries and the rest" "${install[@]}" --no-build-isolation -c "$pins" \
    "${files[@]/#/--requirement=requirements/}"
step "This project, editable" "${install[@]}" --no-build-isolation --no-deps -e .
step "Checking versions and imports" "$python" tools/_verify_install.py full "${wanted[@]}"
tail -n 1 "$log" | sed 's/^/  /'

echo "$(install_key) ${wanted[*]}" >"$stamp"
echo "Installed in $SECONDS s. To use it: source $env_dir/bin/activate"
