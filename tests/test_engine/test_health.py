"""Losses and gradients that are not finite."""

import re
from types import SimpleNamespace

import mmdet.structures
import mmdet.structures.bbox
import mmdet.structures.mask
import mmpretrain.structures
import mmseg.structures
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.structures import InstanceData, PixelData
from torch import nn

from groupmamba_mm.checkpoint import CheckpointError, load_checkpoint_file
from groupmamba_mm.engine import HealthHook, health
from groupmamba_mm.engine.health import NonFiniteError, first_nonfinite
from groupmamba_mm.engine.reproductions import replay_step, structure_types
from groupmamba_mm.errors import ConfigError
from tests.conftest import RunsCode
from tests.small_training import SmallModel, build, log_of


class Breaks(nn.Module):
    """Passes its input on, and makes one value of it or of its gradient not finite at some steps."""

    def __init__(self, steps, where, value):
        super().__init__()
        self.steps, self.where, self.value, self.count = steps, where, value, 0

    def forward(self, x):
        self.count += 1
        if self.count not in self.steps:
            return x
        factor = torch.ones_like(x)
        factor[0, 0] = self.value
        if self.where == 'output':
            return x * factor
        x = x.clone()
        x.register_hook(lambda gradient: gradient * factor)
        return x.clone()


@MODELS.register_module()
class BreakingModel(SmallModel):
    def __init__(self, steps=(), where='output', value=float('nan'), **kwargs):
        super().__init__(**kwargs)
        self.breaks = Breaks(steps, where, value)
        self.backbone = nn.Sequential(self.backbone, self.breaks)


def breaking(work_dir, steps, where='output', value=float('nan'), policy='stop', **options):
    return build(
        work_dir,
        model=dict(type='BreakingModel', steps=steps, where=where, value=value),
        health=dict(policy=policy),
        **options,
    )


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize(
    'where, named',
    [
        ('output', r'the output of backbone\.1 \(Breaks\) is the first'),
        ('gradient', r'the gradient by the output of backbone\.0 \(Backbone\) is the first'),
    ],
)
def test_the_first_module_is_named_and_nothing_is_spoilt(tmp_path, where, value, named):
    # the third step, and its repetition
    runner = breaking(tmp_path, (3, 4), where, value, epochs=3)
    with pytest.raises(
        NonFiniteError, match=f'iteration 3 is not finite: {named}.* 1 of 80 values'
    ):
        runner.train()
    assert all(parameter.isfinite().all() for parameter in runner.model.parameters())
    assert sorted(file.name for file in tmp_path.glob('*.pth')) == [
        'epoch_1.pth',
        'nonfinite_iter_3_process_0.pth',
    ]
    saved = load_checkpoint_file(tmp_path / 'epoch_1.pth')['state_dict']
    for name, parameter in runner.model.named_parameters():
        assert torch.equal(parameter, saved[name]), name


def test_a_saved_step_can_be_replayed(tmp_path):
    with pytest.raises(NonFiniteError):
        breaking(tmp_path, (2, 3), epochs=1).train()
    cfg = Config(
        dict(
            model=dict(type='BreakingModel', steps=(1,)),
            default_scope='mmengine',
            optim_wrapper=dict(type='AmpOptimWrapper', optimizer=dict(type='SGD', lr=1)),
        )
    )
    found = replay_step(cfg, tmp_path / 'nonfinite_iter_2_process_0.pth')
    assert found.startswith('the output of backbone.1 (Breaks) is the first')
    cfg.model.steps = ()
    assert replay_step(cfg, tmp_path / 'nonfinite_iter_2_process_0.pth') is None
    build(tmp_path).train()
    with pytest.raises(CheckpointError, match='is no saved step'):
        replay_step(cfg, tmp_path / 'epoch_1.pth')


@pytest.mark.parametrize(
    'sample',
    [
        lambda: mmpretrain.structures.DataSample().set_gt_label(3),
        lambda: mmdet.structures.DetDataSample(
            gt_instances=InstanceData(
                bboxes=mmdet.structures.bbox.HorizontalBoxes(torch.rand(2, 4)),
                labels=torch.tensor([1, 2]),
                masks=mmdet.structures.mask.BitmapMasks(np.ones((2, 4, 4), np.uint8), 4, 4),
            ),
            metainfo=dict(img_shape=(4, 4), scale_factor=np.ones(2)),
        ),
        lambda: mmseg.structures.SegDataSample(gt_sem_seg=PixelData(data=torch.ones(1, 4, 4))),
    ],
)
def test_the_batches_of_the_libraries_are_read_without_running_code(tmp_path, sample):
    batch = dict(inputs=[torch.rand(3, 4, 4)], data_samples=[sample()])
    torch.save(dict(state_dict=dict(a=torch.ones(1)), batch=batch), tmp_path / 'step.pth')
    read = load_checkpoint_file(tmp_path / 'step.pth', also_safe=structure_types())['batch']
    texts = [
        sorted(re.sub(' at 0x.*', '', str(part['data_samples'][0])).split())
        for part in (read, batch)
    ]  # the order of fields is a set's
    assert texts[0] == texts[1]
    torch.save(
        dict(state_dict=dict(a=torch.ones(1)), batch=RunsCode(tmp_path / 'ran')),
        tmp_path / 'step.pth',
    )
    with pytest.raises(CheckpointError, match='could run code'):
        load_checkpoint_file(tmp_path / 'step.pth', also_safe=structure_types())
    assert not (tmp_path / 'ran').exists()


