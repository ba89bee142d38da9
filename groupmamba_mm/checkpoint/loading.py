"""Read checkpoint files without ever running code from them."""

import errno
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import urllib.error
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor, distributed

from groupmamba_mm.errors import CheckpointError
from groupmamba_mm.extras import explain_missing
from groupmamba_mm.log import write_log

CHECKPOINT_SUFFIXES = ('.pth', '.pt', '.ckpt', '.bin', '.safetensors')
# Where the tensors of a checkpoint are kept: averaged ones of timm's trainings and the released
# code's, then mmengine's name (whose averaged ones are in it), then timm's.
STATE_DICT_KEYS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
#: How the table of a checkpoint in several files ends, as the Hugging Face libraries write it.
INDEX_SUFFIX = '.index.json'
# The numpy types that a HistoryBuffer or a data set's meta information can hold.
_NUMPY_TYPES = (
    np.bool_,
    np.int8,
    np.int16,
    np.int32,
    np.int64,
    np.uint8,
    np.uint16,
    np.uint32,
    np.uint64,
    np.float16,
    np.float32,
    np.float64,
    np.str_,
)
_HISTORY_METHODS = ('min', 'max', 'current', 'mean')
_HISTORY_BUFFER = 'mmengine.logging.history_buffer.HistoryBuffer'


def load_checkpoint_file(
    path: str | Path,
    map_location: str | torch.device | Callable = 'cpu',
    also_safe: Sequence[type] = (),
) -> dict:
    """Read a checkpoint from a file or an address, running no code from it.

    The file is read with ``weights_only=True`` and, for this one call, an allow-list of the types
    that mmengine's own checkpoints hold beside tensors: the message hub's history buffers and the
    numpy arrays and numbers in them. A file of safetensors is read too; it holds tensors only. Of a
    checkpoint in several files its table (``*.index.json``) is given.

    Args:
        path (str or Path): A local file, or an ``http://``, ``https://`` or ``file://`` address;
            a downloaded file is kept in torch hub's folder.
        map_location (str, torch.device or Callable): As in :func:`torch.load`. Defaults to 'cpu'.
        also_safe (Sequence[type]): Classes that may be in the file too, which hold data and run no
            code when they are read. Defaults to none.

    Returns:
        dict: The checkpoint as it was saved. :func:`state_dict_of` finds the tensors in it.

    Raises:
        CheckpointError: If the file is missing or truncated, would run code, or holds no tensors.
    """
    file = local_file(path)
    if file.name.endswith(INDEX_SUFFIX):
        return _read_parts(file, map_location)
    _require_checksums(file)
    checkpoint = _load_safely(file, also_safe, map_location=map_location)
    if not isinstance(checkpoint, dict) or not _has_tensors(checkpoint):
        raise CheckpointError(
            f'{file} ({file.stat().st_size} bytes) is no checkpoint: it holds '
            f'{_describe(checkpoint)} and no tensors; give a file saved by tools/train.py or one '
            'with a state_dict in it'
        )
    return checkpoint


def _read_parts(index: Path, map_location: str | torch.device | Callable) -> dict:
    """The tensors of a checkpoint in several files, which its table names."""
    try:
        places = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f'{index} is no table of a checkpoint in several files: it has no weight_map'
        ) from error
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        part = load_checkpoint_file(index.parent / Path(name).name, map_location)
        tensors.update((key, value) for key, value in part.items() if places.get(key) == name)
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise CheckpointError(
            f'the files that {index} names lack {len(missing)} of its tensors, {missing[0]} among '
            'them; copy or download them again'
        )
    return tensors


def read_checkpoint_meta(path: str | Path) -> dict | None:
    """Read what a checkpoint says about the training that saved it, without reading its tensors.

    Args:
        path (str or Path): A local file.

    Returns:
        dict: Its 'meta' with 'epoch' and 'iter'; None if no training can be resumed from the file.

    Raises:
        CheckpointError: If the file is damaged or would run code.
    """
    checkpoint = map_checkpoint(path)
    resumable = {'meta', 'message_hub', 'optimizer'}
    if not isinstance(checkpoint, dict) or not resumable <= checkpoint.keys():
        return None
    return checkpoint['meta']


