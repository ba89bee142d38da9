"""What OpenMMLab's own loaders do with models on our backbone: report, and refuse what does not fit.

mmengine's loader, which the libraries' ``get_model``, ``init_detector``, ``init_model`` and
inferencers go through, loads whatever fits, be it nothing, and continues. The modules of this package
are imported right behind the library's that they amend; models on other backbones load as before.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from groupmamba_mm.backbones import GroupMamba
from groupmamba_mm.checkpoint import LoadReport, expected_unused_keys, match_state_dict
from groupmamba_mm.checkpoint.matching import BATCH_COUNTERS

#: Share of a model's elements that a checkpoint has to fill: a new head is common in fine-tuning.
MIN_SHARE = 0.8


def is_ours(model: nn.Module) -> bool:
    """Whether a model has our backbone."""
    return any(isinstance(module, GroupMamba) for module in model.modules())


def report_of(model: nn.Module, state_dict: Mapping[str, Any]) -> LoadReport:
    """Compare a checkpoint with a model.

    Args:
        model: The model.
        state_dict: The checkpoint's tensors.

    Returns:
        What fits.
    """
    return match_state_dict(
        model.state_dict(), state_dict, [BATCH_COUNTERS], expected_unused_keys(model)
    )
