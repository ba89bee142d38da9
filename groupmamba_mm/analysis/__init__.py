"""Counting and building models for the tools of ``tools/analysis_tools``."""

from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.analysis'):
    from .building import build_model
    from .complexity import Complexity, count_complexity

__all__ = ['Complexity', 'build_model', 'count_complexity']
