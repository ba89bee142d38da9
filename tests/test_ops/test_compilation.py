"""Kernels as Triton's compiler sees them, which the interpreter does not show."""

import json

import pytest

from tests.kernel_testing import needs_triton, run_apart

pytestmark = needs_triton

WRONG = """
import torch, triton, triton.language as tl
from groupmamba_mm.ops.launch import Launch
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
frontend.translate(Launch(shift, (torch.float32, torch.float32, 'i32'), ()))
frontend.translate(Launch(change, (torch.float32, 'i32'), ()))
print(frontend.problems)
"""


#: A model that detects: what it launches for sizes, some of which were not noted before.
SIZES = """
import json, random, torch
from groupmamba_mm import GroupMamba
from groupmamba_mm.backbones.kernels import DENSE_SIZES, Pass, note_backbone
from tests.compile_kernels import specialised_integers

random.seed(0)
model = GroupMamba(arch=dict(family='{family}', stem_channels=8, embed_dims=(64, 96), depths=(2, 1),
                             ffn_ratios=(8, 2)), scan_backend='triton', out_indices=(0, 1))
sizes = [(1280, 1280), (320, 320)] + [
    (32 * random.randrange(10, 42), 32 * random.randrange(10, 42)) for _ in range(3)]
new = []
for batch in (1, 4):
    kind = Pass(batch, torch.float32, torch.bfloat16, True, True)
    known = note_backbone(model, DENSE_SIZES, [kind], 90)
    new += set(note_backbone(model, sizes, [kind], 90)) - set(known)
print(json.dumps([specialised_integers(known), len(known), [str(launch) for launch in new]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize('family', ['paper', 'official'])
def test_new_image_sizes_compile_nothing(family):
    """No integer decides on a version, and some sizes stand for all."""
    done = run_apart('-c', SIZES.format(family=family))
    assert done.returncode == 0, done.stderr[-3000:]
    integers, count, new = json.loads(done.stdout.splitlines()[-1])
    assert integers == [] and new == []
    assert count > 50


#: A classifier of real widths: what batches of other sizes launch that a training did not compile.
BATCHES = """
import json, torch
from groupmamba_mm import GroupMamba
from groupmamba_mm.backbones.kernels import Pass, note_backbone, kinds_to_compile

model = GroupMamba('{arch}', scan_backend='triton').train()
kind = Pass(128, torch.float32, torch.bfloat16, True, True)
known = note_backbone(model, [(224, 224)], kinds_to_compile(model, kind), 90)
others = [kind._replace(batch=batch) for batch in (2, 7, 24, 80)]
new = set(note_backbone(model, [(224, 224)], others, 90)) - set(known)
kind = kind._replace(training=False, wants_gradient=False)  # a test alone
tested = note_backbone(model, [(224, 224)], kinds_to_compile(model, kind), 90)
new |= set(note_backbone(model, [(224, 224)], [kind._replace(batch=5)], 90)) - set(tested)
print(json.dumps([len(known), [str(launch) for launch in new]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['tiny', 'official-tiny'])
def test_smaller_batches_compile_nothing(arch):
    """A pass of many images and one of a single image stand for all between."""
    done = run_apart('-c', BATCHES.format(arch=arch))
    assert done.returncode == 0, done.stderr[-3000:]
    count, new = json.loads(done.stdout.splitlines()[-1])
    assert new == [] and count > 100


@pytest.mark.slow
def test_every_kernel_compiles_and_its_loops_hand_on_what_they_assign():
    done = run_apart('-m', 'tests.compile_kernels')
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize(
    'start, is_wrong', [('above', True), ('tl.zeros([16], tl.float32)', False)]
)
def test_what_the_compiler_does_differently_is_found(tmp_path, start, is_wrong):
    script = tmp_path / 'wrong.py'
    script.write_text(WRONG.format(start=start))
    done = run_apart('-c', f'import runpy; runpy.run_path({str(script)!r})')
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("a loop assigns ['above']" in done.stdout) == is_wrong
    assert 'Loop-carried variable place has initial type' in done.stdout