def test_a_learning_rate_that_is_too_high_ends_the_training(tmp_path):
    runner = build(
        tmp_path, epochs=50, val=True, optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e6))
    )
    with pytest.raises(NonFiniteError, match='is not finite: .*Lower the learning rate'):
        runner.train()
    for file in tmp_path.glob('[eb]*.pth'):
        assert all(
            value.isfinite().all()
            for name, value in load_checkpoint_file(file)['state_dict'].items()
        )


@pytest.mark.parametrize('fused', [False, True])  # fused: the kernel leaves the update out
@pytest.mark.parametrize('where', ['output', 'gradient'])
def test_a_step_can_be_skipped(tmp_path, where, fused):
    runner = breaking(
        tmp_path,
        (2,),
        where,
        policy='skip',
        epochs=2,
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1, fused=fused)),
    )
    before = {}
    original = HealthHook.before_train_iter

    def remember(self, runner, batch_idx, data_batch=None):
        original(self, runner, batch_idx, data_batch)
        if runner.iter in (1, 2):
            before[runner.iter] = {
                key: value.clone()
                for key, value in runner.model.state_dict().items()
                if value.is_floating_point()
            }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HealthHook, 'before_train_iter', remember)
        runner.train()
    assert 'iteration 2 was not finite: its update was left out (1 of' in log_of(runner)
    for key, value in before[1].items():
        same = torch.equal(value, before[2][key])
        assert same or (where == 'gradient' and 'running' in key and value.isfinite().all()), key
    assert all(value.isfinite().all() for value in runner.model.state_dict().values())


def test_a_training_can_be_rolled_back(tmp_path):
    # the fourth forward pass is broken, not the fourth step when it is tried again
    runner = breaking(tmp_path, (4,), policy='roll_back', epochs=3, ema='EMAHook')
    runner.train()
    assert 'going back to' in log_of(runner) and 'epoch_1.pth' in log_of(runner)
    left_out = build(
        tmp_path / 'other', epochs=3, ema='EMAHook', model=dict(type='BreakingModel', steps=())
    )
    next(hook for hook in left_out.hooks if isinstance(hook, HealthHook)).left_out.add(3)
    left_out.train()
    saved, expected = (
        load_checkpoint_file(folder / 'epoch_3.pth') for folder in (tmp_path, tmp_path / 'other')
    )
    for part in ('state_dict', 'ema_state_dict'):
        for key, value in expected[part].items():
            assert torch.equal(saved[part][key], value), key
    assert saved['meta']['iter'] == 6


def test_skipping_has_an_end(tmp_path):
    runner = breaking(tmp_path, range(2, 99), policy='skip', epochs=30)
    with pytest.raises(NonFiniteError, match='and 20 such steps were left out before'):
        runner.train()


def test_nothing_to_roll_back_to_is_said(tmp_path):
    with pytest.raises(NonFiniteError, match='no checkpoint in .* to roll back to'):
        breaking(tmp_path, (1, 2), policy='roll_back').train()


def test_weights_and_data_are_named(tmp_path):
    runner = build(tmp_path)
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    batch = dict(inputs=[torch.rand(2) for _ in range(4)])
    assert first_nonfinite(runner.model, wrapper, batch, 0, 0, 0) is None
    batch['inputs'][2][1] = float('inf')
    assert first_nonfinite(runner.model, wrapper, batch, 0, 0, 0) == (
        "its batch holds 1 of 2 values infinite, float32 in batch['inputs'][2]"
    )
    batch['inputs'][2][1] = 0
    with torch.no_grad():
        runner.model.head.weight[0, 3] = float('nan')
    assert first_nonfinite(runner.model, wrapper, batch, 0, 0, 0) == (
        'the weights before it hold 1 of 40 values NaN, float32 in head.weight'
    )


def test_a_loss_scale_that_collapses_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(health, '_LOSS_SCALE_INTERVAL', 3)
    original = HealthHook.before_train

    def before_train(self, runner):
        original(self, runner)
        self._scaler = SimpleNamespace(get_scale=lambda: 2.0 ** (-4 * runner.iter))

    monkeypatch.setattr(HealthHook, 'before_train', before_train)
    with pytest.raises(
        NonFiniteError, match='iteration 6 .*loss scale has fallen to 9.5.*e-07, .*bf16'
    ):
        build(tmp_path, epochs=9).train()


def test_another_policy_is_refused():
    with pytest.raises(ConfigError, match="policy must be one of .*'ignore'"):
        HealthHook('ignore')
