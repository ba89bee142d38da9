"""Classification heads; importing this module registers them and needs mmpretrain."""
from .two_head import TwoHeadClsHead

__all__ = ['TwoHeadClsHead']
