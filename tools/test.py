"""Test a checkpoint of a config: classification, detection or segmentation."""

import argparse

import _environment  # noqa: F401, before what may be missing
from mmengine.registry import RUNNERS

import groupmamba_mm.engine  # noqa: F401, registers the runner
from groupmamba_mm.checks import build_quickly, check_quickly
from groupmamba_mm.checks.dry_run import hand_over, rehearse_test
from groupmamba_mm.engine.cli import add_shared_arguments, is_first_here, run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.engine.testing import apply_test_options, trained_classes
from groupmamba_mm.engine.training import set_common_options
from groupmamba_mm.engine.warm_up import warm_up_ahead


def parse_args() -> argparse.Namespace:
    """Read the command line.

    Returns:
        argparse.Namespace: The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or address')
    parser.add_argument(
        '--out',
        help='write the predictions: a .pkl file for classification '
        'and detection, a folder of label images for segmentation',
    )
    parser.add_argument('--show-dir', help='write painted images into this folder')
    parser.add_argument(
        '--tta',
        action='store_true',
        help="average over the mirrored image too, or as the config's tta_model "
        'and tta_pipeline say',
    )
    add_shared_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Check the config and the data, test one batch, then all."""
    args = parse_args()
    warm_up_ahead()
    cfg = load_config(args.config, args.cfg_options)
    apply_test_options(cfg, args.checkpoint, args.out, args.show_dir, args.tta, args.amp)
    set_common_options(cfg, args.config, args.work_dir, args.launcher)
    warnings, built = (
        check_quickly(cfg, ('test',), trained_classes(args.checkpoint))
        if is_first_here()
        else ([], build_quickly(cfg, ('test',)))
    )
    runner = RUNNERS.build(cfg)
    for warning in warnings:
        runner.logger.warning(str(warning))
    hand_over(runner, built)
    rehearse_test(runner)
    runner.test()


if __name__ == '__main__':
    run_command(main)
