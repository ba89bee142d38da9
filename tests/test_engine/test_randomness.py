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
from groupmamba_mm.engine import train_loops
from groupmamba_mm.engine.randomness import SeededBatchSampler, seed_step
from tests.conftest import REPO, SMALL
from tests.small_training import Interrupted

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


def train(
    images,
    work_dir,
    epochs,
    resume=None,
    seed=0,
    workers=2,
    name=None,
    interrupt_after=None,
    loop=None,
    **changes,
):
    """Two epochs' schedule of the ImageNet recipe, of which ``epochs`` are trained."""
    init_default_scope('mmpretrain')
    parts = [
        Config.fromfile(BASES / name)
        for name in (
            'models/groupmamba_cls.py',
            'datasets/imagenet_bs128_224.py',
            'schedules/imagenet_bs1024_adamw_300e.py',
            'runtime_cls.py',
        )
    ]
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
    cfg.merge_from_dict(
        {
            'model.backbone.arch': arch,
            'model.backbone.drop_path_rate': 0.3,
            'model.head.in_channels': arch['embed_dims'][-1],
            'model.head.num_classes': 2,
            'data_preprocessor.num_classes': 2,
            'val_evaluator.topk': (1,),
            'train_cfg.max_epochs': epochs,
            'randomness': dict(seed=seed),
            'resume': resume is not None,
            'load_from': None if resume == 'auto' else resume,
            'work_dir': str(work_dir),
            'custom_hooks.0.momentum': 0.2,
            'experiment_name': f'random{os.urandom(4).hex()}',
            'log_level': 'WARNING',
            **changes,
        }
    )
    warmup, cosine = cfg.param_scheduler
    warmup.end, cosine.begin, cosine.end = 1, 1, 2
    cfg.pop('test_dataloader'), cfg.pop('test_evaluator'), cfg.pop('test_cfg')
    cfg.runner_type = 'CheckedRunner'
    cfg.train_cfg = loop or cfg.train_cfg
    if interrupt_after is not None:
        cfg.custom_hooks.append(dict(type='InterruptHook', after=interrupt_after))
    runner = RUNNERS.build(cfg)
    runner.train()
    return load_checkpoint_file(work_dir / (name or f'epoch_{epochs}.pth'))


def differing(one, other):
    """The tensors of two checkpoints that are not bitwise the same."""
    return [
        f'{part}.{key}'
        for part in ('state_dict', 'ema_state_dict')
        for key, value in one[part].items()
        if not torch.equal(value, other[part][key])
    ]


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
    assert any(
        not torch.equal(value, whole['ema_state_dict'][f'module.{key}'])
        for key, value in whole['state_dict'].items()
    )


def test_a_seed_of_the_samplers_own_is_kept(images, tmp_path, one_thread):
    options = {'workers': 0, 'train_dataloader.sampler.seed': 7}
    whole = train(images, tmp_path / 'whole', 2, **options)
    train(images, tmp_path / 'half', 1, **options)
    resumed = train(
        images, tmp_path / 'half', 2, str(tmp_path / 'half' / 'epoch_1.pth'), seed=None, **options
    )
    assert differing(whole, resumed) == []


