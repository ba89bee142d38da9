"""A config's model with the weights of a checkpoint that fits it whole."""

from pathlib import Path

from torch import nn

from groupmamba_mm.checkpoint import expected_unused_keys, load_matching
from groupmamba_mm.checkpoint.matching import BATCH_COUNTERS
from groupmamba_mm.extras import explain_missing
from groupmamba_mm.models.pretrained import read_weights

with explain_missing('models of configs'):
    from mmengine.config import Config

    from groupmamba_mm.analysis.building import build_model


def build_with_weights(cfg: Config, checkpoint: str | Path) -> nn.Module:
    """Build a config's model and load a checkpoint, every tensor of it.

    Args:
        cfg: The config. ``compile_mode`` and ``init_cfg`` of its backbone are left out.
        checkpoint: A file or address; a released one is converted on the way.

    Returns:
        The model on the CPU in eval mode. What was loaded is in the log.

    Raises:
        CheckpointError: The checkpoint cannot be read safely, or lacks a tensor of the model.
    """
    weights = read_weights(checkpoint)
    cfg = cfg.copy()
    cfg.model = cfg.model.copy()
    if cfg.model.get('backbone') is not None:
        cfg.model.backbone = dict(cfg.model.backbone, init_cfg=None)
        cfg.model.backbone.pop('compile_mode', None)
    model = build_model(cfg)
    load_matching(
        model,
        weights,
        source=str(checkpoint),
        min_matched_share=1.0,
        expected_missing=[BATCH_COUNTERS],
        expected_unused=expected_unused_keys(model),
    )
    return model.eval()
