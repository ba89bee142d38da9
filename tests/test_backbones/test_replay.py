"""Inference that repeats is replayed, until something changes that a CUDA graph cannot see."""

import copy
import pickle

import pytest
import torch
from torch import nn

from groupmamba_mm.backbones import GroupMamba, replay
from tests.conftest import SMALL

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU'),
]


@pytest.fixture
def recordings(monkeypatch):
    """A graph's fake: a replay gives what the recorded pass gives with the weights' memory of
    now, and new images."""
    made = []

    def captured(function, images):
        made.append(images.shape)
        return function

    monkeypatch.setattr(replay, 'captured', captured)
    monkeypatch.setattr(replay, '_can_be_recorded', lambda modules, image: True)
    monkeypatch.setattr(
        GroupMamba,
        '_may_replay',
        lambda self, image: not self.training and not torch.is_grad_enabled(),
    )
    return made


@torch.no_grad()
def run(model, image, times=1):
    for _ in range(times):
        outputs = model(image)
    return outputs[0]


def test_a_pass_is_recorded_when_it_has_come_often(recordings, small_arch):
    model, image = GroupMamba(small_arch).eval(), torch.rand(2, 3, 16, 24)
    expected = run(model, image, replay.PASSES_BEFORE)
    assert recordings == []
    torch.testing.assert_close(run(model, image, 5), expected)
    assert len(recordings) == 1
    model.train()
    run(model, image)
    model(image)  # with gradients, in training
    assert len(recordings) == 1


CHANGES = {
    'hook': lambda block: block.register_forward_hook(lambda *args: None),
    'hook inside': lambda block: next(block.children()).register_forward_hook(lambda *args: None),
    'mode': lambda block: block.drop_path.train(),
    'other memory': lambda block: setattr(
        block.norm2 if hasattr(block, 'norm2') else block.norm,
        'weight',
        nn.Parameter(torch.ones(8)),
    ),
    'replaced': lambda block: setattr(block, 'drop_path', copy.deepcopy(block.drop_path)),
    'backend': lambda block: [
        setattr(m, 'scan_backend', 'torch') for m in block.modules() if hasattr(m, 'scan_backend')
    ],
}


@pytest.mark.parametrize('change', CHANGES)
def test_what_a_graph_does_not_see_ends_it(recordings, small_arch, change):
    model, image = GroupMamba(small_arch).eval(), torch.rand(1, 3, 16, 16)
    run(model, image, replay.PASSES_BEFORE + 1)
    assert model._replay._replay is not None
    CHANGES[change](model.stages[0][0])
    run(model, image)
    assert model._replay._replay is None


def test_sizes_that_change_are_computed(recordings, small_arch):
    model = GroupMamba(small_arch).eval()
    for width in (16, 20) * 8:
        run(model, torch.rand(1, 3, 16, width))
    assert recordings == []
    for width in (16, 20) * 3:
        run(model, torch.rand(1, 3, 16, width), replay.PASSES_BEFORE + 1)
    assert len(recordings) == replay.MOST_RECORDINGS


@pytest.mark.parametrize('fault', ['raises', 'differs'])
def test_what_cannot_be_replayed_is_launched(recordings, monkeypatch, caplog, fault):
    def captured(function, images):
        if fault == 'raises':
            raise RuntimeError('operation not permitted when stream is capturing')
        return lambda images: tuple(1.1 * y for y in function(images))

    monkeypatch.setattr(replay, 'captured', captured)
    model, image = GroupMamba(SMALL['official']).eval(), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = model.forward(image)[0]
    torch.testing.assert_close(run(model, image, replay.PASSES_BEFORE + 4), expected)
    reason = {'raises': 'not permitted', 'differs': 'results differ'}[fault]
    assert caplog.text.count('cannot be replayed') == 1 and reason in caplog.text


def test_copies_begin_anew(recordings, small_arch):
    model, image = GroupMamba(small_arch).eval(), torch.rand(1, 3, 16, 16)
    run(model, image, replay.PASSES_BEFORE + 1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._replay._replay is None
        torch.testing.assert_close(run(twin, image), run(model, image))
    assert not any('replay' in name for name in model.state_dict())


@pytest.mark.parametrize('autocast', [pytest.param(on, marks=gpu) for on in (False, True)])
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_replays_on_a_gpu_give_what_launches_give(small_arch, autocast, mode):
    torch.manual_seed(0)
    model = GroupMamba(small_arch, scan_backend='triton').cuda().eval()
    with mode(), torch.autocast('cuda', torch.bfloat16, enabled=autocast):
        for _ in range(replay.PASSES_BEFORE + 3):
            image = torch.rand(2, 3, 32, 48, device='cuda')
            torch.testing.assert_close(
                model(image)[0], model.forward(image)[0], atol=1e-5, rtol=1e-5
            )
        assert model._replay._replay is not None
        first, kept = model(image)[0], model(image)[0].clone()
        model(torch.rand_like(image))
        assert torch.equal(first, kept)  # a result is not overwritten by the next
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # in place: the graph reads it
        with torch.autocast('cuda', torch.bfloat16, enabled=autocast):
            torch.testing.assert_close(
                model(image)[0], model.forward(image)[0], atol=1e-4, rtol=1e-4
            )
            assert model._replay._replay is not None
    with torch.no_grad(), torch.autocast('cuda', torch.bfloat16, enabled=autocast):
        model(image)
