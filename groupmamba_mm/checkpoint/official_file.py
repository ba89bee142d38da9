"""Released checkpoints, which hold objects of foreign libraries beside their tensors."""
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import List, Tuple, Union

from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from groupmamba_mm.errors import CheckpointError
from .loading import load_checkpoint_file


def read_tensors(path: Union[str, Path]) -> dict:
    """Read a checkpoint; objects of unknown classes become plain dicts of what they hold.

    Training checkpoints of the released code hold an object of a config library, which
    :func:`groupmamba_mm.checkpoint.load_checkpoint_file` refuses. Here torch's restricted reader
    is told to make an ``OrderedDict`` wherever the file names a class or function that it does not
    know: nothing that the file names is imported or called.

    Args:
        path: A local file.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If the file is missing or truncated, holds no tensors, names what can run
            programs, or an object that no dict can stand for.
    """
    # numpy's numbers and arrays are known to load_checkpoint_file
    names = [name for name in _foreign_names(path) if not name.startswith('numpy')]
    with safe_globals([(OrderedDict, name) for name in names]):
        try:
            return load_checkpoint_file(path)
        except TypeError as error:
            raise CheckpointError(
                f'checkpoint {path} holds an object that no dict can stand for (one of {names}); '
                'save its model or model_ema alone, where the file can be trusted') from error


def _foreign_names(path: Union[str, Path]) -> List[str]:
    if not zipfile.is_zipfile(path):
        return []
    try:
        return get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError):
        return []  # damaged or of another pickle protocol, which load_checkpoint_file refuses


def pick_official_weights(checkpoint: dict) -> Tuple[dict, str]:
    """Find the weights in one of the two forms of a released checkpoint.

    Args:
        checkpoint: What :func:`read_tensors` returned.

    Returns:
        The tensors by their released names, and where they were: 'model_ema' if it is there (the
        averaged weights are the ones that were evaluated), else 'model', else 'flat'.
    """
    for form in ('model_ema', 'model'):
        if isinstance(checkpoint.get(form), dict):
            weights = checkpoint[form]
            break
    else:
        form, weights = 'flat', checkpoint
    # an averaged or distributed model is saved with its wrapper's name before each key
    return {key.removeprefix('module.'): value for key, value in weights.items()}, form
