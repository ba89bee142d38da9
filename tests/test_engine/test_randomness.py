"""Exact resuming, with everything in a training that draws random numbers."""
import os
import random

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS, init_default_scope

from groupmamba_mm.checkpoint import load_checkpoint_file
from groupmamba_mm.engine import seed_worker_by_epoch
from tests.conftest import REPO, SMALL

BASES = REPO / 'configs' / '_base_'


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    noise = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name in ('a', 'b'):
            (folder / split / name).mkdir(parents=True)
            for index in range(6):
                image = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                cv2.imwrite(str(folder / split / name / f'{index}.png'), image)
    return folder


def train(images, work_dir, epochs, resume=None, seed=0, workers=2, **changes):
    """Two epochs' schedule of the ImageNet recipe, of which ``epochs`` are trained."""
    init_default_scope('mmpretrain')
    parts = [Config.fromfile(BASES / name) for name in (
        'models/groupmamba_cls.py', 'datasets/imagenet_bs128_224.py',
        'schedules/imagenet_bs1024_adamw_300e.py', 'runtime_cls.py')]
    cfg = Config({key: value for part in parts for key, value in part.items()})
    for split in ('train', 'val'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=4, num_workers=workers, collate_fn=dict(type='default_collate'))
        del loader.dataset['split']
        loader.dataset.update(type='CustomDataset', data_root=str(images), data_prefix=split)
    for step in (*cfg.train_dataloader.dataset.pipeline, *cfg.val_dataloader.dataset.pipeline):
        if step.type in ('RandomResizedCrop', 'ResizeEdge'):
            step.scale = 32
        elif step.type == 'CenterCrop':
            step.crop_size = 32
    arch = SMALL['official']  # has BatchNorms, whose statistics must come back too
    cfg.merge_from_dict({
        'model.backbone.arch': arch, 'model.backbone.drop_path_rate': .3,
        'model.head.in_channels': arch['embed_dims'][-1], 'model.head.num_classes': 2,
        'data_preprocessor.num_classes': 2, 'val_evaluator.topk': (1, ),
        'train_cfg.max_epochs': epochs, 'randomness': dict(seed=seed), 'resume': resume is not None,
        'load_from': resume, 'work_dir': str(work_dir), 'custom_hooks.0.momentum': .2,
        'experiment_name': f'random{os.urandom(4).hex()}', 'log_level': 'WARNING', **changes})
    warmup, cosine = cfg.param_scheduler
    warmup.end, cosine.begin, cosine.end = 1, 1, 2
    cfg.pop('test_dataloader'), cfg.pop('test_evaluator'), cfg.pop('test_cfg')
    cfg.runner_type = 'CheckedRunner'
    runner = RUNNERS.build(cfg)
    runner.train()
    return load_checkpoint_file(work_dir / f'epoch_{epochs}.pth')


def differing(one, other):
    """The tensors of two checkpoints that are not bitwise the same."""
    return [f'{part}.{key}' for part in ('state_dict', 'ema_state_dict')
            for key, value in one[part].items() if not torch.equal(value, other[part][key])]


def scramble():
    """As another process would, whose generators are in another state."""
    random.seed(99), np.random.seed(99), torch.manual_seed(99)


@pytest.mark.parametrize('seed, workers', [(0, 2), (None, 0)])
def test_a_resumed_training_is_bitwise_the_whole_one(images, tmp_path, one_thread, seed, workers):
    options = dict(seed=seed, workers=workers)
    whole = train(images, tmp_path / 'whole', 2, **options)
    if seed is None:
        # of the whole run; the resumed one is started without a seed too and takes it over
        half = train(images, tmp_path / 'half', 1, seed=whole['meta']['seed'], workers=workers)
    else:
        half = train(images, tmp_path / 'half', 1, **options)
    assert half['meta']['epoch'] == 1
    scramble()
    resumed = train(images, tmp_path / 'half', 2, str(tmp_path / 'half' / 'epoch_1.pth'), **options)
    assert differing(whole, resumed) == []
    assert differing(whole, half)
    # the averaged weights are others than the raw ones
    assert any(not torch.equal(value, whole['ema_state_dict'][f'module.{key}'])
               for key, value in whole['state_dict'].items())


def test_a_seed_of_the_samplers_own_is_kept(images, tmp_path, one_thread):
    options = {'workers': 0, 'train_dataloader.sampler.seed': 7}
    whole = train(images, tmp_path / 'whole', 2, **options)
    train(images, tmp_path / 'half', 1, **options)
    resumed = train(images, tmp_path / 'half', 2, str(tmp_path / 'half' / 'epoch_1.pth'),
                    seed=None, **options)
    assert differing(whole, resumed) == []


def test_the_hook_is_what_makes_it_exact(images, tmp_path, one_thread):
    """Without it the two differ, so that the test above can fail."""
    without = {'default_hooks.epoch_seed.type': 'DistSamplerSeedHook'}  # which is there anyway
    whole = train(images, tmp_path / 'whole', 2, workers=0, **without)
    train(images, tmp_path / 'half', 1, workers=0, **without)
    scramble()
    resumed = train(images, tmp_path / 'half', 2, str(tmp_path / 'half' / 'epoch_1.pth'),
                    workers=0, **without)
    assert differing(whole, resumed)


def test_persistent_workers_are_told(images, tmp_path, one_thread):
    train(images, tmp_path, 1, workers=1, **{'train_dataloader.persistent_workers': True})
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'train_dataloader has persistent_workers=True' in log


def test_a_worker_draws_what_the_seed_that_torch_gave_it_says():
    drawn = []
    for given in (7, 8, 7):
        torch.manual_seed(given)  # by torch, before it calls the function
        seed_worker_by_epoch(0)
        drawn.append((random.random(), np.random.rand()))
    assert drawn[0] == drawn[2] and not set(drawn[0]) & set(drawn[1])
