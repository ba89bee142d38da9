"""Parts of a config that do not fit each other, said before training: each kind, and what is fine."""

import re

import cv2
import numpy as np
import pytest

from groupmamba_mm.checks.dry_run import dry_run
from groupmamba_mm.errors import ConfigError
from tests.test_checks.test_checks import (  # noqa: F401
    config,
    data,
    edit,
    findings,
    located,
    made,
    refused,
    write_labels,
)
from tests.test_checks.test_dry_run import cfg, place, prepared  # noqa: F401


def loader(split, **options):
    return {f'{split}_dataloader.{key}': value for key, value in options.items()}


def in_iterations(changed, **options):
    """A training of 20 iterations."""
    changed.train_cfg = dict(type='IterBasedTrainLoop', max_iters=20, val_interval=10)
    changed.train_dataloader.sampler = dict(type='InfiniteSampler')
    changed.param_scheduler = [dict(type='LinearLR', by_epoch=False, end=5)]
    changed.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=10)
    for key, value in options.items():
        changed[key] = value
    return changed


@pytest.mark.parametrize(
    'options, message',
    [
        (loader('train', batch_size=0), r'train_dataloader\.batch_size is 0'),
        (loader('val', batch_size=0), r'val_dataloader\.batch_size is 0'),
        (
            loader('train', num_workers=0, persistent_workers=False, prefetch_factor=2),
            r'train_dataloader\.prefetch_factor is 2, and num_workers=0',
        ),
        (
            {'train_dataloader.sampler.type': 'InfiniteSampler'},
            r'train_dataloader\.sampler is InfiniteSampler.* an epoch ends.*IterBasedTrainLoop',
        ),
        (
            {'val_dataloader.sampler.type': 'InfiniteSampler'},
            r'val_dataloader\.sampler is InfiniteSampler.* the evaluation ends.*DefaultSampler$',
        ),
        ({'train_cfg.max_epochs': 0}, r'train_cfg\.max_epochs is 0, so nothing is trained'),
        (
            loader('val', batch_size=4, drop_last=True),
            r'val_dataloader\.drop_last is True, and of 6 images in each process 2 would get no',
        ),
    ],
)
def test_loaders_and_loops(made, options, message):  # noqa: F811
    refused(config('cls', made, **options), message)


def test_a_validation_in_whole_batches_may_drop_the_rest(made):  # noqa: F811
    assert findings(config('cls', made, **loader('val', batch_size=3, drop_last=True))) == []


def test_iterations_are_not_counted_in_epochs(made):  # noqa: F811
    assert findings(in_iterations(config('cls', made))) == []
    plateau = dict(type='ReduceOnPlateauLR', monitor='accuracy/top1')
    assert findings(in_iterations(config('cls', made), param_scheduler=plateau)) == []
    wrong = in_iterations(config('cls', made), param_scheduler=dict(type='MultiStepLR'))
    refused(wrong, r'param_scheduler \(MultiStepLR\) counts epochs .* never changes; set by_epoch')
    wrong = in_iterations(config('cls', made))
    wrong.default_hooks.checkpoint = dict(type='CheckpointHook', interval=4)
    refused(wrong, r'default_hooks\.checkpoint counts epochs \(interval=4\) .*nothing is saved')


@pytest.mark.parametrize(
    'schedule, said',
    [
        (
            dict(type='LinearLR', by_epoch=False, end=20_000),
            'ends after 20000 iterations, and the run after 6',
        ),
        (
            dict(type='CosineAnnealingLR', by_epoch=True, end=300),
            'ends after 300 epochs, and the run after 2',
        ),
        (dict(type='LinearLR', by_epoch=False, end=6), None),
        (dict(type='CosineAnnealingLR', by_epoch=True, T_max=2), None),
    ],
)
def test_schedules_that_the_run_does_not_end(made, schedule, said):  # noqa: F811
    changed = config('cls', made, **loader('train', batch_size=4), **{'train_cfg.max_epochs': 2})
    changed.param_scheduler = [schedule]
    warnings = [text for text in findings(changed, 'warning') if 'param_scheduler' in text]
    assert len(warnings) == (said is not None)
    for text in warnings:
        assert re.match(rf'param_scheduler\.0 \({schedule["type"]}\) {said};', text)


def test_values_of_images_and_their_normalisation(made):  # noqa: F811
    std = dict(std=[0.229, 0.224, 0.225], mean=[0.485, 0.456, 0.406])
    changed = config('cls', made)
    changed.data_preprocessor.update(std)
    assert any('for values from 0 to 1' in text for text in findings(changed, 'warning'))
    for std in ([58.395, 57.12, 57.375], [1.0, 1.0, 1.0]):  # the latter of weights from Caffe
        changed = config('cls', made)
        changed.data_preprocessor.std = std
        assert not any('values from 0 to 1' in text for text in findings(changed, 'warning'))
        assert not any('nearly black' in text for text in findings(changed, 'warning'))
    step = dict(type='Normalize', mean=[0, 0, 0], std=[1, 1, 1])
    changed.train_dataloader.dataset.pipeline.insert(1, step)
    refused(changed, 'normalised twice')


