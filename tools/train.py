"""Train a model of a config: classification, detection or segmentation."""
import argparse

from mmengine.registry import RUNNERS

import groupmamba_mm.engine  # noqa: F401, registers the runner
from groupmamba_mm.engine.cli import add_shared_arguments, run_command
from groupmamba_mm.engine.config_checks import check_init_files, load_config
from groupmamba_mm.engine.data_checks import check_data
from groupmamba_mm.engine.tracking import TRACKERS
from groupmamba_mm.engine.training import apply_train_options, set_common_options


def parse_args() -> argparse.Namespace:
    """Read the command line.

    Returns:
        argparse.Namespace: The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='continue from a checkpoint, without a value from the last one in '
                        'the work directory')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate from the config's base batch size to "
                        'the real one')
    parser.add_argument('--checkpoint-minutes', type=float, metavar='MINUTES',
                        help='save also whenever so many minutes have passed')
    parser.add_argument('--track', nargs='+', choices=list(TRACKERS), default=[],
                        help='report scalars, learning rates and example predictions to these')
    parser.add_argument('--no-validate', action='store_true', help='do not validate on the way')
    add_shared_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Check the config and the data, then train."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    apply_train_options(cfg, args.resume, args.amp, args.auto_scale_lr, args.no_validate,
                        args.checkpoint_minutes, args.track)
    set_common_options(cfg, args.config, args.work_dir, args.launcher)
    check_init_files(cfg)
    check_data(cfg, ('train', 'val'))
    RUNNERS.build(cfg).train()


if __name__ == '__main__':
    run_command(main)
