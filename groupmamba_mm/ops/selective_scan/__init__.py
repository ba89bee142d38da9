"""Grouped directional selective scan: the operator of Eq. 1-2 and 6."""

from .directions import (
    DIRECTIONS,
    MIRRORED_DIRECTIONS,
    check_directions,
    from_scan_order,
    group_from_scan_order,
    group_to_scan_order,
    register_direction,
    to_scan_order,
)
from .interface import BACKENDS, selective_scan

__all__ = [
    'BACKENDS',
    'DIRECTIONS',
    'MIRRORED_DIRECTIONS',
    'check_directions',
    'from_scan_order',
    'group_from_scan_order',
    'group_to_scan_order',
    'register_direction',
    'selective_scan',
    'to_scan_order',
]
