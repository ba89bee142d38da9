"""Checkpoints of other projects, which hold objects of foreign libraries beside their tensors."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from groupmamba_mm.errors import CheckpointError

from .loading import load_checkpoint_file, local_file, safe_types


def read_tensors(path: str | Path) -> dict:
    """Read a checkpoint; objects of unknown classes become plain dicts of what they hold.

    Training checkpoints of the released code hold an object of a config library, and DeiT's hold
    the parsed command line; :func:`groupmamba_mm.checkpoint.load_checkpoint_file` refuses both.
    Here torch's restricted reader is told to make an ``OrderedDict`` wherever the file names a
    class or function that it does not know: nothing that the file names is imported or called.

    Args:
        path: A local file or an address, as :func:`load_checkpoint_file` takes it.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If the file is missing or truncated, holds no tensors, names what can run
            programs, or an object that no dict can stand for.
    """
    file = local_file(path)
    known = {name for _, name in safe_types()}
    # what load_checkpoint_file knows it reads itself, and numpy is none of the foreign libraries
    names = [
        name for name in _foreign_names(file) if name not in known and not name.startswith('numpy')
    ]
    with safe_globals([(OrderedDict, name) for name in names]):
        try:
            return load_checkpoint_file(file)
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f'checkpoint {path} was not loaded: it needs one of {names}, which no plain '
                'dict can stand for and which could run code; save its tensors alone, where the '
                'file can be trusted, else do not use it'
            ) from error


def _foreign_names(file: Path) -> list[str]:
    if not zipfile.is_zipfile(file):
        return []
    try:
        return get_unsafe_globals_in_checkpoint(file)
    except (pickle.UnpicklingError, RuntimeError):
        return []  # damaged or of another pickle protocol, which load_checkpoint_file refuses