def map_checkpoint(path: str | Path) -> Any:
    """Read a checkpoint, and of its tensors shapes and types only: their values when they are used.

    Args:
        path (str or Path): A local file, which must stay as it is while the tensors live.

    Returns:
        Any: What was saved.

    Raises:
        CheckpointError: If the file is damaged or would run code.
    """
    _require_checksums(Path(path), of='.pkl')  # not of the tensors, which take their time
    return _load_safely(Path(path), (), map_location='cpu', mmap=zipfile.is_zipfile(path))


def _require_checksums(file: Path, of: str = '') -> None:
    """Compare the parts of a file with the checksums that torch wrote beside them.

    torch itself does not when it reads. Files from before its zip format have none.

    Args:
        file (Path): The checkpoint.
        of (str): What the names of the parts end in.
    """
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            parts = [part for part in archive.namelist() if part.endswith(of)]
            wrong = next((part for part in parts if not _is_whole(archive, part)), None)
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        OSError,
        EOFError,
        UnicodeDecodeError,
    ) as error:
        raise CheckpointError(_damaged(file, file.stat().st_size)) from error
    if wrong is not None:
        raise CheckpointError(
            f'checkpoint {file} is damaged: its part {wrong} does not have the '
            'checksum it was saved with; copy or download it again, or use an '
            'earlier checkpoint'
        )


def _is_whole(archive: zipfile.ZipFile, part: str) -> bool:
    try:
        with archive.open(part) as opened:
            while opened.read(2**20):  # the last piece is followed by the comparison
                pass
    except zipfile.BadZipFile:
        return False
    return True


#: What a byte that is wrong in a pickle can end in, beside ``UnpicklingError``.
_OF_DAMAGED_PICKLES = (EOFError, LookupError, OverflowError, UnicodeError, struct.error)


