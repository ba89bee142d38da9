"""Read all of a config's data before a long run, and say what is wrong with it."""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing

from groupmamba_mm.checks import check
from groupmamba_mm.engine.cli import add_cfg_options, run_command
from groupmamba_mm.engine.config_checks import load_config

SPLITS = ('train', 'val', 'test')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument(
        '--splits',
        nargs='+',
        choices=SPLITS,
        default=['train', 'val'],
        help='what to read (default: train val)',
    )
    add_cfg_options(
        parser, 'change the config, for example train_dataloader.dataset.data_root=FOLDER'
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check and print.

    Args:
        argv: The arguments, None for the process's own.

    Raises:
        ConfigError: The config cannot be meant.
        DataError: Something is wrong with the data.
    """
    args = parse_args(argv)
    report, _ = check(load_config(args.config, args.cfg_options), args.splits, full=True)
    for line in report.lines():
        print(line)
    report.require_no_error()
    print(f'Nothing wrong was found ({len(report.of("warning"))} warnings).')


if __name__ == '__main__':
    run_command(main)
