"""Apply the command line of training to a config."""

import os
import os.path as osp
from collections.abc import Sequence

import torch
from mmengine.config import Config, ConfigDict

from groupmamba_mm.errors import ConfigError

from .config_checks import type_name
from .loops import AMP_ARGUMENTS, AMP_DTYPES
from .optim import AMP_WRAPPERS, PLAIN_WRAPPERS
from .tracking import track_with

_SPLITS = ('train', 'val', 'test')


def set_common_options(cfg: Config, config_path: str, work_dir: str | None, launcher: str) -> None:
    """Set what training and testing share: runner, work directory, launcher and loaders.

    Args:
        cfg (Config): The config, changed in place.
        config_path (str): Where it came from; its name is the default work directory's.
        work_dir (str, optional): The work directory of the command line.
        launcher (str): 'none', 'pytorch', 'slurm' or 'mpi'.
    """
    cfg.setdefault('runner_type', 'CheckedRunner')
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', osp.splitext(osp.basename(config_path))[0])
    for split in _SPLITS:
        loader = cfg.get(f'{split}_dataloader')
        if loader is not None:
            _set_loader_defaults(loader, cfg.default_scope)
    if cfg.get('max_bad_images', 0):
        _skip_bad_images(cfg)


def _skip_bad_images(cfg: Config) -> None:
    """Let every loader leave out images that cannot be read, and count them."""
    for split in _SPLITS:
        loader = cfg.get(f'{split}_dataloader')
        if loader is not None and type_name(loader.dataset) != 'SkipBadImages':
            collate = loader.pop('collate_fn', None) or dict(type='pseudo_collate')
            loader.collate_fn = dict(type='skip_bad_images', collate=collate)
            loader.dataset = dict(type='SkipBadImages', dataset=loader.pop('dataset'))
    hook = dict(type='BadImagesHook', budget=cfg.max_bad_images)
    cfg.custom_hooks = list(cfg.get('custom_hooks') or []) + [hook]


def _set_loader_defaults(loader: ConfigDict, scope: str) -> None:
    """Set defaults of a data loader; the config's own values win."""
    # without it, the host waits for each copy to the GPU
    loader.setdefault('pin_memory', torch.cuda.is_available())
    if scope == 'mmpretrain':
        # Its models take stacked images, mmengine's own default is a list of them.
        loader.setdefault('collate_fn', dict(type='default_collate'))
        loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)
    if loader.get('num_workers', 0) == 0 and loader.get('persistent_workers'):
        # torch refuses the pair, and --cfg-options train_dataloader.num_workers=0 makes it.
        loader.persistent_workers = False


def apply_train_options(
    cfg: Config,
    resume: str | None = None,
    amp: str | None = None,
    auto_scale_lr: bool = False,
    no_validate: bool = False,
    checkpoint_minutes: float | None = None,
    track: Sequence[str] = (),
) -> None:
    """Apply the options that only training has.

    Args:
        cfg (Config): The config, changed in place.
        resume (str, optional): A checkpoint to continue from, 'auto' for the last one of the work
            directory. Defaults to None.
        amp (str, optional): 'bf16', 'fp16', or 'off' for fp32. Defaults to None, the config's own
            precision.
        auto_scale_lr (bool): Whether to scale the learning rate with the batch size.
        no_validate (bool): Whether to leave validation out.
        checkpoint_minutes (float, optional): Save also whenever so many minutes have passed.
            Defaults to None, the config's own times.
        track (Sequence[str]): Experiment trackers, see :func:`.tracking.track_with`.

    Raises:
        ConfigError: If the config cannot do what was asked for.
    """
    if cfg.get('train_dataloader') is None or cfg.get('optim_wrapper') is None:
        raise ConfigError(
            f'config {cfg.filename} has no train_dataloader or no optim_wrapper, so '
            'it cannot be trained; take a config of configs/'
        )
    if resume is None and int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0:
        resume = 'auto'  # torchrun has started all processes again, as one of them died
    if resume is not None:
        cfg.resume = True
        cfg.load_from = None if resume == 'auto' else resume
    if amp is not None:
        _set_amp(cfg, amp)
    if auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise ConfigError(
                f'--auto-scale-lr: config {cfg.filename} does not say which batch '
                'size its learning rate is for; add '
                'auto_scale_lr=dict(base_batch_size=...)'
            )
        cfg.auto_scale_lr.enable = True
    if checkpoint_minutes is not None:
        if checkpoint_minutes <= 0:
            raise ConfigError(f'--checkpoint-minutes must be above 0, got {checkpoint_minutes}')
        cfg.merge_from_dict({'default_hooks.checkpoint.minutes': checkpoint_minutes})
    if track:
        track_with(cfg, track)
    if no_validate:
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None


def _set_amp(cfg: Config, amp: str) -> None:
    wrapper = cfg.optim_wrapper
    kind = type_name(wrapper, 'OptimWrapper')
    plain = PLAIN_WRAPPERS.get(kind, kind)
    if plain not in AMP_WRAPPERS:
        raise ConfigError(
            f'--amp: optim_wrapper.type is {kind!r}, which has no mixed precision '
            f'counterpart; use one of {", ".join(AMP_WRAPPERS)}, or leave --amp away'
        )
    if amp == 'off':
        for key in AMP_ARGUMENTS:
            wrapper.pop(key, None)
        wrapper.type = plain
        return
    wrapper.type = AMP_WRAPPERS[plain]
    wrapper.dtype = AMP_DTYPES[amp]
    # bf16 has the range of fp32, so its gradients need no scaling.
    wrapper.loss_scale = dict(enabled=False) if amp == 'bf16' else 'dynamic'
