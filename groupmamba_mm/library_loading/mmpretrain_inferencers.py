"""mmpretrain's inferencers: every tensor of our models must be given, or a warning is due."""

import warnings
from functools import wraps
from typing import Any

from mmpretrain.apis.base import BaseInferencer

from groupmamba_mm.checkpoint import load_checkpoint_file, state_dict_of
from groupmamba_mm.checkpoint.matching import require_share

from . import is_ours, report_of

_init = BaseInferencer.__init__


@wraps(_init)
def init(
    self: BaseInferencer, model: Any, pretrained: bool | str = True, *args: Any, **kwargs: Any
) -> None:
    """Build and load as mmpretrain does.

    Args:
        self: The inferencer.
        model: A name, a config, its file, or a model.
        pretrained: The checkpoint, or whether to take the one that belongs to the name.
        *args: See mmpretrain.
        **kwargs: See mmpretrain.

    Raises:
        CheckpointError: The checkpoint lacks a tensor of a model on our backbone, or would run
            code.
    """
    given = load_checkpoint_file(pretrained) if isinstance(pretrained, str) else None
    _init(self, model, pretrained, *args, **kwargs)
    if not is_ours(self.model):
        return
    if given is not None:
        require_share(report_of(self.model, state_dict_of(given)), 1.0, pretrained)
    elif isinstance(model, str):  # of a built model nobody knows where its weights are from
        warnings.warn(
            f'{type(self).__name__}({model!r}) has no checkpoint, so its weights are random; give '
            'one as pretrained=FILE',
            stacklevel=2,
        )


BaseInferencer.__init__ = init
