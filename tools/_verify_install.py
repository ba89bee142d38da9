"""Check an environment for install.sh: nothing clashes, versions are the tested ones, it all loads.

    python tools/_verify_install.py preflight                 before anything is installed
    python tools/_verify_install.py installed REQUIREMENTS    prints those that are there in full
    python tools/_verify_install.py mmcv                      the tested version loads
    python tools/_verify_install.py wheel FILE OPERATORS      a wheel of mmcv, 'none' without any
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

HEAVY_IMPORTS = ('mmengine', 'mmpretrain.models', 'timm', 'sklearn', 'groupmamba_mm.engine')
DENSE_IMPORTS = ('mmdet.models', 'mmseg.models')


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


def installed_requirements(names):
    """Those of the files in requirements/ of which every package is installed."""
    try:
        return [n for n in names if all(installed_version(r.name) for r in read_requirements(n))]
    except ModuleNotFoundError:  # packaging, which every install brings
        return []


def check_mmcv():
    """Refuse another version of mmcv than the tested one, or one that does not load."""
    [pin] = [pin for pin in read_requirements('tested') if pin.name == 'onedl-mmcv']
    found = installed_version('onedl-mmcv')
    if found is None or not pin.specifier.contains(found):
        sys.exit(f'onedl-mmcv is {found or "not installed"}, tested is {pin.specifier}')
    importlib.import_module('mmcv')


def check_wheel(path, operators):
    """Refuse a wheel of mmcv that is cut short, or that has no operators (built without torch)."""
    try:
        with zipfile.ZipFile(path) as wheel:
            damaged = wheel.testzip()
            has_operators = any(name.startswith('mmcv/_ext') for name in wheel.namelist())
    except zipfile.BadZipFile as error:
        sys.exit(f'{path} is damaged: {error}')
    if damaged:
        sys.exit(f'{path} is damaged: {damaged} in it has a wrong checksum')
    if operators != 'none' and not has_operators:
        sys.exit(f'{path} has no compiled operators (mmcv/_ext*)')


def check_versions(wanted):
    """Compare what is installed with the tested pins, and refuse if a requirement is missing."""
    problems, remedies = [], []
    for requirement in (r for name in wanted for r in read_requirements(name)):
        if installed_version(requirement.name) is None:
            problems.append(f'{requirement.name} is not installed')
            remedies.append(str(requirement))
    for pin in read_requirements('tested'):
        found = installed_version(pin.name)
        if found and not pin.specifier.contains(found, prereleases=True):
            problems.append(f'{pin.name} is {found}, tested is {pin.specifier}')
            remedies.append(str(pin))
    if problems:
        quoted = ' '.join(f"'{name}'" for name in remedies)
        sys.exit(f'{"; ".join(problems)}. Remedy: {sys.executable} -m pip install {quoted}')


def check_operators_are_there():
    """Look for mmcv's compiled file without loading it."""
    compiled = [path for path in files('onedl-mmcv') if path.name.startswith('_ext')]
    if not any(path.locate().is_file() for path in compiled):
        sys.exit(f'mmcv {version("onedl-mmcv")} is installed without its compiled operators')


def check_torchvision_operators():
    """Run a compiled operator of torchvision on the CPU."""
    import torch

    try:
        import torchvision
    except RuntimeError as error:
        sys.exit(
            f'torchvision {version("torchvision")} does not load with torch '
            f'{torch.__version__} ({error}): the two come from different indexes. Remedy: '
            'uninstall both and run tools/install.sh again'
        )
    kept = torchvision.ops.nms(*some_boxes(), 0.5)
    assert kept.tolist() == [0, 2], f'torchvision.ops.nms kept {kept.tolist()} instead of [0, 2]'


def check_mmcv_operators():
    """Run two compiled operators of mmcv on the CPU."""
    import torch

    try:
        from mmcv.ops import nms, roi_align
    except ImportError as error:
        sys.exit(
            f'the operators of mmcv {version("onedl-mmcv")} do not load ({error}). Remedy: '
            'remove the mmcv-* folders from the cache of tools/install.sh and run it again, '
            'which compiles them again'
        )
    kept = nms(*some_boxes(), iou_threshold=0.5)[1]
    assert kept.tolist() == [0, 2], f'mmcv.ops.nms kept {kept.tolist()} instead of [0, 2]'
    pooled = roi_align(torch.ones(1, 1, 16, 16), torch.tensor([[0.0, 2.0, 2.0, 10.0, 10.0]]), 2)
    assert torch.equal(pooled, torch.ones(1, 1, 2, 2)), f'mmcv.ops.roi_align made {pooled} of ones'


def some_boxes():
    """Three boxes, of which the second overlaps the first, and their scores."""
    import torch

    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9], [8.0, 8.0, 12.0, 12.0]])
    return boxes, torch.tensor([0.9, 0.8, 0.7])


def check_imports(dense):
    for name in HEAVY_IMPORTS + (DENSE_IMPORTS if dense else ()):
        importlib.import_module(name)


def describe(dense):
    import torch

    text = (
        f'Python {sys.version.split()[0]}, torch {torch.__version__}, '
        f'GPU {torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}, '
        f'mmcv {version("onedl-mmcv")}'
    )
    if not dense:
        return f'{text} for classification'
    from mmcv.ops import get_compiling_cuda_version

    return f'{text} with operators for CUDA: {get_compiling_cuda_version()}'


def main(mode, *arguments):
    if mode == 'preflight':
        check_clashes()
    elif mode == 'installed':
        print(*installed_requirements(arguments))
    elif mode == 'mmcv':
        check_mmcv()
    elif mode == 'wheel':
        check_wheel(*arguments)
    else:
        dense = 'dense' in arguments
        check_versions(arguments)
        if dense:
            check_operators_are_there()
        if mode == 'full':
            check_torchvision_operators()
            if dense:
                check_mmcv_operators()
            check_imports(dense)
            print(describe(dense))


if __name__ == '__main__':
    main(*sys.argv[1:])
