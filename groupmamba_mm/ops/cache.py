"""Files in Triton's cache on disk that say that a thing was done."""

import functools
import hashlib
from pathlib import Path

import torch
import triton


def directory() -> Path:
    """Triton's cache."""
    return Path(triton.knobs.cache.dir)


def marker(kind: str, *what: object) -> Path:
    """The file that says that something was done with this code and these versions.

    Args:
        kind: The file's ending.
        what: What else it depends on, with a ``repr`` that tells it apart.
    """
    identity = repr((what, triton.__version__, torch.__version__, _source_digest()))
    name = hashlib.sha256(identity.encode()).hexdigest()[:24]
    return directory() / f'groupmamba_mm-{name}.{kind}'


@functools.cache
def _source_digest() -> str:
    """Of this package's operators, on which every kernel depends."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob('*.py')):
        digest.update(path.read_bytes())
    return digest.hexdigest()
