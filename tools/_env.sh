# Sourced by the scripts here: where the checkout is, and which Python environment they use.
#   root      the checkout
#   env_dir   the active virtual or conda environment, else .venv in the checkout (install.sh makes it)
#   activate  put that environment first on PATH

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ -n ${VIRTUAL_ENV:-} ]]; then
    env_dir=$VIRTUAL_ENV
elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base ]]; then  # conda's base is no place for a project
    env_dir=$CONDA_PREFIX
else
    env_dir=$root/.venv
fi

activate() {
    PATH=$env_dir/bin:$PATH
    hash -r
}
