"""Compare groups of training runs: curves with mean and shaded deviation, and a table.

Each group is a setting, its runs differ in the seed. The curves are read from the logs that
tools/train.py writes into every work directory.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing

from groupmamba_mm.analysis.curves import (
    Curve,
    curve_of,
    draw,
    mean_and_deviation,
    read_run,
    unit_of,
)
from groupmamba_mm.engine.cli import run_command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--group',
        nargs='+',
        action='append',
        required=True,
        dest='groups',
        metavar=('NAME', 'WORK_DIR'),
        help='a name and the work directories of its runs; give one for each group',
    )
    parser.add_argument(
        '--keys',
        nargs='+',
        default=['loss', 'accuracy/top1'],
        help='logged values, one panel each (default: %(default)s)',
    )
    parser.add_argument('--out', required=True, help='the picture to write, .png or .svg')
    args = parser.parse_args(argv)
    for name, *work_dirs in args.groups:
        if not work_dirs:
            parser.error(f'--group {name}: give the work directories after the name')
    return args


def make_table(groups: dict[str, dict[str, list[Curve]]], keys: list[str]) -> str:
    """Make a Markdown table of the last values: mean, sample standard deviation and each run's.

    Args:
        groups: The runs' curves by group and key.
        keys: The keys in the order of the columns.

    Returns:
        The table.
    """
    lines = [
        f'| | runs | {" | ".join(f"{key}, last" for key in keys)} |',
        '|---|---:|' + '---|' * len(keys),
    ]
    for name, curves in groups.items():
        cells = []
        for key in keys:
            last = [curve[max(curve)] for curve in curves[key]]
            _, means, deviations = mean_and_deviation([{0: value} for value in last])
            cells.append(
                f'{means[0]:.4g} +- {deviations[0]:.2g} '
                f'({", ".join(format(value, ".4g") for value in last)})'
            )
        lines.append(f'| {name} | {len(curves[keys[0]])} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> None:
    """Read, draw and print.

    Args:
        argv: The arguments, None for the process's own.
    """
    args = parse_args(argv)
    groups, units = {}, {}
    for name, *work_dirs in args.groups:
        runs = {work_dir: read_run(work_dir) for work_dir in work_dirs}
        units = {key: unit_of(runs[work_dirs[0]], key) for key in args.keys}
        groups[name] = {
            key: [curve_of(records, key, work_dir) for work_dir, records in runs.items()]
            for key in args.keys
        }
    draw(groups, units, args.out)
    print(make_table(groups, args.keys))
    print(f'Wrote {args.out}')


if __name__ == '__main__':
    run_command(main)
