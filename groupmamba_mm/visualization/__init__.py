"""Class names of any script in painted pictures."""

from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.visualization'):
    from .fonts import readable_names
    from .seg_visualizer import NamedSegVisualizer

__all__ = ['NamedSegVisualizer', 'readable_names']
