"""Grouped directional selective scan: the operator of Eq. 1-2 and 6."""

from .directions import (
    DIRECTIONS,
    check_directions,
    from_scan_order,
    group_from_scan_order,
    group_to_scan_order,
    to_scan_order,
)
from .interface import BACKENDS, selective_scan

__all__ = [
    'BACKENDS',
    'DIRECTIONS',
    'check_directions',
    'from_scan_order',
    'group_from_scan_order',
    'group_to_scan_order',
    'selective_scan',
    'to_scan_order',
]
