"""Inference that repeats is replayed, until something changes that a CUDA graph cannot see."""

import contextlib
import copy
import gc
import pickle
import random

import pytest
import torch
from torch import nn

from groupmamba_mm import cuda_graph
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

    def captured(function, images, pool):
        made.append(images.shape)
        return function

    monkeypatch.setattr(replay, 'captured', captured)
    monkeypatch.setattr(replay, 'CapturedTraining', FakeTraining)
    monkeypatch.setattr(FakeTraining, 'made', made, raising=False)
    monkeypatch.setattr(replay, '_can_be_recorded', lambda modules, image: True)
    monkeypatch.setattr(
        GroupMamba,
        '_replay_of',
        lambda self, image: self._training_replay if self.training else self._replay,
    )
    return made


class FakeTraining:
    """A training graph's stand-in: like it, each replay overwrites the one before, also another
    recording's, and works once with memory of its own.
    """

    made: list
    last = None

    def __init__(self, function, images, parameters, pool, other):
        self.made.append(images.shape)
        self.function, self.parameters = function, parameters
        for _ in range(2):  # a warm-up draws random numbers and moves averages
            function(images)
        self.outputs = None

    @torch.enable_grad()
    def forward(self, images):
        FakeTraining.last = self
        self.fresh = self.function(images)
        values = [y.detach() for y in self.fresh]
        if self.outputs is None:
            self.outputs = values
        for mine, value in zip(self.outputs, values):
            mine.copy_(value)
        return self.outputs

    def backward(self, grad_outputs):
        assert FakeTraining.last is self
        return torch.autograd.grad(self.fresh, self.parameters, grad_outputs, allow_unused=True)


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
    assert model._replay._replays
    CHANGES[change](model.stages[0][0])
    run(model, image)
    assert not model._replay._replays


def test_few_sizes_are_recorded_each(recordings, small_arch):
    model = GroupMamba(small_arch).eval()
    images = [torch.rand(1, 3, 16, width) for width in (16, 20, 24)]
    expected = [run(model, image) for image in images]
    for _ in range(replay.PASSES_BEFORE + 3):
        for image, other in zip(images, expected):
            torch.testing.assert_close(run(model, image), other)
    assert len(recordings) == 3


def test_many_sizes_are_not(recordings):
    model = GroupMamba(SMALL['paper']).eval()
    few = int(1 / replay.LEAST_SHARE)
    for _ in range(replay.PASSES_BEFORE + 2):
        for width in range(few + 4):  # each has too small a share
            run(model, torch.rand(1, 3, 4, 4 + width))
    assert recordings == []
    for width in range(few):  # each in turn is most of what comes
        run(model, torch.rand(1, 3, 8, 4 + width), replay.PASSES_BEFORE * few)
        model._replay._passes.clear()
    assert len(recordings) == replay.MOST_KINDS


def test_sizes_in_random_order_take_few_recordings(recordings):
    model, draw = GroupMamba(SMALL['paper']).eval(), random.Random(0)
    for _ in range(400):
        run(model, torch.rand(1, 3, 4, 4 + draw.randrange(60)))
    assert len(recordings) <= 3
    assert model._replay._passes.total() <= replay.COUNTED
    image = torch.rand(1, 3, 8, 8)  # a new size, from now on the only one
    run(model, image, replay.COUNTED)
    assert image.shape in recordings


def test_no_garbage_is_collected_while_a_graph_is_recorded(monkeypatch):
    """What is garbage may call CUDA at its end."""
    monkeypatch.setattr(torch.cuda, 'graph', lambda *args, **options: contextlib.nullcontext())
    with cuda_graph._capture(None):
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_failed_recording_ends_those_before_and_restores(recordings, monkeypatch, caplog):
    model, image = GroupMamba(SMALL['paper'], cuda_graphs='all').train(), torch.rand(2, 3, 8, 8)
    for _ in range(replay.STEPS_BEFORE + 1):
        model(image)
    assert model._training_replay._replays
    steps = int(next(v for k, v in model.state_dict().items() if 'num_batches' in k))

    class Failing(FakeTraining):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            raise RuntimeError('out of memory')

    monkeypatch.setattr(replay, 'CapturedTraining', Failing)
    times = replay.STEPS_BEFORE + 5
    for _ in range(times):
        model(image[..., :4])
    assert not model._training_replay._replays
    assert caplog.text.count('out of memory') == 1
    found = int(next(v for k, v in model.state_dict().items() if 'num_batches' in k))
    assert found == steps + times


def test_what_ends_again_and_again_is_launched(recordings):
    model, image = GroupMamba(SMALL['paper']).eval(), torch.rand(1, 3, 4, 4)
    for _ in range(replay.MOST_ENDS + 3):
        run(model, image, replay.PASSES_BEFORE + 2)
        CHANGES['other memory'](model.stages[0][0])
    assert len(recordings) == replay.MOST_ENDS


@pytest.mark.parametrize('fault', ['raises', 'differs'])
def test_what_cannot_be_replayed_is_launched(recordings, monkeypatch, caplog, fault):
    def captured(function, images, pool):
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
        assert not twin._replay._replays
        torch.testing.assert_close(run(twin, image), run(model, image))
    assert not any('replay' in name for name in model.state_dict())


