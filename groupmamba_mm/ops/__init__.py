"""Operators: a slow reference and fast implementations behind one public function each."""
from .selective_scan import DIRECTIONS, check_backend, selective_scan

__all__ = ['DIRECTIONS', 'check_backend', 'selective_scan']