def _load_safely(file: Path, also_safe: Sequence[type], **options: Any) -> Any:
    """:func:`torch.load` of what runs no code, with errors that name the file."""
    size = file.stat().st_size
    if size == 0:
        raise CheckpointError(f'checkpoint {file} is empty (0 bytes); copy or download it again')
    _refuse_other_files(file, size)
    if _is_safetensors(file, size):
        return _read_safetensors(file, size)
    try:
        with torch.serialization.safe_globals([*safe_types(), *also_safe]):
            return torch.load(file, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        refused = _refused_global(str(error))
        if refused is None:
            raise CheckpointError(_damaged(file, size)) from error
        raise CheckpointError(
            f'checkpoint {file} was not loaded: it needs {refused}, which could run code; '
            'if you made the file yourself, save its tensors again with '
            "torch.save({'state_dict': model.state_dict()}, new_file), else do not use it"
        ) from error
    except _OF_DAMAGED_PICKLES as error:
        raise CheckpointError(_damaged(file, size)) from error
    except RuntimeError as error:
        # torch reports a damaged archive as a plain RuntimeError, and a missing device too.
        if 'PytorchStreamReader' not in str(error) and 'zip archive' not in str(error):
            raise
        raise CheckpointError(_damaged(file, size)) from error
    except OSError as error:
        # What seeking before the start of a file that is too short ends in.
        if error.errno != errno.EINVAL:
            raise
        raise CheckpointError(_damaged(file, size)) from error


def state_dict_of(checkpoint: dict) -> dict:
    """Find the tensors in a checkpoint.

    Args:
        checkpoint (dict): What :func:`load_checkpoint_file` returned.

    Returns:
        dict: The value of the first of :data:`STATE_DICT_KEYS` that is there, or the checkpoint
        itself when it is a bare state dict.
    """
    for key in STATE_DICT_KEYS:
        if isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    return checkpoint


def load_all_safely() -> None:
    """Make torch refuse to run code from any file that this process reads from here on.

    mmengine's own reader, which ``init_cfg`` of any module and the libraries' model zoos go
    through, is :func:`load_checkpoint_file` as soon as this package and mmengine are imported.
    """
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'


def load_from_safe_reader(filename: str, map_location: Any = 'cpu') -> dict:
    """:func:`load_checkpoint_file` as mmengine's registry of loaders calls it.

    Args:
        filename (str): A file or an address.
        map_location (Any): As in :func:`torch.load`. Defaults to 'cpu'.

    Returns:
        dict: The checkpoint.
    """
    return load_checkpoint_file(filename, map_location)


#: How files begin that stand where a checkpoint should: the bytes, what they are, the remedy.
_OTHER_FILES = (
    (
        b'version https://git-lfs',
        'a Git LFS pointer, which stands for the real file',
        'fetch that with git lfs pull',
    ),
    (
        b'<',
        'an HTML or XML page, perhaps one of an error or a login',
        'download the file itself, with the address of the download button',
    ),
    (b'{', 'a text in JSON', 'give the weights, not their description'),
    (b'\x1f\x8b', 'compressed with gzip', 'unpack it with gunzip or tar -xzf'),
    (b'BZh', 'compressed with bzip2', 'unpack it with bunzip2'),
    (b'\xfd7zXZ', 'compressed with xz', 'unpack it with unxz'),
    (b'\x28\xb5\x2f\xfd', 'compressed with zstd', 'unpack it with unzstd'),
    (b'7z\xbc\xaf', 'a 7z archive', 'unpack it'),
    (b'Rar!', 'a RAR archive', 'unpack it'),
    (b'\x89HDF', 'an HDF5 file, as Keras writes them', 'give a checkpoint of PyTorch'),
    (b'GGUF', 'a GGUF file of a language model', 'give a checkpoint of PyTorch'),
    (b'\x93NUMPY', 'an array of numpy', 'give a checkpoint of PyTorch'),
)


def _refuse_other_files(file: Path, size: int) -> None:
    """Name files for what they are, where torch would call them damaged."""
    with open(file, 'rb') as opened:
        start = opened.read(64).removeprefix(b'\xef\xbb\xbf').lstrip()
    for mark, kind, remedy in _OTHER_FILES:
        if start.startswith(mark):
            raise CheckpointError(f'{file} ({size} bytes) is no checkpoint but {kind}; {remedy}')
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if not any(name.endswith(('data.pkl', 'constants.pkl')) for name in names):
            raise CheckpointError(
                f'{file} ({size} bytes) is no checkpoint but a ZIP archive of '
                f'{", ".join(names[:3])}; unpack it, and give the checkpoint in '
                'it'
            )
    elif tarfile.is_tarfile(file) and b'torch' not in start:
        with tarfile.open(file) as archive:
            names = archive.getnames()
        if 'pickle' not in names:  # PyTorch's own format before 0.1.10
            raise CheckpointError(
                f'{file} ({size} bytes) is no checkpoint but a tar archive of '
                f'{", ".join(names[:3])}; unpack it with tar -xf'
            )


def _is_safetensors(file: Path, size: int) -> bool:
    with open(file, 'rb') as opened:
        start = opened.read(9)
    return (
        len(start) == 9
        and start[8:] == b'{'
        and (file.suffix == '.safetensors' or int.from_bytes(start[:8], 'little') < size)
    )


def _read_safetensors(file: Path, size: int) -> dict:
    with explain_missing(f'checkpoint {file}'):
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(_damaged(file, size)) from error


def _has_tensors(checkpoint: dict) -> bool:
    # below any key: a released checkpoint may have its weights under 'model_ema' alone
    parts = [checkpoint, *(part for part in checkpoint.values() if isinstance(part, dict))]
    return any(isinstance(value, torch.Tensor) for part in parts for value in part.values())


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        keys = [str(key) for key in list(value)[:5]]
        return f'a dict with the keys {keys}'
    return f'a {type(value).__name__}'


def _damaged(file: Path, size: int) -> str:
    return (
        f'checkpoint {file} is truncated or damaged ({size} bytes); compare its size with '
        'the original and copy or download it again, or use an earlier checkpoint'
    )


def _refused_global(message: str) -> str | None:
    """Find the name that the safe reader refused, None if it refused nothing."""
    found = re.search(
        r'(?:GLOBAL|reduce for unrecognized function|new object for .*but got|'
        r'Can only build .*but got) <?(?:class |function |built-in function )?'
        r"'?([\w.]+)",
        message,
    )
    return None if found is None else found.group(1)


class _History:
    """Stands for :class:`HistoryBuffer` where mmengine is not installed, to read past it."""

    min = max = current = mean = None


def _history_buffer() -> type:
    try:
        from mmengine.logging import HistoryBuffer
    except ModuleNotFoundError:
        return _History
    return HistoryBuffer


def _history_method(owner: type, name: str) -> Callable | None:
    """Stand in for ``getattr`` while a checkpoint is read.

    A history buffer is saved with its statistics as ``getattr(HistoryBuffer, 'mean')``. The real
    ``getattr`` would reach any module from there, so this one knows these four names only.

    Args:
        owner (type): Must be mmengine's :class:`HistoryBuffer`.
        name (str): 'min', 'max', 'current' or 'mean'.

    Returns:
        Callable: The method.

    Raises:
        pickle.UnpicklingError: For any other attribute.
    """
    if owner is not _history_buffer() or name not in _HISTORY_METHODS:
        raise pickle.UnpicklingError(f'unsupported GLOBAL getattr.{name}')
    return getattr(owner, name)


def safe_types() -> list[tuple[Callable, str]]:
    """List the types of mmengine's checkpoints, each with the name it is saved under."""
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    allowed: list[tuple[Any, str]] = [
        (_history_buffer(), _HISTORY_BUFFER),
        (_history_method, 'builtins.getattr'),
        # Protocol 2 writes Python 2's name for it.
        (_history_method, '__builtin__.getattr'),
        (np.ndarray, 'numpy.ndarray'),
        (np.dtype, 'numpy.dtype'),
    ]
    # numpy 2 renamed its core; files of either are read by either.
    for core in ('numpy.core', 'numpy._core'):
        allowed.append((scalar, f'{core}.multiarray.scalar'))
        allowed.append((reconstruct, f'{core}.multiarray._reconstruct'))
    for numpy_type in _NUMPY_TYPES:
        dtype_class = type(np.dtype(numpy_type))
        allowed.append((dtype_class, f'numpy.dtypes.{dtype_class.__name__}'))
    return allowed


def local_file(path: str | Path) -> Path:
    """Find a checkpoint on this machine, downloading it first if it is an address.

    Args:
        path (str or Path): As in :func:`load_checkpoint_file`.

    Returns:
        Path: The file, which exists.

    Raises:
        CheckpointError: If there is no such file, or it could not be downloaded.
    """
    path = str(path)
    scheme = urlparse(path).scheme
    if scheme in ('http', 'https'):
        return _download(path)
    if scheme == 'file':
        path = urlparse(path).path
    elif '://' in path:
        raise CheckpointError(
            f'checkpoint {path}: addresses of the kind {scheme}:// are not '
            'read; download it and give the local file'
        )
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f'checkpoint {file} does not exist; {_what_is_near(file)}')
    return file


