"""The rehearsal before a training: what it refuses, measures, and leaves behind."""

import gc
import shutil
import weakref

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS

from groupmamba_mm.checks import build_quickly, check_quickly
from groupmamba_mm.checks.dry_run import dry_run, hand_over
from groupmamba_mm.engine.training import apply_train_options, set_common_options
from groupmamba_mm.errors import ConfigError, DataError
from tests.test_checks.test_checks import DEMO, config, made  # noqa: F401
from tests.test_tools.test_train_test_cli import CONFIG, write_images


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('place')
    write_images(folder / 'data')
    return folder


@pytest.fixture
def cfg(place, tmp_path):
    """A small classifier of two classes, eight images in training and four in validation."""
    return small(place / 'data', tmp_path)


def small(data, work_dir):
    cfg = Config.fromstring(CONFIG.replace("data_root='data'", f'data_root={str(data)!r}'), '.py')
    cfg.custom_hooks = []
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
    cfg.work_dir = str(work_dir / 'run')
    cfg.log_level = 'WARNING'
    return cfg


def prepared(cfg):
    apply_train_options(cfg)
    set_common_options(cfg, 'tiny.py', None, 'none')
    return cfg


def test_it_measures_and_leaves_no_trace(cfg, tmp_path):
    cfg.param_scheduler = [dict(type='LinearLR', start_factor=0.5, by_epoch=False, end=10)]
    cfg.train_dataloader.batch_size = 6
    found = dry_run(prepared(cfg), {}, compiled=True)
    assert found.batches == [6, 2] and found.metrics == ['accuracy/top1']
    assert found.rates == {1e-3: found.parameters} and found.first_rate == pytest.approx(5e-4)
    assert found.checkpoint_bytes > 10_000 and np.isfinite(found.loss)
    assert 'learning rate 0.001 for 100%' in found.page() and '0.0005 in the first' in found.line()
    assert list((tmp_path / 'run').iterdir()) == []


@pytest.mark.parametrize('folder', ['gone', 'empty'])
def test_processes_that_make_no_checks_say_of_missing_data_the_same(cfg, tmp_path, folder):
    """What a launch prints last may be any process's."""
    (tmp_path / 'empty').mkdir()
    cfg.val_dataloader.dataset.data_root = str(tmp_path / folder)
    said = []
    for make in (check_quickly, build_quickly):
        with pytest.raises(DataError) as raised:
            make(prepared(cfg), ('train', 'val'))
        said.append(str(raised.value))
    assert said[0] == said[1] and str(tmp_path / folder) in said[0]


def test_its_model_is_gone_before_the_run(cfg, monkeypatch):
    """Garbage on a GPU would take the run's memory, and end a recording that collects it."""
    models, build_runner = [], RUNNERS.build

    def build(*args, **options):
        runner = build_runner(*args, **options)
        models.append(weakref.ref(runner.model))
        return runner

    monkeypatch.setattr(RUNNERS, 'build', build)
    gc.disable()
    try:
        dry_run(prepared(cfg), {}, compiled=True)
        assert [model() for model in models] == [None]
    finally:
        gc.enable()


def test_options_that_fit_no_weight_are_named(cfg):
    cfg.optim_wrapper.paramwise_cfg = dict(
        norm_decay_multi=0.0,
        custom_keys={'backbon.conv1': dict(lr_mult=0), 'head': dict(lr_mult=2)},
    )
    said = [str(one) for one in dry_run(prepared(cfg), {}, compiled=True).warnings]
    assert len(said) == 2
    assert said[0].startswith(
        'optim_wrapper.paramwise_cfg.norm_decay_multi is no known option; did'
    )
    assert "custom_keys: 'backbon.conv1' is in the name of no parameter" in said[1]
    assert 'did you mean backbone.conv1' in said[1]


def test_the_run_after_it_is_the_same(cfg):
    """Bit for bit: the rehearsal has a runner, a model and random numbers of its own."""
    states = []
    for rehearsed in (False, True):
        run = prepared(Config(cfg._cfg_dict.to_dict()))
        run.experiment_name = f'same_{rehearsed}'
        built = {}
        if rehearsed:
            _, built = check_quickly(run, ('train', 'val'))
            dry_run(run, built, compiled=False)
        runner = RUNNERS.build(run)
        hand_over(runner, built)
        runner.train()
        states.append({key: value.clone() for key, value in runner.model.state_dict().items()})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def edited(**changes):
    return lambda cfg: cfg.merge_from_dict(changes)


