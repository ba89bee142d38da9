"""GroupMamba for OpenMMLab. Importing this package registers the backbone, nothing else."""
from .backbones import GroupMamba
from .version import __version__

__all__ = ['GroupMamba', '__version__']
