"""Data-parallel training: gradients of any layout, on two processes of this machine."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from groupmamba_mm.engine.distributed import _with_strides
from tests.conftest import REPO

#: Run by each of two processes: one backward pass, then what rank 0 found.
PROGRAM = """
import json, sys, warnings
import torch
from torch import nn
from mmengine.model import MMDistributedDataParallel
from groupmamba_mm.engine import BucketViewDDP

torch.set_num_threads(1)
torch.distributed.init_process_group('gloo')
rank = torch.distributed.get_rank()


class Net(nn.Module):

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Parameter(torch.randn(8, 1, 3, 3))
        self.pointwise = nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, images):
        images = images.to(memory_format=torch.channels_last)
        images = nn.functional.conv2d(images, self.depthwise, padding=1, groups=8)
        return self.head(self.norm(self.pointwise(images)).mean((2, 3)))


found = {}
for kind in (BucketViewDDP, MMDistributedDataParallel):
    torch.manual_seed(0)
    net = Net()
    model = kind(net)
    torch.manual_seed(1 + rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(2, 8, 6, 6)).square().sum().backward()
            with model.no_sync():  # gradients are added up
                model(torch.randn(2, 8, 6, 6)).square().sum().backward()
            model(torch.randn(2, 8, 6, 6)).square().sum().backward()
    found[kind.__name__] = dict(
        warnings=[str(warning.message) for warning in caught],
        strides=[list(p.grad.stride()) == list(p.stride()) for p in net.parameters()],
        gradients={name: p.grad.flatten().tolist() for name, p in net.named_parameters()})
if rank == 0:
    print(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def test_gradients_have_the_weights_strides_and_nothing_is_warned_of(tmp_path):
    (tmp_path / 'program.py').write_text(PROGRAM)
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc-per-node',
            '2',
            'program.py',
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env={
            **os.environ,
            'PYTHONPATH': str(REPO),
            'CUDA_VISIBLE_DEVICES': '',
            'OMP_NUM_THREADS': '1',
        },
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    ours, theirs = found['BucketViewDDP'], found['MMDistributedDataParallel']
    assert not ours['warnings'] and all(ours['strides'])
    # what is patched is there without it
    assert any('do not match bucket view strides' in text for text in theirs['warnings'])
    for name, gradient in theirs['gradients'].items():
        torch.testing.assert_close(
            torch.tensor(ours['gradients'][name]),
            torch.tensor(gradient),
            msg=lambda text: f'{name}: {text}',
        )


@pytest.mark.parametrize(
    'strides, kept', [((9, 1, 3, 1), True), ((9, 9, 3, 1), False), ((9, 9, 1, 3), False)]
)
def test_only_dimensions_of_one_element_are_restrided(strides, kept):
    gradient = torch.arange(18.0).as_strided((2, 1, 3, 3), strides)
    found = _with_strides(gradient, (2, 1, 3, 3), (9, 9, 3, 1))
    assert (found is not None) is kept
    if kept:
        assert found.stride() == (9, 9, 3, 1) and torch.equal(found, gradient)
        assert found.data_ptr() == gradient.data_ptr()


def test_weights_with_such_a_hook_are_compiled():
    layer = nn.Conv2d(4, 4, 3, groups=4)
    layer.weight.register_hook(lambda gradient: gradient * 2)
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    images = torch.randn(1, 4, 5, 5)
    compiled(images).sum().backward()
    hooked = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(images).sum().backward()
    torch.testing.assert_close(hooked, layer.weight.grad)