def replaced(key, value):
    return lambda cfg: cfg.__setitem__(key, value)


LATE = {
    'topk': (edited(**{'val_evaluator.topk': (1, 5)}), 'dry run: validation of one batch fails'),
    'save_best': (
        edited(
            **{'default_hooks.checkpoint': dict(type='CheckpointHook', save_best='accuracy/top5')}
        ),
        "save_best is 'accuracy/top5', and validation gives accuracy/top1; set it to one of these",
    ),
    'several': (
        edited(
            **{
                'default_hooks.checkpoint': dict(
                    type='CheckpointHook',
                    save_best=['accuracy/top1', 'coco/bbox_mAP'],
                    rule='greater',
                )
            }
        ),
        "save_best is 'coco/bbox_mAP'",
    ),
    'other_metric': (
        lambda cfg: (
            cfg.__setitem__('val_evaluator', dict(type='SingleLabelMetric')),
            cfg.merge_from_dict(
                {'default_hooks.checkpoint': dict(type='CheckpointHook', save_best='accuracy/top1')}
            ),
        ),
        'validation gives single-label/f1-score',
    ),
    'last_batch': (
        edited(**{'train_dataloader.batch_size': 7}),
        r'dry run: a step of 7 images '
        r'fails \(ValueError: Expected more than 1 value.*the last batch of an epoch '
        r'has 1 of 7 images',
    ),
    'nan': (
        edited(**{'data_preprocessor.std': [0.0, 0.0, 0.0]}),
        'dry run: the loss or a gradient of iteration 1 is not finite'
        r'.*data_preprocessor[^;]*; lower the learning rate',
    ),
    'loss': (
        edited(**{'model.head.loss': dict(type='CrossEntropyLoss', class_weight=[1.0, 1.0, 1.0])}),
        'dry run: a step of 4 images fails',
    ),
    'widths': (edited(**{'model.head.in_channels': 31}), 'dry run: a step of 4 images fails'),
    'argument': (edited(**{'model.backbone.dept': 3}), 'ResNet takes no argument .dept.'),
    'schedule': (
        replaced('param_scheduler', [dict(type='LinearLR', start_facto=1.0)]),
        "takes no argument 'start_facto'; did you mean start_factor",
    ),
    'hook': (
        replaced('custom_hooks', [dict(type='EarlyStoppingHook', monitor='coco/mAP', strict=True)]),
        'validation of one batch fails',
    ),
    'nothing': (
        edited(**{'model.head.loss.loss_weight': 0.0}),
        'dry run: the loss of both steps is 0, so there is nothing to learn',
    ),
    'mixing': (
        edited(
            **{
                'model.train_cfg': dict(augments=dict(type='Mixup', alpha=0.8)),
                'data_preprocessor.num_classes': None,
            }
        ),
        'dry run',
    ),
}


@pytest.mark.parametrize('case', LATE)
def test_what_would_fail_late_fails_now(cfg, case):
    change, message = LATE[case]
    change(cfg)
    with pytest.raises((ConfigError, RuntimeError), match=message) as error:
        dry_run(prepared(cfg), {}, compiled=False)
    assert '\n' not in str(error.value)


def test_what_is_ignored_must_be_the_same(made, tmp_path):  # noqa: F811
    cfg = config('seg', made, **{'model.decode_head.ignore_index': 0, 'log_level': 'WARNING'})
    cfg.work_dir = str(tmp_path)
    with pytest.raises(ConfigError, match=r'decode_head.ignore_index is 0 .* train data is 255'):
        dry_run(prepared(cfg), {}, compiled=False)


def test_a_work_directory_that_cannot_be_written(cfg, tmp_path):
    (tmp_path / 'file').touch()
    cfg.work_dir = str(tmp_path / 'file' / 'run')
    with pytest.raises(ConfigError, match='dry run: .*file'):
        dry_run(prepared(cfg), {}, compiled=False)


def test_fewer_images_than_a_batch(cfg):
    cfg.train_dataloader.batch_size = 100
    assert dry_run(prepared(cfg), {}, compiled=False).batches == [8, 8]


@pytest.fixture
def damaged(place, tmp_path):
    data = shutil.copytree(place / 'data', tmp_path / 'data')
    (data / 'train/dark/0.png').write_bytes(b'text')
    return data