def trained(arch, cuda_graphs, step, steps=8, device='cpu', **options):
    """A model after training steps, with what they returned."""
    torch.manual_seed(0)
    model = GroupMamba(arch, drop_path_rate=0.5, cuda_graphs=cuda_graphs, **options).to(device)
    if cuda_graphs == 'off':
        model._replay_of = lambda image: None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    returned = []
    for _ in range(steps):
        optimizer.zero_grad()
        images = torch.rand(2, 2, 3, 16, 24, generator=generator).to(device)
        returned.append(step(model.train(), images).item())
        optimizer.step()
    return model, returned


def one_pass(model, images):
    loss = model(images[0])[0].square().sum()
    loss.backward()
    return loss


def added_up(model, images):
    return one_pass(model, images) + one_pass(model, images[1:])


def two_at_once(model, images):
    loss = sum(model(image)[0].square().sum() for image in images)
    loss.backward()
    return loss


def two_sizes(model, images):
    return one_pass(model, images) + one_pass(model, images[..., :16])


STEPS = [one_pass, added_up, two_at_once, two_sizes]


@pytest.mark.parametrize('step', STEPS)
def test_replayed_training_is_the_same_training(recordings, small_arch, step):
    """Weights, averages and random numbers, although recording runs passes of its own."""
    model, losses = trained(small_arch, 'all', step)
    assert len(recordings) == len(model._training_replay._replays) == 1 + (step is two_sizes)
    expected, expected_losses = trained(small_arch, 'off', step)
    # what a parameter gets from two passes is added up in another order
    near = dict(rtol=0, atol=0) if step is one_pass else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses, expected_losses, **near)
    for (name, one), other in zip(model.state_dict().items(), expected.state_dict().values()):
        torch.testing.assert_close(one, other, **near, msg=name)


def test_a_pass_whose_results_are_dropped_is_waited_for_no_longer(recordings, small_arch):
    model, image = GroupMamba(small_arch, cuda_graphs='all').train(), torch.rand(2, 3, 16, 24)
    for _ in range(replay.STEPS_BEFORE + 2):
        model(image)
    assert model._training_replay._pending() is None
    waiting = model(image)
    assert model._training_replay._pending() is not None
    assert model(image)[0].grad_fn.name() != waiting[0].grad_fn.name()


def test_a_replayed_pass_goes_back_once(recordings, small_arch):
    model, image = GroupMamba(small_arch, cuda_graphs='all').train(), torch.rand(2, 3, 16, 24)
    for _ in range(replay.STEPS_BEFORE + 1):
        loss = model(image)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cuda_graphs='inference'"):
        loss.backward()


@pytest.mark.parametrize('change', CHANGES)
def test_what_a_training_graph_does_not_see_ends_it(recordings, small_arch, change):
    model, image = GroupMamba(small_arch, cuda_graphs='all').train(), torch.rand(2, 3, 16, 16)
    for _ in range(replay.STEPS_BEFORE + 1):
        model(image)
    assert model._training_replay._replays
    if change == 'mode':
        model.stages[0][0].eval()
    else:
        CHANGES[change](model.stages[0][0])
    model(image)
    assert not model._training_replay._replays
    model.stages[1].requires_grad_(False)
    for _ in range(replay.STEPS_BEFORE + 1):
        model(image)
    assert change in ('hook', 'hook inside') or model._training_replay._replays
    model.stages[1].requires_grad_(True)
    model(image)
    assert not model._training_replay._replays


@pytest.mark.parametrize(
    'watched',
    [
        lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(model),
        lambda model: model.summary.double(),
    ],
)
def test_what_cannot_be_recorded_for_training(recordings, watched):
    model = GroupMamba(SMALL['official'], cuda_graphs='all').train()
    watched(model)
    model._training_replay._modules = tuple(model.modules())
    assert not model._training_replay._can_record(torch.rand(2, 3, 16, 16))


def test_hooks_of_parameters_see_a_replay(recordings, small_arch):
    image, seen = torch.rand(2, 3, 16, 16), []
    model = GroupMamba(small_arch, cuda_graphs='all').train()
    first = next(model.parameters())
    first.register_hook(lambda grad: seen.append(grad) or torch.zeros_like(grad))
    for _ in range(replay.STEPS_BEFORE + 2):
        model.zero_grad()
        model(image)[0].norm(p=1).backward()
    assert len(recordings) == 1
    assert len(seen) == replay.STEPS_BEFORE + 2
    assert seen[-1].abs().max() > 0
    assert first.grad.abs().max() == 0


@pytest.mark.parametrize('step', [pytest.param(step, marks=gpu) for step in STEPS])
@pytest.mark.parametrize('autocast', [False, True])
def test_replayed_training_on_a_gpu(small_arch, step, autocast):
    # its cache would keep the casts of weights from before the first update
    with torch.autocast('cuda', torch.bfloat16, enabled=autocast, cache_enabled=False):
        options = dict(device='cuda', scan_backend='triton')
        model, losses = trained(small_arch, 'all', step, **options)
        expected, expected_losses = trained(small_arch, 'off', step, **options)
    assert model._training_replay._replays
    torch.testing.assert_close(
        torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-4, atol=0
    )
    for (name, one), other in zip(model.state_dict().items(), expected.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


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
        assert model._replay._replays
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
            assert model._replay._replays
    with torch.no_grad(), torch.autocast('cuda', torch.bfloat16, enabled=autocast):
        model(image)
