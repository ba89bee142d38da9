"""Read the results of tools/test.py, and build their test data."""

import codecs
import io
import pickle
from collections import OrderedDict
from typing import Any

import torch
from mmengine.config import Config

from groupmamba_mm.checkpoint.loading import safe_types
from groupmamba_mm.checks import check_quickly
from groupmamba_mm.errors import ConfigError, DataError

# what unpickling raises for a file that is no pickle
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    ValueError,
)


class _SafeUnpickler(pickle.Unpickler):
    """Read containers, numbers, arrays and tensors, and nothing that could run code."""

    _allowed = {
        **{name: kind for kind, name in safe_types()},
        '_codecs.encode': codecs.encode,  # how protocol 2 writes bytes
        'collections.OrderedDict': OrderedDict,
        'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
        'torch.storage._load_from_bytes': lambda content: torch.load(
            io.BytesIO(content), weights_only=True
        ),
    }

    def find_class(self, module: str, name: str) -> Any:
        if f'{module}.{name}' not in self._allowed:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}, which could run code')
        return self._allowed[f'{module}.{name}']


def read_results(path: str) -> list:
    """Read the pickle that ``tools/test.py --out`` writes of a classifier or a detector.

    Args:
        path: The pickle.

    Returns:
        An entry for each image, at least one.

    Raises:
        DataError: The file is missing, is no pickle, asks for code or holds no list.
    """
    remedy = 'make it with tools/test.py CONFIG CHECKPOINT --out results.pkl'
    try:
        with open(path, 'rb') as file:
            samples = _SafeUnpickler(file).load()
    except FileNotFoundError as error:
        raise DataError(f'results {path} do not exist; {remedy}') from error
    except (OSError, *_UNPICKLING_ERRORS) as error:
        raise DataError(f'results {path} cannot be unpickled ({error}); {remedy}') from error
    if not isinstance(samples, list) or not samples:
        raise DataError(f'results {path} hold no list of predictions; {remedy}')
    return samples


def build_test_data(cfg: Config) -> Any:
    """Build a config's test data set.

    Args:
        cfg: The config.

    Returns:
        The data set, whose images are not read yet.

    Raises:
        ConfigError: The config has no test data.
        DataError: The data are not there.
    """
    if cfg.get('test_dataloader') is None:
        raise ConfigError(
            f'config {cfg.filename} has no test_dataloader, so there are no images '
            'to draw; give the config that the results are from'
        )
    return check_quickly(cfg, ('test',))[1]['test']
