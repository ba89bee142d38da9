"""The runner: what it loads, refuses and resumes, and how it runs without GPUs."""

import errno
import gc
import importlib.util
import logging
import math
import os
import shutil
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import mmengine.logging
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS, VISBACKENDS, VISUALIZERS
from torch.utils.data import DataLoader

from groupmamba_mm.checkpoint import CheckpointError, load_checkpoint_file
from groupmamba_mm.engine import CheckedRunner
from groupmamba_mm.engine import runner as runner_module
from groupmamba_mm.engine.run_log import quiet_debug_prints, quiet_warnings
from groupmamba_mm.engine.runner import (
    init_cpu_processes,
    processes_on_this_machine,
    require_enough_gpus,
    without_amp,
)
from groupmamba_mm.engine.tracking import TRACKERS, track_with
from groupmamba_mm.errors import ConfigError, LaunchError
from groupmamba_mm.version import __version__
from tests.small_training import EpochMetric, Interrupted, SmallTTA, build, log_of


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
        runner = build(tmp_path, load_from=str(tmp_path / 'other_head_ema.pth'), epochs=0, ema=hook)
        runner.train()
        average = next(hook for hook in runner.hooks if hasattr(hook, 'ema_model')).ema_model
        for model in (runner.model, average.module):
            assert torch.equal(model.backbone.weight, weights['backbone.weight'])
            assert model.head.bias.shape == (2,)

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
    saved, expected = (
        load_checkpoint_file(folder / 'epoch_2.pth') for folder in (tmp_path, tmp_path / 'whole')
    )
    for key, value in expected['ema_state_dict'].items():
        torch.testing.assert_close(saved['ema_state_dict'][key], value, msg=key)
    assert (
        saved['optimizer']['param_groups'][0]['lr']
        == expected['optimizer']['param_groups'][0]['lr']
    )
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
    runner.model = SmallTTA(module=dict(type='SmallModel'))
    runner.load_checkpoint(str(trained))
    saved = load_checkpoint_file(trained)['state_dict']
    assert torch.equal(runner.model.module.head.weight, saved['head.weight'])


