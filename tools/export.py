"""Export a trained model for other runtimes, and check the file against PyTorch.

Of a classifier the whole model is exported, from normalised images to logits; of a detector or a
segmenter the backbone, from normalised images to its maps. The file takes any number of images of
any size (ONNX from 9 x 9 pixels, torch-export from 33 x 33), unless --fixed.
"""

import argparse
import json
from pathlib import Path

import _environment  # noqa: F401, before what may be missing
from mmengine.config import Config
from torch import nn

from groupmamba_mm.analysis.arguments import image_size
from groupmamba_mm.engine.cli import add_cfg_options, run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.export import FORMATS, export_model, exported_module
from groupmamba_mm.inference import build_with_weights


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint file or address')
    parser.add_argument(
        '--format', choices=tuple(FORMATS), default='onnx', help='(default: %(default)s)'
    )
    parser.add_argument(
        '--out',
        type=Path,
        help="file to write (default: the config's name with "
        "the format's ending, in the current folder)",
    )
    parser.add_argument(
        '--size',
        type=image_size,
        default=(224, 224),
        metavar='HxW',
        help='size of the images it is recorded and checked with (default: 224)',
    )
    parser.add_argument(
        '--fixed',
        action='store_true',
        help='for one image of that size alone: a smaller file, quicker to write',
    )
    add_cfg_options(parser, 'change the config, as in tools/test.py')
    return parser.parse_args(argv)


def describe(cfg: Config, model: nn.Module) -> dict[str, str]:
    """What a user of the file has to know: the config, and how images are normalised."""
    facts = dict(config=Path(cfg.filename).name)
    normalise = getattr(model, 'data_preprocessor', None)
    if getattr(normalise, 'mean', None) is not None:
        facts['mean'] = json.dumps(normalise.mean.flatten().tolist())
        facts['std'] = json.dumps(normalise.std.flatten().tolist())
        facts['channels'] = 'RGB'
    return facts


def main(argv: list[str] | None = None) -> None:
    """Build, load, export and check.

    Args:
        argv: The arguments, None for the process's own.
    """
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    path = args.out or Path(Path(args.config).stem + FORMATS[args.format].suffix)
    model = build_with_weights(cfg, args.checkpoint)
    module, names = exported_module(model)
    result = export_model(
        module, names, args.format, path, args.size, args.fixed, describe(cfg, model)
    )
    print(
        f'Wrote {path} ({path.stat().st_size / 1e6:.1f} MB, {result.seconds:.0f} s): '
        + '; '.join(result.notes)
    )
    for shape, difference in result.differences.items():
        print(
            f'  images {"x".join(map(str, shape))}: differs from PyTorch by {difference:.1e} of '
            'the largest output'
        )
    theirs, ours = result.latency
    print(
        f'  one image {args.size[0]}x{args.size[1]} on this CPU: PyTorch {theirs:.1f} ms, '
        f'the file {ours:.1f} ms'
    )


if __name__ == '__main__':
    run_command(main)
