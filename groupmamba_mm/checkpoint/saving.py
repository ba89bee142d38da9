"""Write a checkpoint whole or not at all, and find the newest intact one."""

import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from groupmamba_mm.errors import CheckpointError

from .loading import load_checkpoint_file, read_checkpoint_meta

#: Where an interrupted write leaves what it has: such a file is never read.
PARTIAL_SUFFIX = '.partial'

# A disk, a quota or a limit of the process that is full.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(data: bytes | memoryview, target: str | Path) -> None:
    """Write a file that is there whole or, after any interruption, as it was before.

    Args:
        data (bytes or memoryview): The contents.
        target (str or Path): The file; one that exists is replaced. Its folder is made if needed.

    Raises:
        CheckpointError: If it cannot be written; nothing is left of it then.
    """
    target = Path(target)
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        _sync_folder(target.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(_not_written(target, len(data), error)) from error


def _sync_folder(folder: Path) -> None:
    """Let the new name reach the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_written(target: Path, size: int, error: OSError) -> str:
    reason = f'{target} was not written: {error.strerror}'
    if error.errno not in _FULL:
        return f'{reason}; give another folder with --work-dir, or make room in this one'
    free = shutil.disk_usage(target.parent).free
    return (
        f'{reason} (it needs {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free in '
        f'{target.parent}); the files before it are whole: make room and continue with --resume'
    )


def save_new_file(checkpoint: Any, target: str) -> None:
    """Save to a file that does not exist yet.

    Args:
        checkpoint: What :func:`torch.save` takes.
        target: The file. Its folder is made if needed.

    Raises:
        CheckpointError: If the file exists, or cannot be written.
    """
    if Path(target).exists():
        raise CheckpointError(f'{target} exists; give another name, or remove it')
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_whole(buffer.getbuffer(), target)


def newest_whole_checkpoint(folder: str | Path, warn: Callable[[str], None]) -> Path | None:
    """Find the checkpoint in a folder from which a training continues.

    It is the one that was saved at the last iteration, among the files that hold a training's
    state. The files themselves are asked: a folder may have been moved or copied, which changes
    times and makes the path in mmengine's file ``last_checkpoint`` wrong. That path counts where
    it leads out of the folder, to a checkpoint somewhere else.

    Args:
        folder (str or Path): The folder.
        warn (Callable): Told each file that is skipped because it is damaged.

    Returns:
        Path: The file, None if there is none.

    Raises:
        CheckpointError: If there are some and all of them are damaged.
    """
    damaged: list[str] = []
    found: list[tuple[int, Path]] = []
    for file in _candidates(Path(folder)):
        try:
            meta = read_checkpoint_meta(file)
        except CheckpointError as error:
            damaged.append(file.name)
            warn(f'{error}; it is skipped')
            continue
        if meta is not None:
            found.append((meta['iter'], file))
    for _, file in sorted(found, key=lambda pair: pair[0], reverse=True):
        try:
            load_checkpoint_file(file)
        except CheckpointError as error:
            damaged.append(file.name)
            warn(f'{error}; it is skipped')
        else:
            return file
    if damaged:
        raise CheckpointError(
            f'no checkpoint in {folder} is whole ({", ".join(damaged)} damaged), so the training '
            'cannot continue; bring back a copy of one, or start again in another folder (--work-dir)'
        )
    return None


def _candidates(folder: Path) -> list[Path]:
    files = sorted(folder.glob('*.pth'))
    pointer = folder / 'last_checkpoint'
    if pointer.is_file():
        named = Path(pointer.read_text().strip())
        if named.is_file() and not (folder / named.name).exists():
            files.append(named)
    return files
