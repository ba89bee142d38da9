"""Count the parameters and multiply-adds of one or several configs' models."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
from torch import nn

from groupmamba_mm.analysis import build_model, count_complexity
from groupmamba_mm.analysis.arguments import positive_int
from groupmamba_mm.analysis.complexity import CONVENTION, SCAN
from groupmamba_mm.analysis.detection import CONVENTION as TWO_STAGE
from groupmamba_mm.analysis.detection import is_two_stage, run_two_stage
from groupmamba_mm.engine.cli import add_cfg_options, run_command
from groupmamba_mm.engine.config_checks import load_config

NOTES = (
    CONVENTION,
    'whole model: all that its forward pass on an image executes, the classification head '
    'or the decode head included, but no auxiliary head, which works in training only',
    TWO_STAGE + '; of another detector the backbone alone is counted',
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__, epilog='. '.join(NOTES))
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='config file')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=positive_int,
        default=(224, 224),
        metavar=('H', 'W'),
        help='size of the image in pixels (default: 224 224)',
    )
    add_cfg_options(parser, 'change the configs, for example model.backbone.d_state=4')
    return parser.parse_args(argv)


def counted_parts(model: nn.Module, scope: str) -> list[tuple[str, nn.Module, Callable | None]]:
    """Choose what can be counted of a model.

    Args:
        model: The model.
        scope: The library that runs it.

    Returns:
        Names, modules, and how to run them: None for one whose forward takes images alone.
    """
    if scope == 'mmpretrain':
        return [('whole model', model, None)]
    parts = [('backbone', model.backbone, None)]
    if scope == 'mmseg':
        return [('whole model', model, None)] + parts
    return [('whole model', model, run_two_stage)] + parts if is_two_stage(model) else parts


def main(argv: list[str] | None = None) -> None:
    """Print a table with one line for each config and part.

    Args:
        argv: The arguments, None for the process's own.
    """
    args = parse_args(argv)
    rows = []
    for config in args.configs:
        cfg = load_config(config, args.cfg_options)
        model = build_model(cfg)
        for part, module, run in counted_parts(model, cfg.default_scope):
            found = count_complexity(module, tuple(args.shape), run=run)
            rows.append((Path(config).stem, part, found))

    # all at once, because the libraries log while a model is built
    width = max(len(name) for name, _, _ in rows)
    height, length = args.shape
    print(f'\nImage {height} x {length} (H x W), batch 1\n')
    print(f'{"config":{width}}  {"part":11}  {"params":>13}  {"MACs [G]":>9}  {"of it scans":>11}')
    for name, part, found in rows:
        print(
            f'{name:{width}}  {part:11}  {found.params:13,}  {found.macs / 1e9:9.3f}  '
            f'{found.macs_by_kind[SCAN] / 1e9:11.3f}'
        )
    print()
    for note in NOTES:
        print(f'{note[0].upper()}{note[1:]}.')


if __name__ == '__main__':
    run_command(main)
