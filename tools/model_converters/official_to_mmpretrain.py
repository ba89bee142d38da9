"""Turn a released GroupMamba checkpoint into one for configs/groupmamba/groupmamba-official-*.

Takes both forms: the flat state dict, and the training checkpoint with 'model' and 'model_ema', of
which the averaged weights are taken. No code in the file is run. Every tensor must be understood,
and none may be missing.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import torch

from groupmamba_mm.backbones import ARCHS, GroupMamba
from groupmamba_mm.checkpoint import convert_official, match_state_dict, read_tensors
from groupmamba_mm.checkpoint.official import pick_official_weights
from groupmamba_mm.checkpoint.saving import save_new_file
from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.errors import CheckpointError
from groupmamba_mm.version import __version__


def detect_arch(weights: dict, source: str) -> str:
    """Name the released size that a state dict has.

    Args:
        weights: Tensors by their released names.
        source: Name of the checkpoint, for the message.

    Returns:
        A name out of ``ARCHS``.

    Raises:
        CheckpointError: If it has the widths and depths of none of them.
    """
    dims = tuple(
        len(weights[key])
        for key in (f'patch_embed{i}.proj.weight' for i in range(1, 5))
        if key in weights
    )
    depths = tuple(
        len({key.split('.')[1] for key in weights if key.startswith(f'block{i}.')})
        for i in range(1, 5)
    )
    released = {name: arch for name, arch in ARCHS.items() if arch.family == 'official'}
    for name, arch in released.items():
        if (arch.embed_dims, arch.depths) == (dims, depths):
            return name
    sizes = '; '.join(
        f'{name}: widths {arch.embed_dims}, depths {arch.depths}' for name, arch in released.items()
    )
    raise CheckpointError(
        f'checkpoint {source} has widths {dims} and depths {depths}, which is '
        f'none of the released sizes ({sizes}); give a released checkpoint'
    )


def convert(source: str, target: str) -> str:
    """Convert a file.

    Args:
        source: A released checkpoint.
        target: Where to write ours; an existing file is refused.

    Returns:
        What was done, in one line.

    Raises:
        CheckpointError: If the source cannot be read or is not exactly a released model, or the
            target exists.
    """
    weights, form = pick_official_weights(read_tensors(source))
    arch = detect_arch(weights, source)
    try:
        ours = convert_official(weights)
    except ValueError as error:
        raise CheckpointError(f'checkpoint {source}: {error}') from error
    num_classes, width = weights['head.weight'].shape if 'head.weight' in weights else (0, 0)
    wanted = {f'backbone.{k}': v for k, v in GroupMamba(arch).state_dict().items()}
    for head in ('label_fc', 'teacher_fc'):
        wanted[f'head.{head}.weight'] = torch.empty(num_classes, width, device='meta')
        wanted[f'head.{head}.bias'] = torch.empty(num_classes, device='meta')
    report = match_state_dict(wanted, ours)
    if not report.complete or report.unexpected:
        details = '; '.join(str(report).splitlines())
        raise CheckpointError(
            f'checkpoint {source} is not exactly {arch}: {details}; give a whole '
            'released checkpoint'
        )
    meta = dict(
        groupmamba_mm=__version__,
        converted_from=Path(source).name,
        weights=form,
        arch=arch,
        num_classes=num_classes,
    )
    save_new_file(dict(meta=meta, state_dict=ours), target)
    where = {
        'flat': 'a flat state dict',
        'model': "'model'",
        'model_ema': "'model_ema', the averaged weights",
    }[form]
    return (
        f'Wrote {target}: {arch}, {num_classes} classes, {len(ours)} tensors out of '
        f'{len(weights)} of {where}'
    )


def main() -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='released checkpoint')
    parser.add_argument('target', help='file to write')
    args = parser.parse_args()
    print(convert(args.source, args.target))


if __name__ == '__main__':
    run_command(main)