@pytest.mark.parametrize(
    'workers, resumed_workers, loop', [(2, 1, 'epoch'), (0, 1, 'iteration'), (1, 0, 'infinite')]
)
def test_a_training_resumed_inside_an_epoch_is_bitwise_the_whole_one(
    images, tmp_path, one_thread, workers, resumed_workers, loop
):
    changes = {'default_hooks.checkpoint.by_epoch': False, 'default_hooks.checkpoint.interval': 2}
    if loop != 'epoch':
        changes['loop'] = dict(type='IterBasedTrainLoop', max_iters=6, val_interval=3)
    if loop == 'infinite':
        changes['train_dataloader.sampler.type'] = 'InfiniteSampler'
    options = dict(name='iter_6.pth', **changes)
    whole = train(images, tmp_path / 'whole', 2, workers=workers, **options)
    for after in (2, 4):  # inside the first epoch of three batches, and inside the second
        with pytest.raises(Interrupted):
            train(
                images,
                tmp_path / 'parts',
                2,
                'auto' if after > 2 else None,
                workers=workers,
                interrupt_after=after,
                **options,
            )
        scramble()
    resumed = train(images, tmp_path / 'parts', 2, 'auto', workers=resumed_workers, **options)
    assert differing(whole, resumed) == []
    for key in ('train/loss', 'train/lr', 'val/accuracy/top1'):
        history, expected = (
            part['message_hub']['log_scalars'][key].data[0] for part in (resumed, whole)
        )
        assert history.tolist() == expected.tolist(), key
    assert resumed['message_hub']['runtime_info']['eta'] == 0


def test_the_seeds_are_what_makes_it_exact(images, tmp_path, one_thread, monkeypatch):
    """Without them the two differ, so that the tests above can fail."""
    monkeypatch.setattr(train_loops, 'seed_step', lambda *source: None)
    whole = train(images, tmp_path / 'whole', 2, workers=1)  # without one, loading seeds the step
    train(images, tmp_path / 'half', 1, workers=1)
    scramble()
    resumed = train(images, tmp_path / 'half', 2, str(tmp_path / 'half' / 'epoch_1.pth'), workers=1)
    assert differing(whole, resumed)


def test_a_step_draws_the_same_wherever_a_run_starts():
    def drawn_in(*source):
        scramble()
        seed_step(*source)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert drawn_in(3, 7, 0) == drawn_in(3, 7, 0)
    draws = [drawn_in(3, 7, 0), drawn_in(3, 8, 0), drawn_in(4, 7, 0), drawn_in(3, 7, 1)]
    assert all(len({draw[kind] for draw in draws}) == 4 for kind in range(3))


class Draws(torch.utils.data.Dataset):
    """Samples that are random numbers of all three generators."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(1).item()


def drawn(workers, endless=False, seed=3, iteration=0, skip=0, persistent=False, passes=1, count=4):
    loader = torch.utils.data.DataLoader(
        Draws(), batch_size=2, num_workers=workers, collate_fn=list, persistent_workers=persistent
    )
    sampler = SeededBatchSampler.install(loader, endless)
    batches = []
    for number in range(passes):
        scramble()
        sampler.set_position(seed, iteration + 4 * number, skip if number == 0 else 0)
        batches += [batch for _, batch in zip(range(count), loader)]
    return batches


def test_a_batch_draws_the_same_numbers_whoever_loads_it():
    expected = drawn(0, passes=2)
    assert len(expected) == 8 and len({str(batch) for batch in expected}) == 8
    assert [[sample[0] for sample in batch] for batch in expected[:4]] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6],
    ]
    for workers, persistent in ((1, False), (3, True)):
        assert drawn(workers, persistent=persistent, passes=2) == expected
    assert drawn(2, iteration=2, skip=2) == expected[2:4]
    assert drawn(0, seed=4) != expected[:4]


def test_an_endless_sampler_goes_on_behind_its_last_batch():
    batches = drawn(2, endless=True, count=10)
    assert [sample[0] for sample in batches[4]] == [0, 1]
    assert batches[4] != batches[0]  # other numbers for the same images
    assert drawn(1, endless=True, iteration=5, skip=5, count=5) == batches[5:]


def test_a_data_set_that_is_shared_with_validation_draws_freely_there():
    loader = torch.utils.data.DataLoader(Draws(), batch_size=2, collate_fn=list)
    SeededBatchSampler.install(loader, False)
    free = torch.utils.data.DataLoader(loader.dataset, batch_size=2, collate_fn=list)
    scramble()
    expected = random.random()
    scramble()
    assert next(iter(free))[0][1] == expected
