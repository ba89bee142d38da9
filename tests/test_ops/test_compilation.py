"""Kernels as Triton's compiler sees them, which the interpreter does not show."""
import os
import subprocess
import sys

import pytest

from tests.conftest import REPO
from tests.kernel_truth import needs_triton

pytestmark = needs_triton

WRONG = """
import torch, triton, triton.language as tl
from tests.compile_kernels import Frontend

@triton.jit
def shift(x, out, n):
    lane = tl.arange(0, 16)
    above = tl.zeros([16], tl.float32)
    here = {start}
    for i in range(n):
        tl.store(out + i * 16 + lane, above)
        above = here
        here = tl.load(x + i * 16 + lane)

@triton.jit
def change(x, n):
    place = n
    for i in range(n):
        place = tl.load(x)

frontend = Frontend()
x = torch.zeros(64)
shift[1, ](x, x, 4)
change[1, ](x, 4)
print(frontend.problems)
"""


def run_apart(*command):
    """In a process of its own: this one's Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    return subprocess.run([sys.executable, *command], cwd=REPO, env=environment, text=True,
                          capture_output=True)


@pytest.mark.slow
def test_every_kernel_compiles_and_its_loops_hand_on_what_they_assign():
    done = run_apart('-m', 'tests.compile_kernels')
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize('start, is_wrong', [
    ('above', True), ('tl.zeros([16], tl.float32)', False)])
def test_what_the_compiler_does_differently_is_found(tmp_path, start, is_wrong):
    script = tmp_path / 'wrong.py'
    script.write_text(WRONG.format(start=start))
    done = run_apart('-c', f'import runpy; runpy.run_path({str(script)!r})')
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("a loop assigns ['above']" in done.stdout) == is_wrong
    assert "Loop-carried variable place has initial type" in done.stdout