@pytest.mark.parametrize('kind', ['OptimWrapper', 'SyncFreeOptimWrapper'])
def test_mixed_precision_becomes_fp32_on_a_cpu_and_is_said(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(runner_module, 'get_device', lambda: 'cpu')
    runner = build(
        tmp_path,
        optim_wrapper=dict(
            type=kind.replace('Optim', 'AmpOptim'),
            dtype='bfloat16',
            loss_scale=dict(enabled=False),
            clip_grad=dict(max_norm=1),
            optimizer=dict(type='AdamW', lr=0.1),
        ),
    )
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    assert type(wrapper).__name__ == kind and wrapper.clip_grad_kwargs
    assert log_of(runner).count('No GPU: training in fp32') == 1


@pytest.mark.parametrize(
    'mode, count, refused',
    [
        ('reduce-overhead', 2, True),
        ('max-autotune', 4, True),
        ('reduce-overhead', 1, False),
        ('default', 2, False),
        (None, 2, False),
    ],
)
def test_gradients_are_not_added_up_over_cuda_graphs(tmp_path, mode, count, refused):
    runner = build(
        tmp_path,
        optim_wrapper=dict(accumulative_counts=count, optimizer=dict(type='AdamW', lr=0.1)),
    )
    runner.model.head.compile_mode = mode
    if refused:
        with pytest.raises(
            ConfigError,
            match=f"compile_mode='{mode}' .*accumulative_counts={count}"
            ".* take compile_mode='default'",
        ):
            runner.build_optim_wrapper(runner.optim_wrapper)
    else:
        assert runner.build_optim_wrapper(runner.optim_wrapper) is not None


def test_another_optimizer_wrapper_is_left_alone():
    wrapper = Config(dict(type='OptimWrapper', optimizer=dict(type='SGD')))
    assert without_amp(wrapper, logging.getLogger()) is wrapper


@pytest.mark.parametrize(
    'launcher, variables, expected',
    [
        ('pytorch', dict(LOCAL_WORLD_SIZE='4'), 4),
        ('slurm', dict(SLURM_NTASKS_PER_NODE='8', SLURM_TASKS_PER_NODE='2'), 8),
        ('slurm', dict(SLURM_TASKS_PER_NODE='4(x2),1'), 4),
        ('mpi', dict(OMPI_COMM_WORLD_LOCAL_SIZE='3'), 3),
        ('mpi', {}, 1),
    ],
)
def test_processes_are_counted(monkeypatch, launcher, variables, expected):
    for name in (
        'LOCAL_WORLD_SIZE',
        'SLURM_NTASKS_PER_NODE',
        'SLURM_TASKS_PER_NODE',
        'OMPI_COMM_WORLD_LOCAL_SIZE',
    ):
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
        first, second = (
            next((tmp_path / name).glob('*/*.log')).read_text() for name in ('first', 'second')
        )
    finally:
        package_logger.handlers[:] = handlers
        package_logger.setLevel(level)
    assert 'groupmamba_mm - INFO - said in the first run' in first
    assert 'said in the second run' in second and 'said in the second run' not in first


def grouped(work_dir, merged, **options):
    return build(
        work_dir,
        optim_wrapper=dict(
            constructor=f'{"Merged" if merged else "Default"}OptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.05),
            paramwise_cfg=dict(bias_decay_mult=0.0, custom_keys={'head': dict(lr_mult=0.1)}),
        ),
        **options,
    )


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


@pytest.mark.parametrize(
    'merged,found,name',
    [
        (True, '6 groups .* this run has 3', 'DefaultOptimWrapperConstructor'),
        (False, '3 groups .* this run has 6', 'MergedOptimWrapperConstructor'),
    ],
)
def test_resuming_with_other_groups_names_the_option(tmp_path, merged, found, name):
    grouped(tmp_path, merged=not merged).train()
    runner = grouped(tmp_path, merged=merged, epochs=2, resume=True)
    with pytest.raises(CheckpointError, match=f'{found}.*optim_wrapper.constructor={name}'):
        runner.train()
    grouped(tmp_path, merged=not merged, epochs=2, resume=True).train()


def test_a_damaged_checkpoint_is_named_and_an_older_whole_one_is_taken(tmp_path):
    build(tmp_path, epochs=3).train()
    newest = tmp_path / 'epoch_3.pth'
    whole = newest.read_bytes()

    def resumed_from():
        runner = build(tmp_path, epochs=4, resume=True)
        runner._train_loop = runner.build_train_loop(runner._train_loop)
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
        runner.load_or_resume()
        return runner.epoch, log_of(runner)

    assert resumed_from()[0] == 3
    with zipfile.ZipFile(newest) as archive:
        weights = max(archive.infolist(), key=lambda part: part.file_size)
        offset = weights.header_offset + len(weights.FileHeader()) + weights.file_size // 2
    flipped = bytearray(whole)
    flipped[offset] ^= 4
    for damaged in (whole[: len(whole) // 2], whole[:100], b'', bytes(flipped)):
        newest.write_bytes(damaged)
        epoch, log = resumed_from()
        assert epoch == 2 and 'epoch_3.pth is' in log and 'skipped' in log
    newest.with_name('epoch_2.pth').write_bytes(whole[:-20])
    newest.with_name('epoch_1.pth').write_bytes(b'')
    with pytest.raises(CheckpointError, match='no checkpoint in .* is whole .*epoch_1.*epoch_2'):
        resumed_from()


def test_a_moved_run_goes_on_with_its_own_files(tmp_path):
    build(tmp_path / 'old', epochs=2, val=True).train()
    best = next((tmp_path / 'old').glob('best_*.pth'))
    shutil.copytree(tmp_path / 'old', tmp_path / 'copy')
    before = {file: file.read_bytes() for file in (tmp_path / 'old').glob('*.pth')}
    runner = build(tmp_path / 'copy', epochs=4, val=True, resume=True)
    runner.train()
    assert f'Load checkpoint from {tmp_path / "copy" / "epoch_2.pth"}' in log_of(runner)
    # the value rises with every epoch, so the copy's best is a newer one and the old is untouched
    assert [file.name for file in (tmp_path / 'copy').glob('best_*.pth')] == [
        best.name.replace('_2', '_4')
    ]
    assert {file: file.read_bytes() for file in (tmp_path / 'old').glob('*.pth')} == before


def test_a_finished_run_says_so(tmp_path):
    build(tmp_path, epochs=2).train()
    before = load_checkpoint_file(tmp_path / 'epoch_2.pth')
    runner = build(tmp_path, epochs=2, resume=True)
    runner.train()
    assert 'this training is finished: 2 of 2 epochs are done' in log_of(runner)
    for key, value in before['state_dict'].items():
        assert torch.equal(runner.model.state_dict()[key], value)


def test_what_becomes_of_the_schedule_is_said(tmp_path):
    cosine = dict(
        type='CosineAnnealingLR', by_epoch=True, end=2, T_max=2, convert_to_iter_based=True
    )
    build(tmp_path, epochs=2, scheduler=cosine).train()
    runner = build(tmp_path, epochs=3, scheduler=dict(cosine, end=3, T_max=3), resume=True)
    runner.train()
    log = log_of(runner)
    assert 'the schedule of the checkpoint is kept' in log and 'CosineAnnealingLR.end=4' in log
    assert 'From epoch 2 to 3 the learning rate stays where the schedule ended' in log
    same = build(
        tmp_path / 'same',
        epochs=3,
        scheduler=cosine,
        resume=True,
        load_from=str(tmp_path / 'epoch_2.pth'),
    )
    same.train()
    assert 'is kept' not in log_of(same)


def fail_to_write(monkeypatch, names, code=errno.ENOSPC):
    """A disk that is full when a file with one of the names is written."""
    real = os.fsync

    def fsync(descriptor):
        path = os.readlink(f'/proc/self/fd/{descriptor}')
        if any(f'/{name}' in path for name in names):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, 'fsync', fsync)


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    options = dict(epochs=3, checkpoint=dict(max_keep_ckpts=1))
    fail_to_write(monkeypatch, ['epoch_2'])
    with pytest.raises(
        CheckpointError,
        match='epoch_2.pth was not written: No space left on '
        r'device \(it needs .* MB.* make room and continue with --resume',
    ):
        build(tmp_path, **options).train()
    assert [file.name for file in tmp_path.glob('*.pth*')] == ['epoch_1.pth']
    monkeypatch.undo()
    build(tmp_path, resume=True, **options).train()
    assert [file.name for file in tmp_path.glob('*.pth*')] == ['epoch_3.pth']


def test_a_full_disk_can_be_waited_for(tmp_path, monkeypatch):
    fail_to_write(monkeypatch, ['epoch_2', 'best_value_epoch_2'])
    runner = build(
        tmp_path, epochs=3, val=True, checkpoint=dict(max_keep_ckpts=1, on_write_error='continue')
    )
    runner.train()
    assert 'epoch_2.pth was not written' in log_of(runner)
    assert sorted(file.name for file in tmp_path.glob('*.pth*')) == [
        'best_value_epoch_3.pth',
        'epoch_3.pth',
    ]
    assert load_checkpoint_file(tmp_path / 'epoch_3.pth')['meta']['epoch'] == 3


def test_an_interrupted_validation_is_made_up_for(tmp_path, monkeypatch):
    def interrupted(self, metrics):
        raise KeyboardInterrupt

    whole = build(tmp_path / 'whole', epochs=2, val=True)
    whole.train()
    monkeypatch.setattr(EpochMetric, 'compute_metrics', interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, epochs=2, val=True).train()
    monkeypatch.undo()
    assert [file.name for file in tmp_path.glob('*.pth')] == ['epoch_1.pth']
    runner = build(tmp_path, epochs=2, val=True, resume=True)
    runner.train()
    ours, theirs = (
        part.message_hub.log_scalars['val/value'].data[0].tolist() for part in (runner, whole)
    )
    assert len(ours) == len(theirs) == 2 and ours[1] == theirs[1]
    # what is validated once is not validated again
    runner = build(tmp_path, epochs=2, val=True, resume=True)
    runner.train()
    assert len(runner.message_hub.log_scalars['val/value'].data[0]) == 2


def test_a_validation_without_a_checkpoint_gets_one_first(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        EpochMetric,
        'process',
        lambda self, data_batch, data_samples: (
            self.results.append(0),
            saved.append(sorted(file.name for file in tmp_path.glob('*.pth'))),
        ),
    )
    build(tmp_path, epochs=2, val=True, checkpoint=dict(interval=2, save_best=None)).train()
    assert saved[0] == ['latest.pth'] and saved[-1] == ['epoch_2.pth']


def test_a_metric_that_is_no_number_is_not_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(
        EpochMetric, 'compute_metrics', lambda self, results: dict(value=float('inf'))
    )
    runner = build(tmp_path, epochs=1, val=True)
    runner.train()
    assert not list(tmp_path.glob('best_*'))
    assert 'value is inf: this is not taken for the best' in log_of(runner)


def accumulating(work_dir, **options):
    return build(
        work_dir,
        optim_wrapper=dict(accumulative_counts=4, optimizer=dict(type='AdamW', lr=0.1)),
        **options,
    )


def test_gradients_that_are_summed_up_are_resumed(tmp_path):
    # epochs have two iterations: their ends are in the middle of a sum over four
    whole = accumulating(tmp_path / 'whole', epochs=4)
    whole.train()
    with pytest.raises(Interrupted):
        accumulating(tmp_path, epochs=4, stop_after=3).train()
    resumed = accumulating(tmp_path, epochs=4, resume=True)
    resumed.train()
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs)


def test_another_batch_size_goes_on_behind_the_images_that_were_seen(tmp_path):
    cosine = dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        end=4,
        T_max=4,
        eta_min=0.0,
        convert_to_iter_based=True,
    )
    with pytest.raises(Interrupted):
        build(
            tmp_path,
            epochs=4,
            scheduler=cosine,
            batch_size=2,
            stop_after=6,
            checkpoint=dict(by_epoch=False, interval=6),
        ).train()
    runner = build(tmp_path, epochs=4, scheduler=cosine, batch_size=4, resume=True)
    runner.train()
    # six of the first run's 16 steps, then five of this one's eight
    assert (runner.epoch, runner.iter) == (4, 8)
    rates = runner.message_hub.log_scalars['train/lr'].data[0]
    assert len(rates) == 6 + 5
    assert rates[6] == pytest.approx(0.05 * (1 + math.cos(math.pi * 3 / 8)))
    assert rates[-1] == pytest.approx(0.05 * (1 + math.cos(math.pi * 7 / 8)), rel=1e-3)
    assert 'saved with 2 images a step, this run has 4' in log_of(runner)


