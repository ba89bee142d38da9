"""Check the environment: ``python -m groupmamba_mm.check_env``. Each problem comes with its remedy."""

import importlib
import importlib.util
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

#: The distributions whose requirements are compared with what is installed.
CHECKED = (
    'groupmamba-mm',
    'torch',
    'torchvision',
    'triton',
    'onedl-mmcv',
    'onedl-mmengine',
    'onedl-mmpretrain',
    'onedl-mmdetection',
    'onedl-mmsegmentation',
    'timm',
    'opencv-python',
)
# They install the same modules as another distribution: whichever came last wins, file by file.
_SAME_MODULES = {
    'onedl-mmcv': ('mmcv', 'mmcv-full', 'mmcv-lite'),
    'onedl-mmengine': ('mmengine', 'mmengine-lite'),
    'onedl-mmpretrain': ('mmpretrain',),
    'onedl-mmdetection': ('mmdet',),
    'onedl-mmsegmentation': ('mmsegmentation',),
}
_LIBRARIES = ('mmengine', 'mmpretrain.models', 'mmdet.models', 'mmseg.models', 'timm')

_GB = 1e9
# Below these, workers that hand over batches, or checkpoints and logs of a run, have ended in errors.
_LEAST_SHARED_MEMORY = 1 * _GB
_LEAST_DISK = 10 * _GB
_LEAST_DESCRIPTORS = 4096


class Finding(NamedTuple):
    """Something about the environment.

    Args:
        text: What it is.
        remedy: The command that fixes it, None if it is as it should be.
    """

    text: str
    remedy: str | None = None


def installed_versions() -> dict[str, str]:
    """List the installed distributions.

    Returns:
        Their versions by name, in lower case with hyphens.
    """
    return {
        _normalized(distribution.metadata['Name']): distribution.version
        for distribution in metadata.distributions()
        if distribution.metadata['Name']
    }


def _normalized(name: str) -> str:
    return re.sub(r'[-_.]+', '-', name).lower()


def check_versions(installed: dict[str, str]) -> Iterator[Finding]:
    """Compare what distributions need with what is installed.

    Args:
        installed: See :func:`installed_versions`.

    Yields:
        The findings.
    """
    yield Finding(f'Python {sys.version.split()[0]}')
    for name in CHECKED:
        if name not in installed:
            continue
        yield Finding(f'{name} {installed[name]}')
        for line in metadata.requires(name) or []:
            need = Requirement(line)
            if need.marker is not None and not need.marker.evaluate({'extra': ''}):
                continue
            found = installed.get(_normalized(need.name))
            wanted = f'{need.name}{need.specifier}'
            if found is None:
                yield Finding(
                    f'{name} needs {wanted}, which is not installed',
                    f"{sys.executable} -m pip install '{wanted}'",
                )
            elif not need.specifier.contains(found, prereleases=True):
                yield Finding(
                    f'{name} needs {wanted}, and {found} is installed',
                    f"{sys.executable} -m pip install '{wanted}'",
                )
    newest = int(installed.get('transformers', '0').split('.')[0])
    if 'onedl-mmpretrain' in installed and newest >= 5:
        yield Finding(
            f'transformers {installed["transformers"]}: from 5 on mmpretrain.models cannot '
            'be imported',
            f"{sys.executable} -m pip install 'transformers>=4.53,<5'",
        )


def check_doubles(installed: dict[str, str]) -> Iterator[Finding]:
    """Look for distributions that overwrite each other's files.

    Args:
        installed: See :func:`installed_versions`.

    Yields:
        The findings.
    """
    for name, others in _SAME_MODULES.items():
        for other in others:
            if name in installed and other in installed:
                yield Finding(
                    f'{other} {installed[other]} and {name} {installed[name]} write into the same '
                    'folder',
                    f'{sys.executable} -m pip uninstall -y {other} && {sys.executable} -m '
                    f'pip install --force-reinstall --no-deps {name}=={installed[name]}',
                )
    pair = [installed.get(name) for name in ('opencv-python', 'opencv-python-headless')]
    if None not in pair and pair[0] != pair[1]:
        yield Finding(
            f'opencv-python {pair[0]} and opencv-python-headless {pair[1]} write into the same folder',
            f'{sys.executable} -m pip install --force-reinstall --no-deps '
            f'opencv-python=={pair[0]} opencv-python-headless=={pair[0]}',
        )


