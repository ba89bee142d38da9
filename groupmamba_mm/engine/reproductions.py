"""Steps that went wrong, saved to be run again."""

import importlib
import importlib.util
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

from groupmamba_mm.checkpoint import (
    CheckpointError,
    load_checkpoint_file,
    load_matched,
    match_state_dict,
)
from groupmamba_mm.checkpoint.matching import BATCH_COUNTERS, require_share

from .health import first_nonfinite
from .runner import without_amp

# Where the classes are that the libraries' batches are made of. They hold data and run no code
# when they are read.
_STRUCTURES = (
    'mmengine.structures',
    'mmpretrain.structures',
    'mmdet.structures',
    'mmdet.structures.bbox',
    'mmdet.structures.mask',
    'mmseg.structures',
)


def replay_step(cfg: Config, file: str | Path) -> str | None:
    """Run a saved training step again and find what was not finite first.

    Args:
        cfg (Config): The config that the training had.
        file (str or Path): A ``nonfinite_iter_*.pth`` of its work directory.

    Returns:
        str: The module and the tensor; None if all of it is finite here.

    Raises:
        CheckpointError: If the file is no such step, or its weights do not fit the config's model.
    """
    step = load_checkpoint_file(file, also_safe=structure_types())
    if 'batch' not in step:
        raise CheckpointError(
            f'{file} is no saved step: give a nonfinite_iter_*.pth of a work directory'
        )
    parts = dict(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        parts.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(parts).to(get_device())
        if hasattr(model, 'prepare_training'):
            model.prepare_training()
        report = match_state_dict(
            model.state_dict(), step['state_dict'], expected_missing=[BATCH_COUNTERS]
        )
        require_share(report, 1.0, str(file))
        load_matched(model, step['state_dict'], report)
        wrapper_cfg = cfg.optim_wrapper
        if get_device() == 'cpu':
            wrapper_cfg = without_amp(wrapper_cfg, MMLogger.get_current_instance())
        wrapper = build_optim_wrapper(model, wrapper_cfg)
    meta = step['meta']
    return first_nonfinite(
        model, wrapper, step['batch'], meta['seed'], meta['iteration'], meta['rank']
    )


def structure_types() -> list[type]:
    """List the classes that the installed libraries' batches are made of.

    Returns:
        list[type]: The classes.
    """
    types: list[type] = []
    for name in _STRUCTURES:
        if importlib.util.find_spec(name.split('.')[0]) is not None:
            types += [
                value
                for value in vars(importlib.import_module(name)).values()
                if isinstance(value, type) and not issubclass(value, torch.nn.Module)
            ]
    return types
