"""Measure a training as a user gets it: loader, step, both in tools/train.py, start, memory.

Data of the shape of ImageNet, COCO or ADE20K are made unless a folder is given. Every figure is
taken in a process of its own; that of train.py is the runner's log after a warm-up, with the
config's options. No weights are read and nothing is validated.
"""

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import torch

from groupmamba_mm.analysis.arguments import positive_int
from groupmamba_mm.analysis.benchmark_report import conditions_list
from groupmamba_mm.analysis.conditions import describe_environment
from groupmamba_mm.analysis.training_benchmark import (
    PARTS,
    Contestant,
    PartError,
    Plan,
    make_tables,
    measure,
    peers_of,
    prepare,
)
from groupmamba_mm.analysis.training_clock import STARTED
from groupmamba_mm.engine.cli import add_cfg_options, run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import ConfigError

IMAGES = {'mmpretrain': 5000, 'mmdet': 600, 'mmseg': 600}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', metavar='CONFIG')
    parser.add_argument(
        '--parts',
        nargs='+',
        choices=PARTS,
        default=list(PARTS),
        help='what is measured; peers: the other parts for Swin-T in the same '
        "runner, and timm's loader (default: all)",
    )
    parser.add_argument(
        '--data-root',
        help="folder with the configs' data, laid out as they say (default: data are made)",
    )
    parser.add_argument(
        '--images',
        type=positive_int,
        help='images that are made (default: '
        f'{IMAGES["mmpretrain"]}; {IMAGES["mmdet"]} for detection and '
        'segmentation); a run that needs more reads them again',
    )
    parser.add_argument(
        '--warmup',
        type=positive_int,
        default=60,
        help=f'iterations before the measured ones, at least {STARTED} (default: %(default)s)',
    )
    parser.add_argument(
        '--iterations',
        type=positive_int,
        default=200,
        help='measured iterations (default: %(default)s)',
    )
    parser.add_argument(
        '--gpus',
        nargs='+',
        type=positive_int,
        default=[1],
        metavar='N',
        help='numbers of processes, with a GPU each (default: 1)',
    )
    parser.add_argument(
        '--batch', type=positive_int, help="images of a process's batch (default: the config's)"
    )
    parser.add_argument('--workers', type=int, help="processes of a loader (default: the config's)")
    parser.add_argument(
        '--timeout',
        type=positive_int,
        default=1800,
        metavar='SECONDS',
        help='after which a part is given up (default: %(default)s)',
    )
    add_cfg_options(parser, 'change the configs, not the peers')
    parser.add_argument(
        '--out',
        type=Path,
        help='folder of results and data (default: a new one, '
        'named by the time, in work_dirs/benchmark_training)',
    )
    args = parser.parse_args(argv)
    if args.warmup < STARTED:
        parser.error(f'--warmup: at least {STARTED}')
    if args.workers is not None and args.workers < 0:
        parser.error('--workers: 0 or more')
    return args


def contestants_of(args: argparse.Namespace) -> list[Contestant]:
    """Look up what is to be measured.

    Args:
        args: The command line.

    Returns:
        The configs, each after the peers that are not there yet.

    Raises:
        ConfigError: A config cannot be read, or one folder is given for several libraries' data.
    """
    found, names = [], set()
    scopes = set()
    for path in args.configs:
        cfg = load_config(path, args.cfg_options)
        scopes.add(cfg.default_scope)
        found.append(Contestant(Path(path).stem, 'ours', cfg))
        for peer in peers_of(cfg, Path(path).stem) if 'peers' in args.parts else []:
            if peer.name not in names:
                names.add(peer.name)
                found.append(peer)
    if args.data_root is not None and len(scopes) > 1:
        raise ConfigError(
            f'--data-root is one folder, and the configs are of '
            f'{", ".join(sorted(scopes))}; measure each library in a run of its own'
        )
    visible = torch.cuda.device_count()
    if visible and max(args.gpus) > visible:
        raise ConfigError(f'--gpus {max(args.gpus)}: this machine has {visible} GPU(s) in sight')
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write.

    Args:
        argv: The arguments, None for the process's own.

    Raises:
        PartError: A part could not be measured; the others are printed and written before.
    """
    args = parse_args(argv)
    contestants = contestants_of(args)
    out = args.out or Path('work_dirs/benchmark_training') / datetime.now().strftime(
        '%Y%m%d_%H%M%S'
    )
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        args.parts,
        out,
        args.warmup,
        args.iterations,
        args.timeout,
        args.gpus,
        args.batch,
        args.workers,
    )
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    conditions = dict(
        describe_environment(device),
        data=args.data_root or 'made by this command: JPEGs of the bytes of photographs',
        measured=f'{args.iterations} iterations after {args.warmup}; train.py: median of the '
        "lines in the runner's log; loader: read without training; step: on one batch that is "
        'prepared already, through the optimizer wrapper; no weights read, no validation',
        start=f'from launch to the end of iteration {STARTED}; warm: the same again',
        phases="on a GPU by events on its time line; data: from one iteration's work to the "
        "next one's; forward: with the preprocessor; hooks: EMA and zeroing of gradients",
        memory='GPU: peak of what PyTorch allocated, and reserved at the end; host: peak of the '
        'command and its workers, shared pages once',
    )
    print(f'{conditions_list(conditions)}\n', flush=True)

    rows = []
    for contestant in contestants:
        prepare(
            contestant.cfg,
            contestant.name,
            plan,
            args.data_root,
            args.images or IMAGES[contestant.cfg.default_scope],
        )
        rows += measure(contestant, plan)
        (out / 'results.json').write_text(
            json.dumps(dict(conditions=conditions, rows=rows), indent=1) + '\n'
        )
        (out / 'results.md').write_text(f'{conditions_list(conditions)}\n\n{make_tables(rows)}\n')
    print(f'\n{make_tables(rows)}\n\nWrote {out}', flush=True)
    missing = [row['name'] for row in rows if row['note']]
    if missing:
        raise PartError(f'not all was measured of {", ".join(missing)}; see above')


if __name__ == '__main__':
    run_command(main)