def test_the_version_is_in_log_and_checkpoint(tmp_path):
    runner = build(tmp_path)
    runner.train()
    meta = load_checkpoint_file(tmp_path / 'epoch_1.pth')['meta']
    assert meta['groupmamba_mm_version'].startswith(f'{__version__} (commit ')
    assert f'groupmamba_mm {meta["groupmamba_mm_version"]}' in log_of(runner)


def test_a_log_is_for_people(tmp_path):
    runner = grouped(tmp_path, merged=False, val=True)
    runner.train()
    before, progress, _ = log_of(runner).partition('Epoch(train)')
    assert progress and len(before.splitlines()) < 20
    for noise in (
        'the same before and after',
        'deprecated',
        'metainfo',
        'paramwise_options',
        'The prefix is not set',
    ):
        assert noise not in log_of(runner)
    assert 'AdamW: 2 tensors with lr 0.01, weight decay 0.05; ' in before
    # it is all there, beside the log
    files = {file.name: file.read_text() for file in Path(runner.log_dir).glob('*.*')}
    assert 'norm.weight (20,): ' in files['initialization.txt']
    assert len(files['initialization.txt'].splitlines()) == 6
    assert 'PyTorch: ' in files['environment.txt']


def test_warnings_that_nobody_can_act_upon_are_not_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter('always')
        quiet_warnings()
        warnings.warn('Default ``avg_non_ignore`` is False, if you would like to', stacklevel=1)
        warnings.warn('the learning rate is odd', stacklevel=1)
    assert [str(one.message) for one in shown] == ['the learning rate is odd']


