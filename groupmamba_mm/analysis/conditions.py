"""Hardware and software of a measurement, printed above its results."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import groupmamba_mm

#: Distributions that can change a figure, in the order of the list.
PACKAGES = (
    'torch',
    'triton',
    'timm',
    'mamba-ssm',
    'causal-conv1d',
    'onedl-mmengine',
    'onedl-mmpretrain',
    'onedl-mmdetection',
    'onedl-mmsegmentation',
)

#: Beginnings of environment variables that can change a figure.
VARIABLES = (
    'GROUPMAMBA_',
    'TRITON_',
    'TORCH',
    'PYTORCH_',
    'OMP_NUM_THREADS',
    'PYTHONDONTWRITEBYTECODE',  # each start compiles all of Python's sources again
)


def describe_environment(device: torch.device) -> dict[str, str]:
    """Describe the hardware and software of a measurement.

    Args:
        device: The device that is measured, which must be there.

    Returns:
        Date, device, versions and environment variables, by headings.
    """
    found = {'date': datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')}
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        found['GPU'] = (
            f'{properties.name}, {properties.total_memory / 1e9:.0f} GB, compute '
            f'capability {properties.major}.{properties.minor}'
        )
        found['CUDA'] = (
            f'{torch.version.cuda}, driver {driver_version()}, cuDNN '
            f'{torch.backends.cudnn.version()}'
        )
    found['CPU'] = (
        f'{cpu_name()}, {os.cpu_count()} logical cores, load average '
        f'{os.getloadavg()[0]:.2f}, {torch.get_num_threads()} thread(s) used'
    )
    found['versions'] = f'Python {platform.python_version()}, ' + ', '.join(
        f'{name} {package_version(name)}' for name in PACKAGES
    )
    found['groupmamba-mm'] = (
        f'{groupmamba_mm.__version__}, {commit() or "no commit known (not run in a checkout)"}'
    )
    # a path says nothing about speed, but something about its owner
    variables = [
        f'{name}={value}'
        for name, value in sorted(os.environ.items())
        if name.startswith(VARIABLES) and os.sep not in value
    ]
    found['environment'] = ' '.join(variables) or 'nothing set'
    return found


def package_version(name: str) -> str:
    """The version of a distribution, or 'not installed'."""
    try:
        return version(name)
    except PackageNotFoundError:
        return 'not installed'


def cpu_name() -> str:
    """The processor's name, by Linux's /proc/cpuinfo, elsewhere by Python."""
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def driver_version() -> str:
    """The GPU driver's version, or 'unknown'."""
    answer = _ask('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')
    return answer.splitlines()[0] if answer else 'unknown'


def commit() -> str | None:
    """The commit of the checkout that this package is run from, None if there is none."""
    here = Path(groupmamba_mm.__file__).parent
    # site-packages can lie in another project's checkout, which does not track this file
    if _ask('git', '-C', str(here), 'ls-files', '--error-unmatch', '__init__.py') is None:
        return None
    sha = _ask('git', '-C', str(here), 'rev-parse', '--short=12', 'HEAD')
    if sha is None:
        return None
    changed = _ask('git', '-C', str(here), 'status', '--porcelain', '--untracked-files=no')
    return f'commit {sha}{" with changes" if changed else ""}'


def _ask(*command: str) -> str | None:
    """The output of a program, None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None
