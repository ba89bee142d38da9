"""Whether loops, loaders, schedules and hooks of a config fit each other."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config

from groupmamba_mm.engine.config_checks import type_name

from .findings import Finding, config_error
from .parts import processes


def check_plan(cfg: Config, splits: Sequence[str]) -> Iterator[Finding]:
    """Check what needs no data.

    Args:
        cfg: The config.
        splits: Which of 'train', 'val' and 'test' will run.
    """
    for split in splits:
        if cfg.get(f'{split}_dataloader') is not None:
            yield from _loader(cfg, split)
    if 'train' in splits and cfg.get('train_cfg') is not None:
        yield from _length(cfg)
        if not _counts_epochs(cfg):
            yield from _in_iterations(cfg)


def _counts_epochs(cfg: Config) -> bool:
    return 'max_epochs' in cfg.train_cfg


def _loader(cfg: Config, split: str) -> Iterator[Finding]:
    loader, key = cfg[f'{split}_dataloader'], f'{split}_dataloader'
    size = loader.get('batch_size', 1)
    if not isinstance(size, int) or size < 1:
        yield config_error(f'{key}.batch_size', f'is {size!r}', 'set it to 1 or more')
    if loader.get('prefetch_factor') and not loader.get('num_workers'):
        yield config_error(
            f'{key}.prefetch_factor',
            f'is {loader["prefetch_factor"]}, and num_workers=0 has no workers that load ahead',
            'remove it, or set num_workers',
        )
    sampler = type_name(loader.get('sampler') or {})
    if 'Infinite' in sampler and (split != 'train' or _counts_epochs(cfg)):
        yield config_error(
            f'{key}.sampler',
            f'is {sampler}, which draws images without end, and '
            + ('an epoch' if split == 'train' else 'the evaluation')
            + ' ends with its images',
            'set its type to DefaultSampler'
            + (', or train by iterations (IterBasedTrainLoop)' if split == 'train' else ''),
        )


def _length(cfg: Config) -> Iterator[Finding]:
    for key in ('max_epochs', 'max_iters'):
        value = cfg.train_cfg.get(key, 1)
        if not isinstance(value, int) or value < 1:
            yield config_error(
                f'train_cfg.{key}', f'is {value!r}, so nothing is trained', 'set it to 1 or more'
            )


def schedulers_of(cfg: Config) -> list[tuple[str, Mapping[str, Any]]]:
    """The schedules of a config with their keys."""
    found = cfg.get('param_scheduler') or []
    if isinstance(found, Mapping):
        return [('param_scheduler', found)] if 'type' in found else []  # one for each optimizer
    return [(f'param_scheduler.{index}', one) for index, one in enumerate(found)]


def _in_iterations(cfg: Config) -> Iterator[Finding]:
    """What counts epochs, mmengine's default, though the loop has but one."""
    for key, scheduler in schedulers_of(cfg):
        if (
            scheduler.get('by_epoch', True)
            and not scheduler.get('convert_to_iter_based')
            and 'Plateau' not in type_name(scheduler)  # goes by validations
        ):
            yield config_error(
                key,
                f'({type_name(scheduler)}) counts epochs in a training of iterations, so the rate '
                'never changes',
                'set by_epoch=False, with begin and end in iterations',
            )
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if hook.get('by_epoch', True) and hook.get('interval', -1) > 0:
        yield config_error(
            'default_hooks.checkpoint',
            f'counts epochs (interval={hook["interval"]}) in a training of iterations, so nothing '
            'is saved before its end',
            'set by_epoch=False, with the interval in iterations',
        )


def unfinished_schedules(cfg: Config, images: int) -> Iterator[Finding]:
    """Schedules that the run does not reach the end of, a warm-up above all.

    Args:
        cfg: The config.
        images: Number of images in an epoch.
    """
    steps = math.ceil(images / processes() / cfg.train_dataloader.get('batch_size', 1))
    counts_epochs = _counts_epochs(cfg)
    total = cfg.train_cfg.get('max_epochs' if counts_epochs else 'max_iters')
    if total is None:  # a loop of the user's own
        return
    for key, scheduler in schedulers_of(cfg):
        in_epochs = scheduler.get('by_epoch', True)
        length = total if in_epochs == counts_epochs else total * steps if counts_epochs else None
        end = scheduler.get('end')
        if length is not None and isinstance(end, int) and length < end < 2**31:
            unit = 'epochs' if in_epochs else 'iterations'
            yield Finding(
                f'{key} ({type_name(scheduler)})',
                f'ends after {end} {unit}, and the run after {length}',
                'shorten it if the rate is to reach its last value',
                severity='warning',
            )
