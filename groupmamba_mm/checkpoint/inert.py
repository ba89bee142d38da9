"""Read the tensors of a checkpoint beside pickled objects, without making those objects."""
import pickle
import types
from pathlib import Path
from typing import Any, Tuple, Union

import torch

from groupmamba_mm.errors import CheckpointError

#: All that a pickle may name and get: what tensors and plain containers are made of.
_ALLOWED = {
    ('collections', 'OrderedDict'), ('torch._utils', '_rebuild_tensor_v2'),
    ('torch._utils', '_rebuild_parameter'), ('torch', 'Size'), ('torch', 'device'),
}


class InertObject:
    """Stands for an object whose class was not imported. It keeps nothing and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    # a pickle fills subclasses of dict, list and set item by item
    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Drop the item."""

    extend = add = append


class _InertUnpickler(pickle.Unpickler):

    def find_class(self, module: str, name: str) -> Any:
        is_storage = module == 'torch' and name.endswith('Storage')
        if (module, name) in _ALLOWED or is_storage:
            return super().find_class(module, name)
        return InertObject


def read_tensors(path: Union[str, Path]) -> dict:
    """Read a checkpoint; whatever is no tensor, number, string or plain container becomes inert.

    Training checkpoints of the released code hold an object of a config library, which
    :func:`groupmamba_mm.checkpoint.load_checkpoint_file` refuses. Here no class or function that
    the file names is imported or called, but for those that tensors are made of.

    Args:
        path: A local file.

    Returns:
        The checkpoint, with an :class:`InertObject` in the place of each foreign object.

    Raises:
        CheckpointError: If the file is missing, truncated or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'checkpoint {path} does not exist; give the path of a file')
    # torch.load takes a module to unpickle with, of which it uses Unpickler and load
    reader = types.SimpleNamespace(
        __name__='inert', Unpickler=_InertUnpickler,
        load=lambda file, **options: _InertUnpickler(file, **options).load())
    try:
        checkpoint = torch.load(path, map_location='cpu', pickle_module=reader, weights_only=False)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, IndexError, ValueError,
            TypeError, AttributeError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise CheckpointError(
            f'checkpoint {path} ({path.stat().st_size} bytes) cannot be read: {reason}; it is '
            'truncated, damaged or no checkpoint: copy or download it again') from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'checkpoint {path} holds a {type(checkpoint).__name__} instead of '
                              'a dict of tensors; give a released checkpoint')
    return checkpoint


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
