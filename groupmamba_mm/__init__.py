"""GroupMamba. Importing this package makes it known to the libraries in use; see ``registration``."""

from .backbones import GroupMamba
from .model_zoo import config_path, get_config, list_configs
from .models import GroupMambaClassifier, create_model
from .registration import register_with_libraries
from .version import __version__

__all__ = [
    'GroupMamba',
    'GroupMambaClassifier',
    '__version__',
    'config_path',
    'create_model',
    'get_config',
    'list_configs',
]

register_with_libraries()
