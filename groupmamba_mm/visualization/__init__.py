"""Class names of any script in painted pictures. ``seg_visualizer`` is imported where mmseg is."""

from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.visualization'):
    from .fonts import readable_names

__all__ = ['readable_names']