def check_operators(installed: dict[str, str]) -> Iterator[Finding]:
    """Import the libraries and run their compiled operators.

    Args:
        installed: See :func:`installed_versions`.

    Yields:
        The findings.
    """
    import torch

    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9], [8.0, 8.0, 12.0, 12.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])

    def torchvision_nms() -> list[int]:
        return importlib.import_module('torchvision').ops.nms(boxes, scores, 0.5).tolist()

    def mmcv_nms() -> list[int]:
        return importlib.import_module('mmcv.ops').nms(boxes, scores, iou_threshold=0.5)[1].tolist()

    yield _try(
        'operators of torchvision',
        torchvision_nms,
        f'{sys.executable} -m pip install --force-reinstall torch=={torch.__version__} '
        'torchvision   # both from one index',
    )
    if _is_for_classification(installed):
        yield Finding(
            'mmcv has no operators, which classification does without; for detection and '
            'segmentation: bash tools/install.sh'
        )
    elif 'onedl-mmcv' in installed:
        yield _try(
            'operators of mmcv',
            mmcv_nms,
            'bash tools/install.sh   # compiles them for this torch; remove the mmcv-* '
            'folders of its cache first',
        )
    for name in _LIBRARIES:
        if importlib.util.find_spec(name.split('.')[0]) is not None:
            yield _try(
                f'import {name}',
                lambda name=name: importlib.import_module(name) and [0, 2],
                'bash tools/install.sh   # the tested versions, see requirements/tested.txt',
            )


def _is_for_classification(installed: dict[str, str]) -> bool:
    """Whether mmcv was installed without operators, and nothing is there that needs them."""
    dense = {'onedl-mmdetection', 'onedl-mmsegmentation'} & set(installed)
    return 'onedl-mmcv' in installed and not dense and importlib.util.find_spec('mmcv._ext') is None


def _try(what: str, call: Callable[[], list[int]], remedy: str) -> Finding:
    """Run something that a broken build of a library can fail in, in whatever way it does."""
    try:
        kept = call()
    except Exception as error:
        return Finding(f'{what}: {type(error).__name__}: {str(error).splitlines()[0]}', remedy)
    if kept != [0, 2]:
        return Finding(f'{what}: nms kept {kept} instead of [0, 2]', remedy)
    return Finding(f'{what}: ok')


def check_gpu(installed: dict[str, str]) -> Iterator[Finding]:
    """Describe the GPUs and the backends of the package's operators.

    Args:
        installed: See :func:`installed_versions`.

    Yields:
        The findings.
    """
    import torch

    from groupmamba_mm.ops import explain_backend

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(
                f'GPU {index}: {properties.name}, {properties.total_memory / _GB:.0f} GB, '
                f'sm_{properties.major}{properties.minor}'
            )
        if (
            'onedl-mmcv' in installed
            and importlib.util.find_spec('mmcv._ext') is not None
            and importlib.import_module('mmcv.ops').get_compiling_cuda_version() == 'not available'
        ):
            yield Finding(
                'mmcv has operators for the CPU only: no detector runs on a GPU',
                'bash tools/install.sh   # on a machine with nvcc',
            )
    elif shutil.which('nvidia-smi') and os.environ.get('CUDA_VISIBLE_DEVICES') != '':
        built = torch.version.cuda or 'no CUDA'
        yield Finding(
            f'there is an NVIDIA driver, and torch (built for {built}) sees no GPU',
            "nvidia-smi   # names the driver's newest CUDA: install a torch built for that or an "
            'older one, from https://pytorch.org',
        )
    else:
        yield Finding('no GPU: training and testing run on the CPU, in fp32')
    yield Finding(explain_backend().replace('\n', '\n    '))


