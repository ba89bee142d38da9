"""Class names of any script in painted pictures."""
from .fonts import readable_names
from .seg_visualizer import NamedSegVisualizer

__all__ = ['NamedSegVisualizer', 'readable_names']
