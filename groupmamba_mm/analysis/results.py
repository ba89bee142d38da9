"""What tools/test.py wrote, and the data it is about."""

import pickle
from typing import Any

from mmengine.config import Config

from groupmamba_mm.checks import check_quickly
from groupmamba_mm.errors import ConfigError, DataError

# what pickle.load raises for a file that is no pickle
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    ValueError,
)


def read_results(path: str) -> list:
    """Read the pickle that ``tools/test.py --out`` writes of a classifier or a detector.

    Args:
        path: The pickle, which must come from a trusted place: unpickling can run code.

    Returns:
        An entry for each image, at least one.

    Raises:
        DataError: The file is missing, is no pickle or holds no list.
    """
    remedy = 'make it with tools/test.py CONFIG CHECKPOINT --out results.pkl'
    try:
        with open(path, 'rb') as file:
            samples = pickle.load(file)
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
