"""Which state of this package a run was made with."""

import subprocess
from functools import cache
from pathlib import Path

from groupmamba_mm.version import __version__

_ROOT = Path(__file__).resolve().parents[2]


@cache
def describe_version() -> str:
    """Name the package's version and, in a checkout, its commit.

    Returns:
        str: For example '0.1.0', or '0.1.0 (commit 1a2b3c4, with changes)' in a checkout.
    """
    if not (_ROOT / '.git').exists():  # installed: a repository around it is another project's
        return __version__
    try:
        commit = _git('rev-parse', '--short', 'HEAD')
        changed = _git('status', '--porcelain', '--untracked-files=no')
    except (OSError, subprocess.SubprocessError):
        return f'{__version__} (commit unknown: git does not answer)'
    return f'{__version__} (commit {commit}{", with changes" if changed else ""})'


def _git(*arguments: str) -> str:
    return subprocess.run(
        ['git', '-C', str(_ROOT), *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=10,
    ).stdout.strip()