def check_communication(installed: dict[str, str]) -> Iterator[Finding]:
    """See whether processes can speak to each other.

    Args:
        installed: See :func:`installed_versions`, unused.

    Yields:
        The findings.
    """
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        yield (
            Finding(f'NCCL {".".join(map(str, torch.cuda.nccl.version()))}')
            if dist.is_nccl_available()
            else Finding(
                'torch has no NCCL: no training on several GPUs',
                f'{sys.executable} -m pip install --force-reinstall torch',
            )
        )

    def reduce() -> list[int]:
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group(
                'gloo', store=dist.FileStore(f'{folder}/store', 1), rank=0, world_size=1
            )
            try:
                value = torch.tensor([0, 2])
                dist.all_reduce(value)
                return value.tolist()
            finally:
                dist.destroy_process_group()

    yield _try(
        'gloo',
        reduce,
        'export GLOO_SOCKET_IFNAME=lo   # or the network that joins the '
        'machines; `ip link` lists them',
    )


def check_limits(installed: dict[str, str]) -> Iterator[Finding]:
    """Look at shared memory, disk space, writable caches and file descriptors.

    Args:
        installed: See :func:`installed_versions`, unused.

    Yields:
        The findings.
    """
    shared = shutil.disk_usage('/dev/shm').free
    yield Finding(
        f'shared memory: {shared / _GB:.1f} GB free in /dev/shm',
        None
        if shared >= _LEAST_SHARED_MEMORY
        else 'mount -o remount,size=8G /dev/shm   # in Docker: docker '
        'run --shm-size=8g; else train with --cfg-options train_dataloader.num_workers=0',
    )
    free = shutil.disk_usage('.').free
    yield Finding(
        f'disk: {free / _GB:.1f} GB free in {Path.cwd()}',
        None
        if free >= _LEAST_DISK
        else 'df -h   # a run keeps up to five checkpoints: name a roomier place with --work-dir',
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding(
        f'file descriptors: {soft}',
        None
        if soft >= _LEAST_DESCRIPTORS or soft < 0
        else f'ulimit -n {hard if hard > 0 else 65536}',
    )
    for name, variable in (('torch', 'TORCH_HOME'), ('triton', 'TRITON_HOME')):
        folder = Path(os.environ.get(variable, Path.home() / ('.cache' if name == 'torch' else '')))
        yield (
            Finding(f'cache of {name}: {folder} is writable')
            if os.access(folder, os.W_OK)
            else Finding(
                f'cache of {name}: {folder} cannot be written to',
                f'mkdir -p /tmp/{name}-cache && export {variable}=/tmp/{name}-cache',
            )
        )


#: The parts of the check by their headings.
CHECKS: dict[str, Callable[[dict[str, str]], Iterator[Finding]]] = {
    'Versions': check_versions,
    'Doubled packages': check_doubles,
    'Compiled operators and imports': check_operators,
    'GPU and backends': check_gpu,
    'Communication': check_communication,
    'Limits': check_limits,
}


def main() -> int:
    """Print the findings.

    Returns:
        The number of problems.
    """
    installed, problems = installed_versions(), 0
    for heading, check in CHECKS.items():
        print(f'{heading}:')
        for finding in check(installed):
            print(f'  {"PROBLEM: " if finding.remedy else ""}{finding.text}')
            if finding.remedy:
                problems += 1
                print(f'    fix with: {finding.remedy}')
    print(f'{problems} problem(s) found.' if problems else 'All is well.')
    return problems


if __name__ == '__main__':
    sys.exit(min(main(), 1))