def test_debug_messages_of_libraries_are_not_printed(monkeypatch, capsys):
    monkeypatch.setattr(mmengine.logging, 'print_log', mmengine.logging.print_log)
    quiet_debug_prints()
    mmengine.logging.print_log('Could not import OneDL', level=logging.DEBUG)
    mmengine.logging.print_log('a word', level=logging.INFO)
    assert capsys.readouterr().out == 'a word\n'


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_trackers_are_one_option(monkeypatch, scope):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'wandb' else name)
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    cfg = Config(
        dict(
            default_scope=scope,
            visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
        )
    )
    track_with(cfg, ['tensorboard', 'mlflow'])
    track_with(cfg, ['tensorboard'])
    assert [backend.type for backend in cfg.visualizer.vis_backends] == [
        'LocalVisBackend',
        'TensorboardVisBackend',
        'MLflowVisBackend',
    ]
    # MLflow 3 refuses a folder of files, which is mmengine's default
    assert cfg.visualizer.vis_backends[2].tracking_uri == 'sqlite:///mlflow.db'
    assert cfg.custom_hooks[0].type == 'ExamplePredictionsHook'
    assert all(backend in VISBACKENDS for backend in TRACKERS.values())
    with pytest.raises(ConfigError, match='--track wandb: .* pip install wandb'):
        track_with(cfg, ['wandb'])
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'http://server')
    bare = Config(dict(default_scope=scope))
    track_with(bare, ['mlflow'])
    assert bare.visualizer.vis_backends[1].tracking_uri == 'http://server'
    assert bare.visualizer.type in VISUALIZERS.module_dict or VISUALIZERS.get(
        f'{scope}.{bare.visualizer.type}'
    )


