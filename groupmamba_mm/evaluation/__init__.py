"""Metrics that mmseg lacks. Importing this package needs mmseg."""
from .foreground_iou import ForegroundIoUMetric

__all__ = ['ForegroundIoUMetric']
