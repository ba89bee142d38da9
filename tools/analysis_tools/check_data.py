"""Read all of a config's data before a long run, and say what is wrong with it."""

import argparse
import sys

try:
    import mmengine  # noqa: F401

    import groupmamba_mm  # noqa: F401
except ModuleNotFoundError as error:  # the commonest first step that is left out
    sys.exit(
        f'error: {sys.executable} has no {error.name}; activate the environment that '
        'tools/install.sh made (source .venv/bin/activate), or run bash tools/install.sh'
    )

from groupmamba_mm.checks import check
from groupmamba_mm.engine.cli import CfgOptions, run_command
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
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        default={},
        metavar='KEY=VALUE',
        help='change the config, for example train_dataloader.dataset.data_root=FOLDER',
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
