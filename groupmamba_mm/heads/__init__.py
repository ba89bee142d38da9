"""Classification heads; importing this module registers them and needs mmpretrain."""

from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.heads'):
    from .two_head import TwoHeadClsHead

__all__ = ['TwoHeadClsHead']
