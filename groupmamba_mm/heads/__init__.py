"""Classification heads; importing this module registers them and needs mmpretrain."""

from groupmamba_mm.extras import explain_missing
from groupmamba_mm.quick_imports import import_mmpretrain

with explain_missing('groupmamba_mm.heads'):
    import_mmpretrain()
    from .two_head import TwoHeadClsHead

__all__ = ['TwoHeadClsHead']
