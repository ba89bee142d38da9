"""GroupMamba. Importing this package makes it known to the libraries in use; see ``registration``."""

import importlib
from typing import TYPE_CHECKING, Any

from .backbones import GroupMamba
from .model_zoo import config_path, get_config, list_configs
from .registration import register_with_libraries
from .version import __version__

if TYPE_CHECKING:
    from .models import GroupMambaClassifier, create_model

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


def __getattr__(name: str) -> Any:
    # Imported when asked for: with huggingface_hub they take a third of a second, and commands on
    # configs use neither.
    if name in ('GroupMambaClassifier', 'create_model', 'models'):
        models = importlib.import_module('.models', __name__)
        return models if name == 'models' else getattr(models, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
