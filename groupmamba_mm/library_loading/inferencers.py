"""mmengine's base of mmdet's and mmseg's inferencers: every tensor of our models must be given.

Where no checkpoint is given, the inferencers warn themselves.
"""

from functools import wraps
from typing import Any

from mmengine.infer.infer import BaseInferencer
from torch import nn

from groupmamba_mm.checkpoint import load_checkpoint_file, state_dict_of
from groupmamba_mm.checkpoint.matching import require_share

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


BaseInferencer._init_model = init_model
