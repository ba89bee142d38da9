"""Check an environment for install.sh: nothing clashes, versions are the tested ones, it all loads.

    python tools/_verify_install.py preflight                 before anything is installed
    python tools/_verify_install.py wheel FILE                a wheel of mmcv
    python tools/_verify_install.py quick|full REQUIREMENTS   what was installed

REQUIREMENTS are names of files in requirements/. ``quick`` imports nothing, because
torch alone takes seconds.
"""

import importlib
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / 'requirements'

# They install the same modules as the onedl packages: whichever came last would win, file by file.
CLASHING = (
    'mmcv',
    'mmcv-full',
    'mmcv-lite',
    'mmdet',
    'mmengine',
    'mmengine-lite',
    'mmpretrain',
    'mmsegmentation',
)

HEAVY_IMPORTS = (
    'mmengine',
    'mmpretrain.models',
    'mmdet.models',
    'mmseg.models',
    'timm',
    'sklearn',
    'groupmamba_mm',
)


def installed_version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read_requirements(name):
    from packaging.requirements import Requirement

    lines = (REQUIREMENTS / f'{name}.txt').read_text().splitlines()
    lines = [line.split('#', 1)[0].strip() for line in lines]
    return [Requirement(line) for line in lines if line]


def check_clashes():
    clashing = [name for name in CLASHING if installed_version(name)]
    if clashing:
        sys.exit(
            f'{", ".join(clashing)} would be overwritten in part by the onedl packages, which '
            'install the same modules. Remove them first: '
            f'{sys.executable} -m pip uninstall {" ".join(clashing)}'
        )


def check_wheel(path):
    """Refuse a wheel of mmcv that is cut short, or that has no operators (built without torch)."""
    try:
        with zipfile.ZipFile(path) as wheel:
            damaged = wheel.testzip()
            has_operators = any(name.startswith('mmcv/_ext') for name in wheel.namelist())
    except zipfile.BadZipFile as error:
        sys.exit(f'{path} is damaged: {error}')
    if damaged:
        sys.exit(f'{path} is damaged: {damaged} in it has a wrong checksum')
    if not has_operators:
        sys.exit(f'{path} has no compiled operators (mmcv/_ext*)')


def check_versions(wanted):
    """Hold what is installed against the tested pins, and refuse if something wanted is missing."""
    problems, mend = [], []
    for requirement in (r for name in wanted for r in read_requirements(name)):
        if installed_version(requirement.name) is None:
            problems.append(f'{requirement.name} is not installed')
            mend.append(str(requirement))
    for pin in read_requirements('tested'):
        found = installed_version(pin.name)
        if found and not pin.specifier.contains(found, prereleases=True):
            problems.append(f'{pin.name} is {found}, tested is {pin.specifier}')
            mend.append(str(pin))
    if problems:
        quoted = ' '.join(f"'{name}'" for name in mend)
        sys.exit(f'{"; ".join(problems)}. Remedy: {sys.executable} -m pip install {quoted}')


def check_operators_are_there():
    """Look for mmcv's compiled file without loading it."""
    compiled = [path for path in files('onedl-mmcv') if path.name.startswith('_ext')]
    if not any(path.locate().is_file() for path in compiled):
        sys.exit(f'mmcv {version("onedl-mmcv")} is installed without its compiled operators')


def check_operators():
    """Run one compiled operator of torchvision and two of mmcv on the CPU."""
    import torch

    try:
        import torchvision
    except RuntimeError as error:
        sys.exit(
            f'torchvision {version("torchvision")} does not load with torch '
            f'{torch.__version__} ({error}): the two come from different indexes. Remedy: '
            'uninstall both and run tools/install.sh again'
        )
    try:
        from mmcv.ops import nms, roi_align
    except ImportError as error:
        sys.exit(
            f'the operators of mmcv {version("onedl-mmcv")} do not load ({error}). Remedy: '
            'remove the mmcv-* folders from the cache of tools/install.sh and run it again, '
            'which compiles them anew'
        )

    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9], [8.0, 8.0, 12.0, 12.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    kept = torchvision.ops.nms(boxes, scores, 0.5)
    assert kept.tolist() == [0, 2], f'torchvision.ops.nms kept {kept.tolist()} instead of [0, 2]'
    kept = nms(boxes, scores, iou_threshold=0.5)[1]
    assert kept.tolist() == [0, 2], f'mmcv.ops.nms kept {kept.tolist()} instead of [0, 2]'
    pooled = roi_align(torch.ones(1, 1, 16, 16), torch.tensor([[0.0, 2.0, 2.0, 10.0, 10.0]]), 2)
    assert torch.equal(pooled, torch.ones(1, 1, 2, 2)), f'mmcv.ops.roi_align made {pooled} of ones'


def check_imports():
    for name in HEAVY_IMPORTS:
        importlib.import_module(name)


def describe():
    import torch
    from mmcv.ops import get_compiling_cuda_version

    return (
        f'Python {sys.version.split()[0]}, torch {torch.__version__}, '
        f'GPU {torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}, '
        f'mmcv {version("onedl-mmcv")} with operators for CUDA: {get_compiling_cuda_version()}'
    )


def main(mode, *arguments):
    if mode == 'preflight':
        check_clashes()
    elif mode == 'wheel':
        check_wheel(*arguments)
    else:
        check_versions(arguments)
        check_operators_are_there()
        if mode == 'full':
            check_operators()
            check_imports()
            print(describe())


if __name__ == '__main__':
    main(*sys.argv[1:])
