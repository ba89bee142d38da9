"""mmengine's reader, which runs no code from a file, and its ``load_state_dict``, which refuses."""

import logging
from collections.abc import Mapping
from functools import wraps
from typing import Any

from mmengine.runner import checkpoint
from torch import nn

from groupmamba_mm.checkpoint.loading import load_from_safe_reader
from groupmamba_mm.checkpoint.matching import log_report, require_share

from . import MIN_SHARE, is_ours, report_of

_load_state_dict = checkpoint.load_state_dict


@wraps(_load_state_dict)
def load_state_dict(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    strict: bool = False,
    logger: logging.Logger | None = None,
) -> None:
    """See mmengine's function of that name.

    Args:
        module: The model.
        state_dict: The checkpoint's tensors.
        strict: Whether all of them must fit, instead of :data:`MIN_SHARE`.
        logger: Where the report goes; None: the current one.

    Raises:
        CheckpointError: Too little of a model on our backbone would be loaded.
    """
    while checkpoint.is_model_wrapper(module) or isinstance(module, checkpoint.BaseTTAModel):
        module = module.module
    if is_ours(module):
        report = report_of(module, state_dict)
        log_report(report, 'given to mmengine')
        require_share(report, 1.0 if strict else MIN_SHARE, 'given to mmengine')
    _load_state_dict(module, state_dict, strict, logger)


checkpoint.load_state_dict = load_state_dict
# mmengine's own falls back to the unsafe way when the safe one refuses a file
checkpoint.CheckpointLoader.register_scheme(
    ('', 'http://', 'https://'), load_from_safe_reader, force=True
)
