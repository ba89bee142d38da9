"""The loop around the step: nothing waits for the GPU, and the numbers are mmengine's own."""

import contextlib
import os

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseDataPreprocessor, BaseModel, ExponentialMovingAverage
from mmengine.registry import HOOKS, MODELS
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from groupmamba_mm import GroupMamba
from groupmamba_mm.checkpoint import load_checkpoint_file
from groupmamba_mm.engine import (
    CheckedRunner,
    DeferredMessageHub,
    ForeachExponentialMovingAverage,
    RunAheadHook,
)
from tests.conftest import SMALL


@pytest.fixture(autouse=True)
def waiting_is_allowed_afterwards():
    """PyTorch's mode outlives a test that fails in a step."""
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode('default')


#: What makes the host wait for the result of a GPU: numbers and sizes that depend on data.
WAITING_OPERATORS = ('_local_scalar_dense', 'equal', 'masked_select', 'nonzero', '_unique2')
WAITING_METHODS = ('cpu', 'numpy', 'tolist')


class _Operators(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split('.')[0]
        booleans = name in ('index', 'index_put', 'index_put_') and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING_OPERATORS or booleans:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__name__', '') in WAITING_METHODS:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched(found):
    """Note whatever would wait for a GPU, also on a machine without one."""
    with _Methods(found), _Operators(found):
        yield


@HOOKS.register_module()
class WatchHook(Hook):
    """Watches all steps but the first few and the last, in which the epoch's line is logged.

    On a GPU, PyTorch itself refuses to wait.
    """

    priority = 'HIGHEST'

    def __init__(self, first):
        self.first = first
        self.found = []
        self.watch = None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.watch = None
        if not self.first <= batch_idx < len(runner.train_dataloader) - 1:
            return
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode('error')
        else:
            self.watch = watched(self.found)
            self.watch.__enter__()


@HOOKS.register_module()
class EndWatchHook(Hook):
    priority = 'LOWEST'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        torch.cuda.is_available() and torch.cuda.set_sync_debug_mode('default')
        watch = next(hook for hook in runner.hooks if isinstance(hook, WatchHook)).watch
        if watch is not None:
            watch.__exit__(None, None, None)


@MODELS.register_module()
class SyncFreeTestModel(BaseModel):
    def __init__(self, compile_mode=None):
        super().__init__(BaseDataPreprocessor())
        self.backbone = GroupMamba(arch=SMALL['official'], compile_mode=compile_mode)
        self.head = nn.Linear(SMALL['official']['embed_dims'][-1], 3)

    def forward(self, images, labels, mode='tensor'):
        logits = self.head(self.backbone(images)[-1])
        if mode != 'loss':
            return logits
        return dict(
            loss=nn.functional.cross_entropy(logits, labels),
            accuracy=(logits.argmax(1) == labels).float().mean(),
        )


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 32, 32, generator=generator), index % 3


def train(
    work_dir,
    wrapper=None,
    ema='ForeachExponentialMovingAverage',
    watch=None,
    compile=None,
    resume=False,
    epochs=1,
):
    """Twelve steps an epoch."""
    hooks = [dict(type='EMAHook', ema_type=ema, momentum=0.2, update_buffers=True)]
    if watch is not None:
        hooks += [dict(type='WatchHook', first=watch), dict(type='EndWatchHook')]
    runner = CheckedRunner(
        dict(type='SyncFreeTestModel', compile_mode=compile),
        str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            dataset=Pictures(),
            pin_memory=torch.cuda.is_available(),
            collate_fn=dict(type='default_collate'),
            sampler=dict(type='DefaultSampler', shuffle=True),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        custom_hooks=hooks,
        resume=resume,
        param_scheduler=dict(type='CosineAnnealingLR', T_max=40, by_epoch=False),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=100, ignore_last=False)),
        optim_wrapper=dict(
            type='SyncFreeOptimWrapper',
            constructor='MergedOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1, fused=True),
            paramwise_cfg=dict(bias_decay_mult=0.0),
            clip_grad=dict(max_norm=0.5),
        )
        | (wrapper or {}),
        randomness=dict(seed=0),
        experiment_name=f'sync{os.urandom(4).hex()}',
        log_level='WARNING',
    )
    runner.train()
    return runner


def watched_in(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, WatchHook)).found


@pytest.mark.parametrize('count', [1, 2])
def test_nothing_waits_in_a_step(tmp_path, count):
    found = watched_in(train(tmp_path, dict(accumulative_counts=count), watch=2))
    # the count of the EMA's steps, which is on the host
    assert found == ['_local_scalar_dense'] * 9


