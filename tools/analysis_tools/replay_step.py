"""Repeat a training step whose loss or gradient was not finite, and name the first such tensor."""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing

from groupmamba_mm.engine.cli import add_cfg_options, run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.engine.reproductions import replay_step
from groupmamba_mm.engine.training import apply_train_options


def parse_args() -> argparse.Namespace:
    """Read the command line.

    Returns:
        argparse.Namespace: The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', metavar='CONFIG', help='config that the training had')
    parser.add_argument('step', metavar='STEP', help='nonfinite_iter_*.pth of its work directory')
    parser.add_argument(
        '--amp',
        nargs='?',
        choices=['bf16', 'fp16', 'off'],
        const='bf16',
        help="precision that the training had, if not the config's",
    )
    add_cfg_options(parser, 'the changes of the config that it had')
    return parser.parse_args()


def main() -> None:
    """Run the step and print what came out."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    apply_train_options(cfg, amp=args.amp)
    found = replay_step(cfg, args.step)
    print(f'Not finite: {found}' if found else 'All of it is finite on this device.')


if __name__ == '__main__':
    run_command(main)