def _what_is_near(file: Path) -> str:
    """Say which checkpoints lie where a missing one was looked for."""
    folder = file if file.is_dir() else file.parent
    if not folder.is_dir():
        return f'nor does its folder {folder}'
    near = sorted(entry.name for entry in folder.iterdir() if entry.suffix in CHECKPOINT_SUFFIXES)
    if not near:
        return f'there are no checkpoints in {folder}'
    shown = ', '.join(near[:8]) + (f' and {len(near) - 8} more' if len(near) > 8 else '')
    return f'the checkpoints in {folder} are {shown}'


def _download(url: str) -> Path:
    """Fetch an address once per machine into torch hub's folder."""
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / os.path.basename(urlparse(url).path)
    is_distributed = distributed.is_available() and distributed.is_initialized()
    if not is_distributed or distributed.get_rank() == 0:
        _download_missing(url, file)
    if is_distributed:
        distributed.barrier()
        # Ranks of another machine have another folder.
        _download_missing(url, file)
    return file


def _download_missing(url: str, file: Path) -> None:
    if file.is_file():
        return
    # OpenMMLab and torchvision put the start of the hash into the name.
    named_hash = torch.hub.HASH_REGEX.search(file.name)
    write_log(f'Downloading {url} to {file}')
    try:
        torch.hub.download_url_to_file(
            url,
            str(file),
            hash_prefix=named_hash and named_hash.group(1),
            progress=sys.stderr.isatty(),
        )
    except (urllib.error.URLError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f'checkpoint {url} could not be downloaded ({error}); check the '
            'address, or fetch it by hand and give the local file'
        ) from error