@pytest.mark.parametrize(
    'change', [dict(wrapper=dict(type='OptimWrapper')), dict(ema='ExponentialMovingAverage')]
)
def test_the_watch_sees_what_waits(tmp_path, change):
    assert len(watched_in(train(tmp_path, watch=2, **change))) > 10


AMP = dict(type='SyncFreeAmpOptimWrapper')


@pytest.mark.gpu
@pytest.mark.parametrize(
    'wrapper, compile',
    [
        (dict(), None),
        (dict(accumulative_counts=2), None),
        (dict(AMP, dtype='bfloat16', loss_scale=dict(enabled=False)), None),
        (dict(AMP, dtype='float16', loss_scale='dynamic'), None),
        (dict(AMP, dtype='float16', loss_scale=512.0, accumulative_counts=2), None),
        (dict(AMP, dtype='bfloat16', loss_scale=dict(enabled=False)), 'reduce-overhead'),
    ],
)
def test_nothing_waits_on_a_gpu(tmp_path, wrapper, compile):
    """PyTorch raises in the step that waits."""
    runner = train(tmp_path, wrapper, watch=6, compile=compile)
    optimizer = runner.optim_wrapper.optimizer
    assert all(group['fused'] for group in optimizer.param_groups)
    logged = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(logged) == 12 and all(value > 0 for value in logged)
    for parameter in runner.model.parameters():
        assert parameter.isfinite().all()


@pytest.mark.gpu
def test_a_step_that_overflows_in_fp16_is_left_out(tmp_path):
    runner = train(tmp_path, dict(AMP, dtype='float16', loss_scale=dict(init_scale=2.0**60)))
    wrapper = runner.optim_wrapper
    assert wrapper.loss_scaler.get_scale() < 2.0**60
    for parameter in runner.model.parameters():
        assert parameter.isfinite().all()


@pytest.mark.parametrize('count', [1, 3])
def test_weights_averages_and_logs_are_mmengines(tmp_path, count, monkeypatch):
    train(tmp_path / 'ours', dict(accumulative_counts=count), epochs=2)
    monkeypatch.setattr(
        CheckedRunner,
        'build_message_hub',
        lambda self, message_hub=None: MessageHub.get_instance(self._experiment_name),
    )
    theirs = train(
        tmp_path / 'theirs',
        dict(accumulative_counts=count, type='OptimWrapper'),
        'ExponentialMovingAverage',
        epochs=2,
    )
    assert type(theirs.message_hub) is MessageHub
    saved = [load_checkpoint_file(tmp_path / name / 'epoch_2.pth') for name in ('ours', 'theirs')]
    for part in ('state_dict', 'ema_state_dict'):
        assert saved[0][part].keys() == saved[1][part].keys()
        for key, value in saved[0][part].items():
            assert torch.equal(value, saved[1][part][key]), f'{part}.{key}'
    logs = [checkpoint['message_hub']['log_scalars'] for checkpoint in saved]
    assert logs[0].keys() == logs[1].keys() >= {'train/loss', 'train/grad_norm', 'train/accuracy'}
    for key in logs[0].keys() - {'train/time', 'train/data_time'}:
        for mine, other in zip(logs[0][key].data, logs[1][key].data):
            assert mine.tolist() == other.tolist() and len(mine) == 24 // (
                count if 'norm' in key else 1
            ), key


def test_a_resumed_run_goes_on_with_values_that_waited(tmp_path):
    train(tmp_path / 'parts')
    parts = train(tmp_path / 'parts', resume=True, epochs=2)
    whole = train(tmp_path / 'whole', epochs=2)
    for key in ('train/loss', 'train/grad_norm', 'train/lr'):
        ours, theirs = (runner.message_hub.get_scalar(key).data[0] for runner in (parts, whole))
        assert ours.tolist()[:12] == theirs.tolist()[:12] and len(ours) == len(theirs) == 24


# The hub


def hubs():
    """Ours and mmengine's."""
    name = os.urandom(4).hex()
    return DeferredMessageHub.get_instance(f'ours{name}'), MessageHub(f'theirs{name}')


def test_the_hub_is_found_by_the_libraries():
    hub, _ = hubs()
    assert MessageHub.get_current_instance() is hub


def test_values_are_those_of_the_plain_hub():
    values = [
        torch.tensor(1.25),
        torch.tensor([2.0], dtype=torch.float64),
        3,
        4.5,
        torch.tensor(5),
        torch.tensor(6.1, dtype=torch.bfloat16),
    ]
    ours, theirs = hubs()
    for hub in (ours, theirs):
        for index, value in enumerate(values):
            hub.update_scalar('train/a', value, count=index + 1)
            hub.update_scalar('train/b', value, resumed=False)
            if index == 2:
                assert hub.get_scalar('train/a').current() == 3
    for key in ('train/a', 'train/b'):
        for mine, other in zip(ours.log_scalars[key].data, theirs.log_scalars[key].data):
            assert mine.tolist() == other.tolist()
    assert ours.log_scalars['train/a'].mean(4) == theirs.log_scalars['train/a'].mean(4)
    assert ours.state_dict()['log_scalars'].keys() == {'train/a'}


