"""Imports that spare a run the seconds of libraries that it does not use.

A library that is installed is imported by others for a rare class of theirs, in every process of
every run: transformers by mmengine for the optimizer Adafactor, mmdet's models by mmpretrain for
``ResLayerExtraNorm``. Here both wait until somebody asks for them.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def without(module: str) -> Iterator[None]:
    """Inside, importing a module fails as if it were not installed; of no effect if it was imported
    before.

    Args:
        module: Full name of the module.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # as Python documents it: importing it raises ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules[module]


def import_mmengine() -> None:
    """Import mmengine without transformers, which its optimizer Adafactor imports when it is built."""
    if 'transformers' in sys.modules or 'mmengine.optim' in sys.modules:
        return
    if importlib.util.find_spec('transformers') is None:
        return
    with without('transformers'):
        registry = importlib.import_module('mmengine.optim').OPTIMIZERS
    if 'Adafactor' not in registry.module_dict:
        registry.register_module(name='Adafactor', module=_adafactor)


def _adafactor(params: Any, **options: Any) -> Any:
    """transformers' ``Adafactor`` of some parameters."""
    from transformers import Adafactor

    return Adafactor(params, **options)


def import_mmpretrain() -> None:
    """Import mmpretrain's models without mmdet's; see ``library_loading/mmdet_models.py``."""
    with without('mmdet.models'):
        importlib.import_module('mmpretrain.models')
