"""Counting and building models for the tools of ``tools/analysis_tools``."""
from .building import build_model
from .complexity import Complexity, count_complexity

__all__ = ['Complexity', 'build_model', 'count_complexity']
