"""What a user does first with the wheel, in an environment with nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO


def compiled_mmcv():
    """The wheel of mmcv that tools/install.sh has made, so that it is not compiled again."""
    cache = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache')) / 'groupmamba_mm'
    cache = Path(os.environ.get('GROUPMAMBA_CACHE', cache))
    return sorted(cache.glob(f'mmcv-*-torch*-cp{sys.version_info[0]}{sys.version_info[1]}/*.whl'))


@pytest.mark.installs
@pytest.mark.timeout(3600)
def test_the_wheel_alone_and_its_extras(tmp_path):
    wheels = compiled_mmcv()
    assert wheels, 'run bash tools/install.sh first, which compiles mmcv'
    done = subprocess.run(
        ['bash', str(REPO / 'tools/try_wheel.sh'), '--mmcv', str(wheels[-1])],
        env=dict(os.environ, TMPDIR=str(tmp_path), PYTHON=sys.executable),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert 'All of it works in an empty environment' in done.stdout
