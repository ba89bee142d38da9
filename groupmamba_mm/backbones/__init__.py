"""The backbone and its sizes."""

from .archs import ARCHS, Arch, resolve_arch
from .groupmamba import GroupMamba

__all__ = ['ARCHS', 'Arch', 'GroupMamba', 'resolve_arch']