def test_bad_images_are_left_out_within_a_budget(damaged, tmp_path, capfd):
    with pytest.raises(DataError, match=r'dark/0\.png \(4 bytes\) cannot be decoded'):
        check_quickly(prepared(small(damaged, tmp_path)), ('train',))
    cfg = small(damaged, tmp_path)
    cfg.max_bad_images = 1
    cfg.train_dataloader.num_workers = 1
    cfg.train_cfg.max_epochs = 2
    warnings, built = check_quickly(prepared(cfg), ('train', 'val'))
    assert any('dark/0.png' in str(warning) for warning in warnings)
    runner = RUNNERS.build(cfg)
    hand_over(runner, built)
    runner.train()
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count('Left out (bad image 1, of 1 at most): image ') == 1
    assert len(runner.train_dataloader.dataset) == 8
    (damaged / 'train/light/1.png').write_bytes(b'')
    cfg = small(damaged, tmp_path)
    cfg.max_bad_images = 1
    with pytest.raises(DataError, match='the first of 2 errors'):
        check_quickly(prepared(cfg), ('train',))
    with pytest.raises(DataError, match='2 images are bad, and max_bad_images is 1; the last one'):
        RUNNERS.build(cfg).train()


CHANNELS = {
    # the task, channels and bits of the files, and how the config reads them
    'cls': (4, 16, 'unchanged', {}),
    'seg': (1, 16, 'unchanged', {}),
    'det': (4, 8, 'unchanged', {'model.data_preprocessor.type': 'MultiChannelDetDataPreprocessor'}),
}


@pytest.mark.parametrize('task', CHANNELS)
def test_images_of_any_channels_and_bits(made, tmp_path, task):  # noqa: F811
    channels, bits, color_type, options = CHANNELS[task]
    data = shutil.copytree(made, tmp_path / 'demo')
    kind = np.uint16 if bits == 16 else np.uint8
    random = np.random.RandomState(0)
    files = [file for file in (data / task).rglob('*.png') if 'annotations' not in file.parts]
    for file in files:
        height, width = cv2.imread(str(file)).shape[:2]
        shape = (height, width) if channels == 1 else (height, width, channels)
        cv2.imwrite(str(file), random.randint(0, 2**bits, shape).astype(kind))
    values = dict(mean=[100.0] * channels, std=[50.0] * channels)
    place = 'data_preprocessor' if task == 'cls' else 'model.data_preprocessor'
    options = {
        **options,
        'model.backbone.in_channels': channels,
        'model.backbone.arch.embed_dims': [8, 12, 16, 20],
        'model.backbone.arch.stem_channels': 8,
        'log_level': 'WARNING',
        **{f'{place}.{key}': value for key, value in values.items()},
    }
    options.update(
        {
            'cls': {'data_preprocessor.to_rgb': False, 'model.head.in_channels': 20},
            'seg': {
                'model.data_preprocessor.bgr_to_rgb': False,
                'model.decode_head.in_channels': [8, 12, 16, 20],
                'model.auxiliary_head.in_channels': 16,
            },
            'det': {
                'model.data_preprocessor.bgr_to_rgb': False,
                'model.neck.in_channels': [8, 12, 16, 20],
            },
        }[task]
    )
    cfg = config(task, data, **options)
    cfg.work_dir = str(tmp_path / 'run')
    for split in ('train', 'val'):
        loader = cfg[f'{split}_dataloader']
        loader.batch_size = 2
        for step in loader.dataset.pipeline:
            if 'LoadImage' in step['type']:
                step.update(type='CheckedLoadImageFromFile', color_type=color_type)
    _warnings, built = check_quickly(prepared(cfg), ('train', 'val'))
    found = dry_run(cfg, built, compiled=False)
    assert np.isfinite(found.loss) and found.metrics and DEMO[task].is_file()


@pytest.mark.gpu
def test_memory_is_that_of_the_steps(cfg):
    """A logger would set the peak back behind the last of them."""
    cfg.default_hooks.logger = dict(type='LoggerHook', interval=1)
    peaks = []
    run = prepared(cfg)
    step = torch.optim.AdamW.step

    def noted(*args, **options):
        peaks.append(torch.cuda.max_memory_allocated())
        return step(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, 'step', noted)
        found = dry_run(run, {}, compiled=True)
    kind, size = found.memory
    assert kind == 'GPU memory at most' and size >= max(peaks) > 0
