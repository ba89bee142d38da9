"""Data-parallel training: gradients averaged over two processes of this machine."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPO

#: Run by each of two processes: backward passes, then what rank 0 found.
PROGRAM = """
import json, sys, warnings
import torch
from torch import nn
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from groupmamba_mm.engine import FlatDataParallel
from groupmamba_mm.errors import ConfigError

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

class TwoLosses(Net):

    def forward(self, images):
        outputs = super().forward(images)
        return dict(loss=outputs.square().sum(), others=[outputs.sum()])


def total(losses):
    return losses['loss'] + losses['others'][0]


exchanges = []
all_reduce = torch.distributed.all_reduce
torch.distributed.all_reduce = lambda *args, **options: (exchanges.append(1), all_reduce(*args, **options))

found = {}
for kind in (FlatDataParallel, MMDistributedDataParallel):
    torch.manual_seed(rank)  # the first process's weights are taken
    net = TwoLosses()
    model = kind(net)
    exchanges.clear()
    torch.manual_seed(1 + rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(2):
            model.zero_grad()
            total(model(torch.randn(2, 8, 6, 6))).backward()
            with model.no_sync():  # gradients are added up
                kept = total(model(torch.randn(2, 8, 6, 6)))
            kept.backward()  # also of a pass that only began there
            total(model(torch.randn(2, 8, 6, 6))).backward()
    found[kind.__name__] = dict(
        warnings=[str(warning.message) for warning in caught],
        exchanges=len(exchanges),
        aligned=[p.grad.data_ptr() % 128 - next(net.parameters()).grad.data_ptr() % 128 == 0
                 for p in net.parameters()],
        strides=[list(p.grad.stride()) for p in net.parameters()],
        gradients={name: p.grad.flatten().tolist() for name, p in net.named_parameters()})

net = TwoLosses()
total(net(torch.randn(2, 8, 6, 6))).backward()
found['strides of one process'] = [list(p.grad.stride()) for p in net.parameters()]


class Losses(dict):
    pass


class FrozenLater(Net):

    def forward(self, images):
        return Losses(loss=super().forward(images).square().sum())


net = FrozenLater()
model = FlatDataParallel(net)
for frozen in (False, True):
    net.depthwise.requires_grad_(not frozen)
    model.zero_grad()
    torch.manual_seed(1 + rank)
    model(torch.randn(2, 8, 6, 6))['loss'].backward()
    own = torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad])
    others = [torch.empty_like(own) for _ in range(2)]
    torch.distributed.all_gather(others, own)
    found['frozen' if frozen else 'a class of dicts'] = torch.equal(*others)


class Batches(BaseModel):
    # takes a list, as its preprocessor gives one

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 1)

    def forward(self, images, mode):
        return dict(loss=self.head(images).sum())


net = Batches()
optimizer = OptimWrapper(torch.optim.SGD(net.parameters(), 0.1))
found['logged'] = FlatDataParallel(net).train_step([torch.rand(3, 2)], optimizer)['loss'].item()
net.forward = lambda images, mode: dict(loss=torch.zeros(()))
try:
    FlatDataParallel(net).train_step([torch.rand(3, 2)], optimizer)
except ConfigError as error:
    found['no gradient'] = str(error)

net = Net()
net.unused = nn.Parameter(torch.zeros(3))
model = FlatDataParallel(net)
try:
    model(torch.randn(2, 8, 6, 6)).sum().backward()
except ConfigError as error:
    found['unused'] = str(error)
try:
    FlatDataParallel(nn.Linear(3, 2 + rank))
except ConfigError as error:
    found['different'] = str(error)
if rank == 0:
    print(json.dumps(found))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('distributed')
    (folder / 'program.py').write_text(PROGRAM)
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
        cwd=folder,
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
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_gradients_are_those_of_ddp(found):
    ours, theirs = found['FlatDataParallel'], found['MMDistributedDataParallel']
    assert not ours['warnings'] and all(ours['aligned'])
    assert ours['strides'] == found['strides of one process']
    for name, gradient in theirs['gradients'].items():
        torch.testing.assert_close(
            torch.tensor(ours['gradients'][name]),
            torch.tensor(gradient),
            msg=lambda text: f'{name}: {text}',
        )


def test_all_gradients_are_exchanged_once_in_a_pass(found):
    # two passes each time, whose losses come in a dict with a list; none under no_sync
    assert found['FlatDataParallel']['exchanges'] == 4


def test_gradients_are_the_same_in_all_processes(found):
    assert found['a class of dicts'] and found['frozen']


def test_a_step_takes_what_mmengines_does_and_needs_a_loss_to_learn_from(found):
    assert isinstance(found['logged'], float)
    assert 'no tensor with a gradient is found' in found['no gradient']


def test_an_unused_weight_is_named(found):
    assert '1 weights have no part in the loss' in found['unused']
    assert 'unused' in found['unused'] and 'find_unused_parameters=True' in found['unused']


def test_other_models_in_other_processes_are_refused(found):
    assert 'process(es) [1] have another model than process 0' in found['different']
