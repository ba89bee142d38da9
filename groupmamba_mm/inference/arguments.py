"""The options of the commands that predict."""

import argparse

from groupmamba_mm.analysis.arguments import positive_int
from groupmamba_mm.engine.cli import add_cfg_options


def add_predictor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a :class:`groupmamba_mm.inference.Predictor` is made of.

    Args:
        parser: The command's parser.
    """
    parser.add_argument('--config', required=True, help='config file, or the name of one of ours')
    parser.add_argument('--checkpoint', required=True, help='checkpoint file or address')
    parser.add_argument('--device', help='such as cpu or cuda:0 (default: a GPU if there is one)')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='detections below this score are left out (default: %(default)s)',
    )
    parser.add_argument(
        '--top',
        type=positive_int,
        default=5,
        help='classes that a classifier names (default: %(default)s)',
    )
    add_cfg_options(parser, 'change the config, as in tools/test.py')
