"""Turn a checkpoint of configs/groupmamba/groupmamba-official-* into the released, flat form."""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing

from groupmamba_mm.checkpoint import (
    CheckpointError,
    load_checkpoint_file,
    revert_to_official,
    state_dict_of,
)
from groupmamba_mm.checkpoint.saving import save_new_file
from groupmamba_mm.engine.cli import run_command


def convert(source: str, target: str) -> str:
    """Convert a file.

    Args:
        source: A checkpoint of this project, of the official family.
        target: Where to write the released form; an existing file is refused.

    Returns:
        What was done, in one line.

    Raises:
        CheckpointError: If the source cannot be read or has other tensors than a released model,
            or the target exists.
    """
    try:
        weights = revert_to_official(state_dict_of(load_checkpoint_file(source)))
    except ValueError as error:
        raise CheckpointError(f'checkpoint {source}: {error}') from error
    save_new_file(weights, target)
    return f'Wrote {target}: {len(weights)} tensors by their released names, a flat state dict'


def main() -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='checkpoint of an official config')
    parser.add_argument('target', help='file to write')
    args = parser.parse_args()
    print(convert(args.source, args.target))


if __name__ == '__main__':
    run_command(main)
