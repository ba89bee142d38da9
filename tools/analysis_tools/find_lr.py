"""Find a learning rate: train some steps with a rising rate, and see where the loss falls.

Writes a picture and a table (.csv) of loss over rate. The rate where the loss falls fastest, and a
tenth of the one where it is least, bound what is worth trying. A rate found so is for a short
training from the config's start, with its batch size.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing

from groupmamba_mm.analysis.arguments import png_path, positive_int
from groupmamba_mm.engine.cli import add_cfg_options, run_command
from groupmamba_mm.engine.lr_finder import find_lr, plot
from groupmamba_mm.inference import find_config


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', metavar='CONFIG', help='config file, or the name of one of ours')
    parser.add_argument('--low', type=float, default=1e-6, help='first rate (default: %(default)g)')
    parser.add_argument('--high', type=float, default=1.0, help='last rate (default: %(default)g)')
    parser.add_argument(
        '--steps',
        type=positive_int,
        default=200,
        help='(default: %(default)s, or until it diverges)',
    )
    parser.add_argument(
        '--out',
        type=png_path,
        help="picture to write (default: find_lr.png in the config's folder of work_dirs/find_lr)",
    )
    add_cfg_options(parser, 'change the config, as in tools/train.py')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, and write picture and table.

    Args:
        argv: The arguments, None for the process's own.
    """
    args = parse_args(argv)
    cfg = find_config(args.config, args.cfg_options)
    name = Path(args.config).stem
    work_dir = Path('work_dirs/find_lr') / name
    out = args.out or work_dir / 'find_lr.png'
    curve = find_lr(cfg, args.low, args.high, args.steps, str(work_dir))
    out.parent.mkdir(parents=True, exist_ok=True)
    plot(curve, name, str(out))
    with open(out.with_suffix('.csv'), 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['lr', 'loss', 'smoothed'])
        writer.writerows(zip(curve.lrs, curve.losses, curve.smooth))
    print(
        f'{len(curve.lrs)} steps from {curve.lrs[0]:.2g} to {curve.lrs[-1]:.2g}: the loss falls '
        f'fastest at {curve.steepest:.2g}, a tenth of where it is least is {curve.highest:.2g}. '
        f'The picture is {out}'
    )


if __name__ == '__main__':
    run_command(main)
