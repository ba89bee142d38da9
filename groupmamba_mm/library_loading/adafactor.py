"""mmengine's optimizer Adafactor, of transformers, which is imported when it is built."""

import importlib.util
import sys
from typing import Any

from mmengine.registry import OPTIMIZERS


def _adafactor(params: Any, **options: Any) -> Any:
    """transformers' ``Adafactor`` of some parameters."""
    from transformers import Adafactor

    return Adafactor(params, **options)


# mmengine has registered the class itself if transformers was imported before
if (
    'transformers' not in sys.modules
    and importlib.util.find_spec('transformers') is not None
    and 'Adafactor' not in OPTIMIZERS.module_dict
):
    OPTIMIZERS.register_module(name='Adafactor', module=_adafactor)
