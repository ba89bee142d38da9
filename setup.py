"""Package metadata. The requirements live in requirements/, one file per extra."""
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_requirements(name):
    """Return the requirements of ``requirements/<name>.txt`` without comments."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    lines = [line.split('#', 1)[0].strip() for line in lines]
    return [line for line in lines if line]


setup(
    name='groupmamba-mm',
    version=runpy.run_path(str(ROOT / 'groupmamba_mm' / 'version.py'))['__version__'],
    description='The GroupMamba vision backbone for mmpretrain, mmdetection and mmsegmentation',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['groupmamba_mm', 'groupmamba_mm.*']),
    python_requires='>=3.11',
    install_requires=read_requirements('runtime'),
    # The OpenMMLab libraries are an extra: mmcv has to be built against the installed torch.
    extras_require={name: read_requirements(name) for name in ('mminstall', 'optional', 'tests')},
    zip_safe=False)