def test_a_value_is_that_of_its_step():
    """Where a CUDA graph writes a loss, the next replay writes another one."""
    hub, _ = hubs()
    loss = torch.zeros(())
    for step in range(3):
        hub.update_scalar('train/loss', loss.fill_(step))
    assert hub.get_scalar('train/loss').data[0].tolist() == [0.0, 1.0, 2.0]


def test_only_the_value_that_is_read_is_fetched():
    hub, _ = hubs()
    hub.update_scalar('train/time', 1.0)
    hub.update_scalar('train/loss', torch.tensor(2.0))
    found = []
    with watched(found):
        assert hub.get_scalar('train/time').current() == 1.0
    assert not found
    with watched(found):
        assert hub.log_scalars['train/loss'].current() == 2.0
    assert found


def test_what_is_not_logged_or_no_scalar_is_named():
    hub, _ = hubs()
    hub.update_scalar('train/loss', torch.tensor(2.0))
    with pytest.raises(KeyError, match="nothing is logged as 'train/los'; .*train/loss"):
        hub.get_scalar('train/los')
    with pytest.raises(AssertionError, match='train/x has 2 elements'):
        hub.update_scalar('train/x', torch.zeros(2))


def test_values_do_not_pile_up(monkeypatch):
    monkeypatch.setattr('groupmamba_mm.engine.message_hub._MAX_PENDING', 4)
    hub, _ = hubs()
    for step in range(9):
        hub.update_scalar('train/loss', torch.tensor(float(step)))
        assert hub._num_pending < 4
    hub.log_scalars['train/loss'].max_length = 5
    hub.update_scalar('train/loss', 9.0)
    assert hub.get_scalar('train/loss').data[0].tolist() == [5.0, 6.0, 7.0, 8.0, 9.0]


# The moving average


def small_model():
    torch.manual_seed(0)
    return GroupMamba(arch=SMALL['official'])  # has BatchNorms


def move(model):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(
                torch.ones_like(tensor) if tensor.dtype == torch.long else torch.randn_like(tensor)
            )


@pytest.mark.parametrize('options', [dict(), dict(update_buffers=True), dict(interval=2)])
def test_the_average_is_mmengines_bit_by_bit(options):
    model = small_model()
    ours = ForeachExponentialMovingAverage(model, momentum=0.1, **options)
    theirs = ExponentialMovingAverage(model, momentum=0.1, **options)
    for step in range(5):
        move(model)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        if step == 2:  # a checkpoint
            ours.load_state_dict({key: value.clone() for key, value in ours.state_dict().items()})
        for (key, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values()):
            assert torch.equal(mine, other), f'{key} after step {step}'


def test_parameters_that_are_replaced_are_noticed():
    model = nn.Linear(2, 2)
    average = ForeachExponentialMovingAverage(model, momentum=0.5)
    average.update_parameters(model)
    before = average.module.weight.clone()
    model.weight = nn.Parameter(torch.ones(2, 2))
    average.update_parameters(model)
    torch.testing.assert_close(average.module.weight, (before + 1) / 2)
    assert set(average.state_dict()) == {'steps', 'module.weight', 'module.bias'}


def test_shared_weights_are_moved_once():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    average = ForeachExponentialMovingAverage(model, momentum=0.5, update_buffers=True)
    average.update_parameters(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    expected = model[0].weight - 0.5
    average.update_parameters(model)
    torch.testing.assert_close(average.module[0].weight, expected)


# The bound of the run-ahead


def test_the_host_waits_for_the_step_that_is_too_far_behind(monkeypatch):
    events = []

    class Event:
        def __init__(self, blocking):
            events.append(self)

        def record(self):
            self.state = 'recorded'

        def synchronize(self):
            self.state = 'waited for'

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    hook = RunAheadHook(max_steps=2)
    for index in range(5):
        hook.after_train_iter(None, index)
    assert [event.state for event in events] == ['waited for'] * 3 + ['recorded'] * 2


def test_the_data_are_copied_without_waiting(tmp_path):
    runner = train(tmp_path)
    assert any(isinstance(hook, RunAheadHook) for hook in runner.hooks)
    assert runner.model.data_preprocessor._non_blocking
    with pytest.raises(ValueError, match='max_steps must be 1 or more, got 0'):
        RunAheadHook(0)
