"""Whether kernels run, or are only noted down to be compiled; see :mod:`.launch`."""

import contextlib
from collections.abc import Iterator

_noted: list | None = None
_shared_memory = 0


def noted() -> list | None:
    """Where launches are noted; None: they run."""
    return _noted


def shared_memory() -> int:
    """Of the GPU for which launches are noted, in bytes for a program."""
    return _shared_memory


@contextlib.contextmanager
def noting_launches(shared_memory: int) -> Iterator[list]:
    """Within it launches on any device are noted, each with all that is compiled for it.

    Args:
        shared_memory: Bytes that a program may take on the GPU that is meant.
    """
    global _noted, _shared_memory
    before = _noted, _shared_memory
    _noted, _shared_memory = [], shared_memory
    try:
        yield _noted
    finally:
        _noted, _shared_memory = before
