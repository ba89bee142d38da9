"""The runner: what it loads, refuses and resumes, and how it runs without GPUs."""
import logging
import os
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel, BaseTTAModel
from mmengine.registry import MODELS, RUNNERS
from torch import nn

from groupmamba_mm.checkpoint import CheckpointError, ExpectedKeys, load_checkpoint_file
from groupmamba_mm.engine import CheckedRunner
from groupmamba_mm.engine import runner as runner_module
from groupmamba_mm.engine.runner import (init_cpu_processes, processes_on_this_machine,
                                         require_enough_gpus, without_amp)
from groupmamba_mm.errors import ConfigError, LaunchError


class Backbone(nn.Linear):

    def expected_unused_keys(self):
        return (ExpectedKeys(r'^norm4\.', 'norm of the class token'),)


@MODELS.register_module()
class RunnerTestModel(BaseModel):

    def __init__(self, classes=2, width=20, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.backbone = Backbone(2, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs, mode='tensor'):
        output = self.head(self.norm(self.backbone(torch.stack(inputs))))
        return dict(loss=output.square().mean()) if mode == 'loss' else output


@MODELS.register_module()
class RunnerTestTTA(BaseTTAModel):

    def merge_preds(self, data_samples_list):
        return data_samples_list


class Points(torch.utils.data.Dataset):

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=torch.tensor([index / 8, 1.0]))


def build(work_dir, model=None, epochs=1, ema=None, **options):
    loader = dict(batch_size=4, num_workers=0, dataset=Points(),
                  sampler=dict(type='DefaultSampler', shuffle=False))
    options.setdefault('optim_wrapper', dict(optimizer=dict(type='AdamW', lr=0.1)))
    return CheckedRunner(
        dict(type='RunnerTestModel', **(model or {})), str(work_dir), train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        param_scheduler=dict(type='StepLR', step_size=1, gamma=0.5, end=9),
        custom_hooks=[dict(type=ema, momentum=0.5)] if ema else None, randomness=dict(seed=0),
        experiment_name=f'runner{os.urandom(4).hex()}', log_level='INFO', **options)


