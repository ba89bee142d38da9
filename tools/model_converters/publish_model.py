"""Prepare a checkpoint for publishing: its weights, and what they were trained as.

The optimizer's state, schedules, logs and raw weights (where averaged ones are the model) are left
out; the config, names of classes, epoch and versions stay. The file's name ends with the beginning of its
SHA-256, which download tools compare. No code in the checkpoint is run, and none is needed to read the result.
"""

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing

from groupmamba_mm.checkpoint import load_checkpoint_file, state_dict_of
from groupmamba_mm.checkpoint.saving import save_new_file
from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.errors import CheckpointError

#: What of a checkpoint's meta information is kept.
KEPT = ('cfg', 'dataset_meta', 'epoch', 'experiment_name', 'iter', 'mmengine_version', 'time')


def publish(source: str, target: Path) -> Path:
    """Write the file.

    Args:
        source: A checkpoint file or address.
        target: The file without the hash in its name.

    Returns:
        The file.

    Raises:
        CheckpointError: The checkpoint cannot be read safely, or the file exists.
    """
    checkpoint = load_checkpoint_file(source)
    meta = checkpoint.get('meta') or {}
    published = dict(
        meta={key: meta[key] for key in KEPT if key in meta},
        state_dict={key: value.clone() for key, value in state_dict_of(checkpoint).items()},
    )
    partial = target.with_name(f'{target.name}.unnamed')
    save_new_file(published, str(partial))
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()[:8]
    named = target.with_name(f'{target.stem}-{digest}{target.suffix}')
    if named.exists():
        partial.unlink()
        raise CheckpointError(f'{named} exists, with the same content')
    return partial.rename(named)


def main(argv: list[str] | None = None) -> None:
    """Publish and say what.

    Args:
        argv: The arguments, None for the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', metavar='CHECKPOINT', help='checkpoint file or address')
    parser.add_argument('target', metavar='OUT.pth', type=Path, help='-<hash> is put before .pth')
    args = parser.parse_args(argv)
    path = publish(args.source, args.target)
    print(f'Wrote {path} ({path.stat().st_size / 1e6:.1f} MB)')


if __name__ == '__main__':
    run_command(main)
