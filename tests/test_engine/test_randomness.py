"""Exact resuming, with everything in a training that draws random numbers."""
import os
import random
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS, init_default_scope
from torch.utils.data import DataLoader

from groupmamba_mm.checkpoint import load_checkpoint_file
from groupmamba_mm.engine.randomness import EpochSeedHook, SeededFetch
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
        loader.update(batch_size=4, num_workers=workers, persistent_workers=workers > 0)
        del loader.dataset['split']
        loader.dataset.update(type='CustomDataset', data_root=str(images), data_prefix=split)
    for step in (*cfg.train_dataloader.dataset.pipeline, *cfg.val_dataloader.dataset.pipeline):
        if step.type in ('AntialiasedRandomResizedCrop', 'AntialiasedResizeEdge'):
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


def test_an_iteration_draws_the_same_wherever_a_run_starts():
    def drawn(iteration, seed=3):
        scramble()
        EpochSeedHook().before_train_iter(SimpleNamespace(seed=seed, iter=iteration), 0)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert drawn(7) == drawn(7)
    draws = [drawn(7), drawn(8), drawn(7, seed=4)]
    assert all(len({draw[kind] for draw in draws}) == 3 for kind in range(3))


class Draws:
    """A data set whose items are drawn by all three generators, apart from the index."""

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def drawn(loader):
    return [draws for batch in loader for draws in batch]


def draw_epochs(epochs, num_workers, restart=False, rank=0, seed=1):
    """What workers draw in some epochs; the same workers unless they restart."""
    dataset = Draws()
    dataset.__getitems__ = fetch = SeededFetch(dataset, seed, rank)

    def loader():
        return DataLoader(dataset, sampler=range(10), batch_size=2, collate_fn=list,
                          num_workers=num_workers, persistent_workers=num_workers > 0)

    one, found = loader(), []
    for epoch in epochs:
        fetch.epoch.fill_(epoch)
        scramble()
        found.append(drawn(loader() if restart else one))
    return found


def test_workers_that_live_on_draw_what_new_ones_do():
    whole = draw_epochs((0, 1, 2), 2)
    assert whole == draw_epochs((0, 1, 2), 2, restart=True) == draw_epochs((0, 1, 2), 0)
    assert draw_epochs((2, ), 3) == whole[2:]  # other workers, resumed
    others = draw_epochs((0, ), 2, rank=1) + draw_epochs((0, ), 2, seed=2)
    draws = [draw for epoch in whole + others for draw in epoch]
    assert all(len({draw[kind] for draw in draws}) == len(draws) for kind in (1, 2, 3))


def test_an_index_drawn_twice_is_augmented_in_two_ways():
    dataset = Draws()
    (_, *first), (_, *second) = SeededFetch(dataset, 0, 0)([3, 3])
    assert first != second and SeededFetch(dataset, 0, 0)([3, 4])[0][1:] != tuple(first)
