"""Metrics that mmseg lacks. Importing this package needs mmseg."""

from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.evaluation'):
    from .foreground_iou import ForegroundIoUMetric

__all__ = ['ForegroundIoUMetric']