def test_a_class_without_a_colour(made):  # noqa: F811
    changed = config('det', made)
    changed.val_dataloader.dataset.metainfo = dict(
        changed.val_dataloader.dataset.get('metainfo') or {}, palette=[(0, 0, 0), (9, 9, 9)]
    )
    warned = findings(changed, 'warning')
    assert any('palette of the val data has 2 colours for 10 classes' in one for one in warned)
    assert not any('palette' in one for one in findings(config('det', made), 'warning'))


def test_an_annotation_that_the_metric_takes_for_none(data):  # noqa: F811
    def first_is_zero(content):
        content['annotations'][0]['id'] = 0

    edit(data / 'det/annotations/instances_train.json', first_is_zero)
    assert findings(config('det', data)) == []  # nothing is scored there
    edit(data / 'det/annotations/instances_val.json', first_is_zero)
    refused(config('det', data), 'have the id 0, which the metric takes for not found')


def test_the_annotations_of_one_of_two_data_sets(made):  # noqa: F811
    changed = config('det', made)
    one = changed.val_dataloader.dataset
    other = dict(one, ann_file='annotations/instances_train.json', data_prefix=dict(img='train/'))
    changed.val_dataloader.dataset = dict(type='ConcatDataset', datasets=[one, other])
    refused(changed, r'val_evaluator\.ann_file is .*, the annotations of one of the 2 data sets')


def test_label_maps_that_splits_or_metrics_number_in_another_way(data):  # noqa: F811
    write_labels(data / 'seg/annotations/train', lambda labels: (labels + 1).astype(np.uint8))
    changed = config('seg', data, **{'train_dataloader.dataset.reduce_zero_label': True})
    refused(changed, 'have reduce_zero_label=False, and the train data True')
    write_labels(data / 'seg/annotations/train', lambda labels: (labels - 1).astype(np.uint8))
    options = {f'{split}_dataloader.dataset.ignore_index': 0 for split in ('train', 'val')}
    changed = config('seg', data, **options)
    refused(changed, r'val_evaluator\.ignore_index is 255, and the val data ignore 0; set it to 0')


def test_an_image_of_a_list_that_is_not_there(data):  # noqa: F811
    names = [f'{name}/{index}.png {label}' for label, name in enumerate('abc') for index in '0123']
    (data / 'cls/list.txt').write_text('\n'.join([*names, 'c/gone.png 2']))
    changed = config('cls', data)
    changed.train_dataloader.dataset.update(
        ann_file='list.txt', data_prefix='train', metainfo=dict(classes=('a', 'b', 'c'))
    )
    refused(
        changed, r'1 of the 13 images that list\.txt of the train data lists are missing: .*gone'
    )
    changed.max_bad_images = 1
    assert not any('are missing' in text for text in findings(changed))
    assert any('are missing' in text for text in findings(changed, 'warning'))


@pytest.mark.parametrize('line', ['a/0.png', 'a/0.png one', 'a/0.png,1', ''])
def test_a_line_of_a_list_without_the_number_of_a_class(data, line):  # noqa: F811
    (data / 'cls/list.txt').write_text(f'a/0.png 0\n{line}\nb/0.png 1\n')
    changed = config('cls', data)
    changed.train_dataloader.dataset.update(
        ann_file='list.txt', data_prefix='train', metainfo=dict(classes=('a', 'b', 'c'))
    )
    refused(changed, rf"line 2 of list\.txt of the train data is '{line}', and each must be a path")


@pytest.mark.parametrize('high', [4095, 1])
def test_images_that_are_loaded_nearly_black(data, high):  # noqa: F811
    """Twelve bits in sixteen, of which eight are kept; or values from 0 to 1."""
    depth = np.uint16 if high > 255 else np.uint8
    random = np.random.default_rng(0)
    for file in (data / 'cls/train').rglob('*.png'):
        cv2.imwrite(str(file), random.integers(0, high + 1, (40, 40, 3)).astype(depth))
    (said,) = [t for t in findings(config('cls', data), 'warning') if 'nearly black' in t]
    assert re.match(r'the train data have values up to (15|1) as the pipeline gives them', said)


@pytest.mark.parametrize(
    'change, message',
    [
        (
            dict(custom_hooks=[dict(type='EarlyStoppingHook', monitor='accuracy/top5')]),
            r"custom_hooks\.0\.monitor is 'accuracy/top5', and validation gives accuracy/top1",
        ),
        (
            dict(param_scheduler=[dict(type='ReduceOnPlateauLR')]),
            r"param_scheduler\.0\.monitor is 'loss', and validation gives accuracy/top1",
        ),
        (
            dict(val_evaluator=dict(type='SingleLabelMetric', items=('f1-score',))),
            r"save_best is 'auto', and .* single-label/f1-score is better; set default_hooks\.",
        ),
    ],
)
def test_metrics_that_hooks_and_schedules_go_by(cfg, change, message):  # noqa: F811
    cfg.default_hooks = dict(checkpoint=dict(type='CheckpointHook', save_best='auto'))
    for key, value in change.items():
        cfg[key] = value
    with pytest.raises(ConfigError, match=message):
        dry_run(prepared(cfg), {}, compiled=True)
