"""What is measured of a training, each part in a process of its own.

``python -m groupmamba_mm.analysis.training_parts PART CONFIG OUT`` measures a part and writes a
JSON file. The caller is :mod:`groupmamba_mm.analysis.training_benchmark`.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS, DefaultScope
from mmengine.runner import Runner
from torch import nn

import groupmamba_mm.engine  # noqa: F401, registers the runner

from .training_clock import Clock


def build_runner(cfg: Config) -> Runner:
    """Build a config's runner with its optimizer, as ``train()`` does.

    Args:
        cfg: The config.

    Returns:
        The runner, whose model is initialised.
    """
    runner = RUNNERS.build(cfg)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if hasattr(model, 'prepare_training'):
        model.prepare_training()
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner._init_model_weights()
    return runner


class _PreparedBatch(nn.Module):
    """A fake preprocessor that returns one batch, prepared once."""

    def __init__(self, data: dict) -> None:
        super().__init__()
        self.data = data

    def forward(self, data: Any, training: bool = False) -> dict:
        return copy.copy(self.data)


def measure_step(cfg: Config, warmup: int, iterations: int) -> dict[str, Any]:
    """Time forward pass, backward pass and optimizer on one batch that is prepared already.

    Args:
        cfg: The config.
        warmup: Steps before the measured ones.
        iterations: Measured steps.

    Returns:
        'step_ms', 'step_img_s' of all processes, and the memory in GB.
    """
    runner, clock = build_runner(cfg), Clock()
    loader = runner.build_dataloader(cfg.train_dataloader, seed=0)
    batch = next(iter(loader))
    del loader
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    model.data_preprocessor = _PreparedBatch(model.data_preprocessor(batch, True))
    runner.model.train()
    for _ in range(warmup):
        runner.model.train_step(None, runner.optim_wrapper)
    clock.wait()
    start = time.perf_counter()
    for _ in range(iterations):
        runner.model.train_step(None, runner.optim_wrapper)
    clock.wait()
    seconds = (time.perf_counter() - start) / iterations
    images = len(batch['inputs']) * runner.world_size
    result = dict(step_ms=1000 * seconds, step_img_s=images / seconds)
    if clock.on_gpu:
        result.update(step_peak_gb=torch.cuda.max_memory_allocated() / 1e9)
    return result


def _rate(loader: Iterable, batch: int, warmup: int, iterations: int) -> dict[str, float]:
    """Images a second of a loader that is read as fast as it gives."""
    start, done = None, 0
    while done < warmup + iterations:
        for _ in loader:
            done += 1
            if done == warmup:
                start = time.perf_counter()
            if done == warmup + iterations:
                break
    return dict(loader_img_s=batch * iterations / (time.perf_counter() - start))


def measure_loader(cfg: Config, warmup: int, iterations: int) -> dict[str, Any]:
    """Time the training loader alone.

    Args:
        cfg: The config.
        warmup: Batches before the measured ones.
        iterations: Measured batches.

    Returns:
        'loader_img_s'.
    """
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    return _rate(loader, cfg.train_dataloader.batch_size, warmup, iterations)


def measure_timm_loader(cfg: Config, warmup: int, iterations: int) -> dict[str, Any]:
    """Time timm's loader on a classifier's images, with the ImageNet recipe.

    Args:
        cfg: A config whose training images are in folders of their classes.
        warmup: Batches before the measured ones.
        iterations: Measured batches.

    Returns:
        'loader_img_s'.
    """
    from timm.data import auto_augment, create_dataset, create_loader

    own = cfg.train_dataloader
    posterize = auto_augment.posterize
    for name, operation in list(auto_augment.NAME_TO_OP.items()):
        if operation is posterize:
            # since version 13 Pillow refuses to keep no bit at all, which timm asks for
            auto_augment.NAME_TO_OP[name] = lambda image, bits, **options: posterize(
                image, max(1, bits), **options
            )
    dataset = own.dataset.get('dataset', own.dataset)
    dataset = create_dataset('', root=dataset.data_root, split='train', is_training=True)
    loader = create_loader(
        dataset,
        (3, 224, 224),
        own.batch_size,
        is_training=True,
        use_prefetcher=False,
        auto_augment='rand-m9-mstd0.5-inc1',
        re_prob=0.25,
        interpolation='bicubic',
        num_workers=own.num_workers,
        persistent_workers=own.num_workers > 0,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        pin_memory=torch.cuda.is_available(),
    )
    return _rate(loader, own.batch_size, warmup, iterations)


MEASURES = {'loader': measure_loader, 'timm-loader': measure_timm_loader, 'step': measure_step}


def main(argv: list[str] | None = None) -> None:
    """Measure one part.

    Args:
        argv: The arguments, None for the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('part', choices=MEASURES)
    parser.add_argument('config')
    parser.add_argument('out')
    parser.add_argument('--warmup', type=int, required=True)
    parser.add_argument('--iterations', type=int, required=True)
    parser.add_argument('--launcher', choices=['none', 'pytorch'], default='none')
    args = parser.parse_args(argv)
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    result = MEASURES[args.part](cfg, args.warmup, args.iterations)
    if get_rank() == 0:
        Path(args.out).write_text(json.dumps(result))


if __name__ == '__main__':
    main()
