"""mmengine's base of mmdet's and mmseg's inferencers: our configs by name, checked checkpoints.

Every tensor of a model of ours must be given.

Where no checkpoint is given, the inferencers warn themselves.
"""

from functools import wraps
from typing import Any

from mmengine.config import Config
from mmengine.infer.infer import BaseInferencer
from torch import nn

from groupmamba_mm.checkpoint import load_checkpoint_file, state_dict_of
from groupmamba_mm.checkpoint.matching import require_share
from groupmamba_mm.model_zoo import get_config, list_configs

from . import is_ours, report_of

_init_model = BaseInferencer._init_model


@wraps(_init_model)
def init_model(self: BaseInferencer, cfg: Any, weights: str | None, *args: Any) -> nn.Module:
    """Build and load as mmengine does.

    Args:
        self: The inferencer.
        cfg: The config.
        weights: The checkpoint, None for none.
        *args: The device.

    Returns:
        The model.

    Raises:
        CheckpointError: The checkpoint lacks a tensor of a model on our backbone, or would run
            code.
    """
    given = None if weights is None else state_dict_of(load_checkpoint_file(weights))
    model = _init_model(self, cfg, weights, *args)
    if given is not None and is_ours(model):
        require_share(report_of(model, given), 1.0, weights)
    return model


_load_model_from_metafile = BaseInferencer._load_model_from_metafile


@wraps(_load_model_from_metafile)
def load_by_name(self: BaseInferencer, model: str) -> tuple[Config, str | None]:
    """Find a config of ours by name, else as mmengine does.

    Args:
        self: The inferencer.
        model: The name.

    Returns:
        The config, and the weights that its metafile names: of ours none are published.
    """
    if model in list_configs():
        return get_config(model), None
    return _load_model_from_metafile(self, model)


BaseInferencer._init_model = init_model
BaseInferencer._load_model_from_metafile = load_by_name
