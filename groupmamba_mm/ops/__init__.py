"""Operators: a slow reference and fast implementations behind one public function each."""

from .backend import BACKEND_NAMES, check_backend, explain_backend, resolve_backend
from .causal_conv1d import causal_conv1d_silu
from .grouped_ssm import grouped_ssm
from .selective_scan import DIRECTIONS, MIRRORED_DIRECTIONS, register_direction, selective_scan

__all__ = [
    'BACKEND_NAMES',
    'DIRECTIONS',
    'MIRRORED_DIRECTIONS',
    'causal_conv1d_silu',
    'check_backend',
    'explain_backend',
    'grouped_ssm',
    'register_direction',
    'resolve_backend',
    'selective_scan',
]
