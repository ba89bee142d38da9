"""Print a config with all it inherits, checked as the other commands check it."""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing

from groupmamba_mm.engine.cli import add_cfg_options, run_command
from groupmamba_mm.inference import find_config


def main(argv: list[str] | None = None) -> None:
    """Load and print.

    Args:
        argv: The arguments, None for the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', metavar='CONFIG', help='config file, or the name of one of ours')
    add_cfg_options(parser, 'change the config, as in tools/train.py')
    args = parser.parse_args(argv)
    print(find_config(args.config, args.cfg_options).pretty_text)


if __name__ == '__main__':
    run_command(main)