def log_of(runner):
    return ''.join(file.read_text() for file in Path(runner.log_dir).glob('*.log'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('work')
    build(work_dir, ema='EMAHook').train()
    return work_dir / 'epoch_1.pth'


def test_it_is_registered():
    assert RUNNERS.get('CheckedRunner') is CheckedRunner


def test_loading_by_hand_needs_every_tensor(trained, tmp_path):
    runner = build(tmp_path, model=dict(classes=3))
    before = runner.model.head.weight.clone()
    with pytest.raises(CheckpointError, match=r'head\.weight \(2x20.*3x20 in the model'):
        runner.load_checkpoint(str(trained))
    assert torch.equal(runner.model.head.weight, before)

    fitting = build(tmp_path)
    fitting.load_checkpoint(str(trained))
    saved = load_checkpoint_file(trained)['state_dict']
    assert torch.equal(fitting.model.head.weight, saved['head.weight'])


def test_training_may_start_from_most_of_a_model(trained, tmp_path):
    # 2 of 144 elements are another head's here.
    weights = dict(load_checkpoint_file(trained)['state_dict'])
    weights['head.bias'] = torch.ones(7)
    torch.save(dict(state_dict=weights), tmp_path / 'other_head.pth')
    runner = build(tmp_path, load_from=str(tmp_path / 'other_head.pth'))
    runner.train()
    assert runner.epoch == 1

    # with the old average beside them, and an average of the new training
    for hook in ('mmengine.EMAHook', 'mmpretrain.EMAHook'):
        whole = load_checkpoint_file(trained)
        for part, key in (('state_dict', 'head.bias'), ('ema_state_dict', 'module.head.bias')):
            whole[part][key] = torch.ones(7)
        torch.save(whole, tmp_path / 'other_head_ema.pth')
        runner = build(tmp_path, load_from=str(tmp_path / 'other_head_ema.pth'), epochs=0,
                       ema=hook)
        runner.train()
        average = next(hook for hook in runner.hooks if hasattr(hook, 'ema_model')).ema_model
        for model in (runner.model, average.module):
            assert torch.equal(model.backbone.weight, weights['backbone.weight'])
            assert model.head.bias.shape == (2, )

    small = {key: value for key, value in weights.items() if key.startswith('backbone.')}
    torch.save(dict(state_dict=small), tmp_path / 'backbone.pth')
    runner = build(tmp_path, load_from=str(tmp_path / 'backbone.pth'))
    with pytest.raises(CheckpointError, match='80% must match'):
        runner.train()


def test_resuming_restores_everything(trained, tmp_path):
    (tmp_path / 'last_checkpoint').write_text(str(trained))
    resumed = build(tmp_path, epochs=2, ema='EMAHook', resume=True)
    resumed.train()
    whole = build(tmp_path / 'whole', epochs=2, ema='EMAHook')
    whole.train()
    assert (resumed.epoch, resumed.iter) == (2, 4)
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[key], value, msg=key)
    saved, expected = (load_checkpoint_file(folder / 'epoch_2.pth')
                       for folder in (tmp_path, tmp_path / 'whole'))
    for key, value in expected['ema_state_dict'].items():
        torch.testing.assert_close(saved['ema_state_dict'][key], value, msg=key)
    assert saved['optimizer']['param_groups'][0]['lr'] == expected['optimizer']['param_groups'][0][
        'lr']
    assert len(saved['message_hub']['log_scalars']['train/loss'].data[0]) == 4


def test_resuming_refuses_another_model_and_bare_weights(trained, tmp_path):
    runner = build(tmp_path, model=dict(classes=3), epochs=2, resume=True, load_from=str(trained))
    with pytest.raises(CheckpointError, match='100% must match'):
        runner.train()
    weights = load_checkpoint_file(trained)['state_dict']
    torch.save(dict(state_dict=weights), tmp_path / 'weights.pth')
    runner = build(tmp_path, epochs=2, resume=True, load_from=str(tmp_path / 'weights.pth'))
    with pytest.raises(CheckpointError, match='weights only'):
        runner.train()


def test_resuming_without_a_checkpoint_is_said(tmp_path):
    runner = build(tmp_path, resume=True)
    runner.train()
    assert 'training starts from the beginning' in log_of(runner)


def test_announced_keys_are_reported_as_such(trained, tmp_path):
    weights = dict(load_checkpoint_file(trained)['state_dict'])
    weights['backbone.norm4.weight'] = torch.ones(3)
    weights['teacher.weight'] = torch.ones(3)
    # Wrapped models are saved with this prefix by other tools.
    torch.save({f'module.{key}': value for key, value in weights.items()}, tmp_path / 'bare.pth')
    runner = build(tmp_path)
    runner.load_checkpoint(str(tmp_path / 'bare.pth'))
    log = log_of(runner)
    assert '1 unused as expected (norm of the class token)' in log
    assert '1 are not in the model: teacher.weight' in log


def test_a_model_for_test_time_augmentation_is_filled(trained, tmp_path):
    runner = build(tmp_path)
    runner.model = RunnerTestTTA(module=dict(type='RunnerTestModel'))
    runner.load_checkpoint(str(trained))
    saved = load_checkpoint_file(trained)['state_dict']
    assert torch.equal(runner.model.module.head.weight, saved['head.weight'])


@pytest.mark.parametrize('kind', ['OptimWrapper', 'SyncFreeOptimWrapper'])
def test_mixed_precision_becomes_fp32_on_a_cpu_and_is_said(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(runner_module, 'get_device', lambda: 'cpu')
    runner = build(tmp_path, optim_wrapper=dict(
        type=kind.replace('Optim', 'AmpOptim'), dtype='bfloat16', loss_scale=dict(enabled=False),
        clip_grad=dict(max_norm=1), optimizer=dict(type='AdamW', lr=0.1)))
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    assert type(wrapper).__name__ == kind and wrapper.clip_grad_kwargs
    assert log_of(runner).count('No GPU: training in fp32') == 1


@pytest.mark.parametrize('mode, count, refused', [
    ('reduce-overhead', 2, True), ('max-autotune', 4, True), ('reduce-overhead', 1, False),
    ('default', 2, False), (None, 2, False)])
def test_gradients_are_not_added_up_over_cuda_graphs(tmp_path, mode, count, refused):
    runner = build(tmp_path, optim_wrapper=dict(accumulative_counts=count,
                                                optimizer=dict(type='AdamW', lr=0.1)))
    runner.model.head.compile_mode = mode
    if refused:
        with pytest.raises(ConfigError, match=f"compile_mode='{mode}' .*accumulative_counts={count}"
                           ".* take compile_mode='default'"):
            runner.build_optim_wrapper(runner.optim_wrapper)
    else:
        assert runner.build_optim_wrapper(runner.optim_wrapper) is not None


def test_another_optimizer_wrapper_is_left_alone():
    wrapper = Config(dict(type='OptimWrapper', optimizer=dict(type='SGD')))
    assert without_amp(wrapper, logging.getLogger()) is wrapper


@pytest.mark.parametrize('launcher, variables, expected', [
    ('pytorch', dict(LOCAL_WORLD_SIZE='4'), 4),
    ('slurm', dict(SLURM_NTASKS_PER_NODE='8', SLURM_TASKS_PER_NODE='2'), 8),
    ('slurm', dict(SLURM_TASKS_PER_NODE='4(x2),1'), 4),
    ('mpi', dict(OMPI_COMM_WORLD_LOCAL_SIZE='3'), 3),
    ('mpi', {}, 1),
])
def test_processes_are_counted(monkeypatch, launcher, variables, expected):
    for name in ('LOCAL_WORLD_SIZE', 'SLURM_NTASKS_PER_NODE', 'SLURM_TASKS_PER_NODE',
                 'OMPI_COMM_WORLD_LOCAL_SIZE'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes_on_this_machine(launcher) == expected


@pytest.mark.parametrize('gpus, refused', [(0, False), (1, True), (2, False), (3, False)])
def test_more_processes_than_gpus_are_refused(monkeypatch, gpus, refused):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    if refused:
        with pytest.raises(LaunchError, match='2 processes .* 1 GPU.*CUDA_VISIBLE_DEVICES'):
            require_enough_gpus('pytorch')
    else:
        require_enough_gpus('pytorch')


def test_a_launcher_that_started_nothing_is_told(monkeypatch):
    monkeypatch.delenv('SLURM_PROCID', raising=False)
    with pytest.raises(LaunchError, match='SLURM_PROCID.*slurm_train.sh'):
        init_cpu_processes('slurm')


def test_what_the_package_logs_is_in_the_log_of_the_run(tmp_path):
    package_logger = logging.getLogger('groupmamba_mm')
    handlers, level = list(package_logger.handlers), package_logger.level
    try:
        for name in ('first', 'second'):
            build(tmp_path / name)
            package_logger.info(f'said in the {name} run')
        first, second = (next((tmp_path / name).glob('*/*.log')).read_text()
                         for name in ('first', 'second'))
    finally:
        package_logger.handlers[:] = handlers
        package_logger.setLevel(level)
    assert 'groupmamba_mm - INFO - said in the first run' in first
    assert 'said in the second run' in second and 'said in the second run' not in first


def grouped(work_dir, merged, **options):
    return build(work_dir, optim_wrapper=dict(
        constructor=f"{'Merged' if merged else 'Default'}OptimWrapperConstructor",
        optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.05),
        paramwise_cfg=dict(bias_decay_mult=0., custom_keys={'head': dict(lr_mult=0.1)})), **options)


def test_rates_are_scheduled_logged_and_resumed(tmp_path):
    runner = grouped(tmp_path, merged=True)
    runner.train()
    # weights and biases of backbone and norm, the head
    groups = runner.optim_wrapper.optimizer.param_groups
    assert [len(group['params']) for group in groups] == [2, 2, 2]
    assert runner.optim_wrapper.get_lr()['lr'] == pytest.approx([5e-3, 5e-3, 5e-4])
    scalars = runner.message_hub.log_scalars
    assert scalars['train/lr'].data[0][0] == pytest.approx(1e-2)
    resumed = grouped(tmp_path, merged=True, epochs=2, resume=True)
    resumed.train()
    whole = grouped(tmp_path / 'whole', merged=True, epochs=2)
    whole.train()
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters()):
        torch.testing.assert_close(ours, theirs)
    assert 'resumed epoch: 1' in log_of(resumed)


@pytest.mark.parametrize('merged,found,name', [
    (True, '6 groups .* this run has 3', 'DefaultOptimWrapperConstructor'),
    (False, '3 groups .* this run has 6', 'MergedOptimWrapperConstructor')])
def test_resuming_with_other_groups_names_the_option(tmp_path, merged, found, name):
    grouped(tmp_path, merged=not merged).train()
    runner = grouped(tmp_path, merged=merged, epochs=2, resume=True)
    with pytest.raises(CheckpointError, match=f'{found}.*optim_wrapper.constructor={name}'):
        runner.train()
    grouped(tmp_path, merged=not merged, epochs=2, resume=True).train()
