"""Operators: a slow reference and fast implementations behind one public function each."""
from .selective_scan import DIRECTIONS, selective_scan

__all__ = ['DIRECTIONS', 'selective_scan']
