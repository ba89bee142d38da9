"""A training with five percent of broken JPEGs."""

import os

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS

from groupmamba_mm.checkpoint import load_checkpoint_file
from groupmamba_mm.datasets import loading  # noqa: F401, registers what reads images
from groupmamba_mm.engine.training import set_common_options
from groupmamba_mm.errors import DataError
from tests.small_training import Interrupted

NUM_IMAGES, NUM_BAD = 60, 3


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    noise = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        file = folder / 'train' / 'ab'[index % 2] / f'{index}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), noise.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    whole = (folder / 'train/a/0.jpg').read_bytes()
    for index, content in enumerate((whole[: len(whole) // 2], b'', b'<html>not found</html>')):
        (folder / f'train/{"ab"[index % 2]}/{20 + index}.jpg').write_bytes(content)
    return folder


def train(images, work_dir, budget, resume=False, interrupt_after=None):
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            max_bad_images=budget,
            resume=resume,
            model=dict(
                type='ImageClassifier',
                neck=dict(type='GlobalAveragePooling'),
                backbone=dict(
                    type='ResNet',
                    depth=18,
                    stem_channels=4,
                    base_channels=4,
                    norm_cfg=dict(type='BN'),
                ),
                head=dict(
                    type='LinearClsHead',
                    num_classes=2,
                    in_channels=32,
                    loss=dict(type='CrossEntropyLoss'),
                ),
            ),
            data_preprocessor=dict(num_classes=2, mean=[127.0] * 3, std=[60.0] * 3),
            train_dataloader=dict(
                batch_size=12,
                num_workers=1,
                sampler=dict(type='DefaultSampler', shuffle=True),
                dataset=dict(
                    type='CustomDataset',
                    data_root=str(images),
                    data_prefix='train',
                    pipeline=[
                        dict(type='CheckedLoadImageFromFile'),
                        dict(type='RandomFlip', prob=0.5),
                        dict(type='PackInputs'),
                    ],
                ),
            ),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            randomness=dict(seed=0),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
            custom_hooks=[dict(type='InterruptHook', after=interrupt_after)],
            experiment_name=f'images{os.urandom(4).hex()}',
        )
    )
    set_common_options(cfg, 'images.py', str(work_dir), 'none')
    RUNNERS.build(cfg).train()
    return load_checkpoint_file(work_dir / 'iter_10.pth')


def test_broken_images_within_the_budget_are_named_and_left_out(
    images, tmp_path, one_thread, capfd
):
    whole = train(images, tmp_path / 'whole', NUM_BAD)
    log = capfd.readouterr().out
    for number, name in ((1, '20.jpg'), (2, '21.jpg'), (3, '22.jpg')):
        assert log.count(f'{name} ') == 1 and f'bad image {number}, of 3 at most' in log
    with pytest.raises(Interrupted):
        train(images, tmp_path / 'parts', NUM_BAD, interrupt_after=3)
    resumed = train(images, tmp_path / 'parts', NUM_BAD, resume=True)
    for key, value in whole['state_dict'].items():
        assert torch.equal(resumed['state_dict'][key], value), key


@pytest.mark.parametrize(
    'budget, message',
    [(0, r'train/[ab]/2\d\.jpg'), (2, '3 images are bad, and max_bad_images is 2')],
)
def test_more_than_the_budget_end_the_training(images, tmp_path, one_thread, budget, message):
    with pytest.raises(DataError, match=message):
        train(images, tmp_path, budget)
