"""Train a model of a config: classification, detection or segmentation."""

import argparse
import time

import _environment  # noqa: F401, before what may be missing
from mmengine.registry import RUNNERS

import groupmamba_mm.engine  # noqa: F401, registers the runner
from groupmamba_mm.checkpoint import load_checkpoint_file
from groupmamba_mm.checks import build_quickly, check_quickly
from groupmamba_mm.checks.dry_run import dry_run, hand_over
from groupmamba_mm.engine.cli import add_shared_arguments, is_first_here, run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.engine.tracking import TRACKERS
from groupmamba_mm.engine.training import apply_train_options, set_common_options
from groupmamba_mm.engine.warm_up import warm_up_ahead


def parse_args() -> argparse.Namespace:
    """Read the command line.

    Returns:
        argparse.Namespace: The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from a checkpoint, without a value from the newest intact '
        'one in the work directory',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate from the config's base batch size to "
        'the real one, accumulated steps counted',
    )
    parser.add_argument(
        '--checkpoint-minutes',
        type=float,
        metavar='MINUTES',
        help='save also whenever so many minutes have passed',
    )
    parser.add_argument(
        '--track',
        nargs='+',
        choices=list(TRACKERS),
        default=[],
        help='report scalars, learning rates and example predictions to these',
    )
    parser.add_argument('--no-validate', action='store_true', help='do not validate on the way')
    parser.add_argument(
        '--dry-run',
        action='store_true',
        help='build all, take two steps, validate one batch, write and read a '
        'checkpoint, report time, memory and learning rate, and exit',
    )
    add_shared_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Check the config and the data, rehearse, then train."""
    args = parse_args()
    start = time.monotonic()
    warm_up_ahead()
    cfg = load_config(args.config, args.cfg_options)
    apply_train_options(
        cfg,
        args.resume,
        args.amp,
        args.auto_scale_lr,
        args.no_validate,
        args.checkpoint_minutes,
        args.track,
    )
    set_common_options(cfg, args.config, args.work_dir, args.launcher)
    if cfg.get('resume') and cfg.load_from:
        load_checkpoint_file(cfg.load_from)  # or say now why not
    # One process a machine compares the data with the files; all of them rehearse.
    splits = ('train', 'val')
    warnings, built = (
        check_quickly(cfg, splits) if is_first_here() else ([], build_quickly(cfg, splits))
    )
    checked = time.monotonic() - start
    rehearsal = dry_run(cfg, built, compiled=args.dry_run)
    warnings += rehearsal.warnings
    if args.dry_run:
        for warning in warnings:
            print(f'warning: {warning}')
        print(
            f'Dry run of {args.config}: all is built, runs and validates.\n{rehearsal.page()}\n'
            f'  checks        {checked:.3g} s, {len(warnings)} warnings'
        )
        return
    runner = RUNNERS.build(cfg)
    for warning in warnings:
        runner.logger.warning(str(warning))
    runner.logger.info(f'Dry run: {rehearsal.line()}')
    hand_over(runner, built)
    runner.train()


if __name__ == '__main__':
    run_command(main)