@pytest.mark.parametrize(
    'processes, accumulated, factor', [(1, 1, 0.5), (2, 1, 1.0), (1, 4, 2.0), (2, 3, 3.0)]
)
def test_learning_rates_are_scaled_by_what_an_update_sees(processes, accumulated, factor):
    said = []
    runner = SimpleNamespace(
        _train_dataloader=dict(batch_size=8),
        world_size=processes,
        logger=SimpleNamespace(info=said.append),
    )
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [dict(params=[layer.weight], lr=0.1), dict(params=[layer.bias])], lr=1.0
    )
    wrapper = OptimWrapper(optimizer, accumulative_counts=accumulated)
    CheckedRunner.scale_lr(runner, wrapper, dict(enable=True, base_batch_size=16))
    assert [group['lr'] for group in optimizer.param_groups] == [
        pytest.approx(0.1 * factor),
        pytest.approx(factor),
    ]
    assert f'an update is of {8 * processes * accumulated} images' in said[0]
    assert f'{accumulated} accumulated), and the config is for 16' in said[0]
    CheckedRunner.scale_lr(runner, wrapper, dict(enable=False, base_batch_size=16))
    assert len(said) == 1


def frozen_objects(_):
    return [gc.get_freeze_count()]


def test_workers_do_not_collect_what_their_parent_left():
    """Pinned memory or a CUDA graph in that would end a worker."""
    loader = DataLoader(range(1), num_workers=1, collate_fn=frozen_objects)
    assert gc.get_freeze_count() == 0 and next(iter(loader))[0] > 10_000
