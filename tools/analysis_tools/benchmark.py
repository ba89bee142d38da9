"""Measure throughput, latency and memory of this project's models beside timm's, in one run."""

import argparse
import sys
import traceback
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import torch
from torch import nn

from groupmamba_mm.analysis import count_complexity
from groupmamba_mm.analysis.arguments import image_size, positive_int
from groupmamba_mm.analysis.benchmark import (
    AUTOCAST,
    CHANNELS_LAST,
    COMPILE_MODES,
    CUDA_GRAPH,
    EAGER,
    MEASURES,
    Effort,
    Setting,
    check_runs,
    measure,
)
from groupmamba_mm.analysis.benchmark_report import Report, conditions_list, make_table, summarise
from groupmamba_mm.analysis.conditions import describe_environment
from groupmamba_mm.analysis.subjects import PEER, Subject, check_backends, find_subjects
from groupmamba_mm.backbones import ARCHS
from groupmamba_mm.engine.cli import add_cfg_options, run_command
from groupmamba_mm.errors import ConfigError, UserError

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'groupmamba'
SIZES = {arch: CONFIGS / f'groupmamba-{arch}_8xb128_in1k.py' for arch in ARCHS}
PEERS = ('swin_tiny_patch4_window7_224', 'convnext_tiny')

#: A subject, how it is run, and its model.
Job = tuple[Subject, Setting, nn.Module]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='Several values of an option are measured one by one.'
    )
    parser.add_argument(
        'configs',
        nargs='*',
        metavar='CONFIG',
        default=list(ARCHS),
        help='config file, or a size for its ImageNet config; of detectors and '
        'segmenters the backbone is measured (default: %(default)s)',
    )
    parser.add_argument(
        '--peers',
        nargs='*',
        default=list(PEERS),
        metavar='NAME',
        help='models of timm, none if nothing follows (default: %(default)s)',
    )
    parser.add_argument(
        '--dense',
        action='store_true',
        help='measure backbones with the maps of all stages, also those of classifiers and peers',
    )
    parser.add_argument(
        '--size',
        nargs='+',
        type=image_size,
        metavar='SIZE',
        help='side in pixels or HxW (default: 224, backbones 800x1344)',
    )
    parser.add_argument(
        '--batch',
        nargs='+',
        type=positive_int,
        help='images of a step (default: 128; backbones 2; on a CPU 2 and 1)',
    )
    parser.add_argument(
        '--precision',
        nargs='+',
        choices=list(AUTOCAST),
        help='bf16 and fp16 by autocast; TF32 is used with tf32 only (default: '
        'bf16, on a CPU fp32)',
    )
    parser.add_argument(
        '--channels-last',
        action='store_true',
        help='measure the peers in this memory layout as well; ours has its own',
    )
    parser.add_argument(
        '--compile',
        nargs='*',
        choices=COMPILE_MODES,
        metavar='MODE',
        help='measure with torch.compile as well; modes: '
        f'{", ".join(COMPILE_MODES)} (default if none is given)',
    )
    parser.add_argument(
        '--cuda-graph',
        action='store_true',
        help='measure inference replayed from a CUDA graph as well',
    )
    parser.add_argument(
        '--backend',
        nargs='+',
        metavar='NAME',
        help="GroupMamba's scan_backend (default: the config's)",
    )
    parser.add_argument(
        '--measure',
        nargs='+',
        choices=MEASURES,
        default=list(MEASURES),
        help='what is measured (default: all)',
    )
    parser.add_argument('--device', choices=['cuda', 'cpu'], help='default: a GPU if there is one')
    parser.add_argument(
        '--threads',
        type=positive_int,
        help='threads of an operator on the CPU (default: what PyTorch takes)',
    )
    parser.add_argument(
        '--warmup',
        type=positive_int,
        help='least steps before the measured ones (default: 10, on a CPU 2)',
    )
    parser.add_argument(
        '--repeats', type=positive_int, help='measured steps (default: 50, on a CPU 5)'
    )
    add_cfg_options(parser, 'change the configs')
    parser.add_argument(
        '--out',
        type=Path,
        help='folder of the results (default: a new one, named '
        'by the time, in work_dirs/benchmark)',
    )
    args = parser.parse_args(argv)
    for name in ('size', 'batch', 'precision', 'compile', 'backend', 'measure'):
        values = getattr(args, name)
        if values is not None and len(set(values)) < len(values):
            parser.error(f'--{name}: a value is given twice; give each once')
    return args


def complete(args: argparse.Namespace) -> None:
    """Choose the device and check what depends on it; fill in its defaults.

    Args:
        args: The command line; changed.

    Raises:
        ConfigError: Something asked for cannot be had on this machine.
    """
    has_gpu = torch.cuda.is_available()
    args.device = args.device or ('cuda' if has_gpu else 'cpu')
    on_gpu = args.device == 'cuda'
    if on_gpu and not has_gpu:
        built = f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'
        raise ConfigError(
            f'--device cuda: PyTorch {torch.__version__} (built {built}) sees no '
            'GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or give --device cpu'
        )
    if not on_gpu and args.cuda_graph:
        raise ConfigError('--cuda-graph needs a GPU, and this runs on the CPU; leave it out')
    args.precision = args.precision or ['bf16' if on_gpu else 'fp32']
    for precision in args.precision:
        if not on_gpu and precision in ('tf32', 'fp16'):
            raise ConfigError(
                f'--precision {precision} is for GPUs, and this runs on the CPU; '
                'choose fp32 or bf16'
            )
        if on_gpu and precision in ('tf32', 'bf16') and torch.cuda.get_device_capability() < (8, 0):
            raise ConfigError(
                f'--precision {precision} needs a GPU of compute capability 8.0, and '
                f'{torch.cuda.get_device_name()} has less; choose fp32 or fp16'
            )
    if args.compile is not None:
        args.compile = args.compile or ['default']
    check_backends(args.backend or ())
    args.warmup = args.warmup or (10 if on_gpu else 2)
    args.repeats = args.repeats or (50 if on_gpu else 5)
    args.out = args.out or Path('work_dirs/benchmark') / datetime.now().strftime('%Y%m%d_%H%M%S')
    if (args.out / 'results.csv').exists():
        raise ConfigError(
            f'--out {args.out} holds the results.csv of an earlier run; give another '
            'folder, or remove it'
        )
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f'--out {args.out} is a file; give a folder')


def settings_of(subject: Subject, args: argparse.Namespace) -> Iterator[Setting]:
    """Iterate over the settings in which a model is run.

    Args:
        subject: The model.
        args: The completed command line.

    Yields:
        The settings.
    """
    own = subject.own_backend
    backends = [None] if own is None else args.backend or [own]
    layouts = [Setting.layout]
    if subject.kind == PEER and args.channels_last:
        layouts.append(CHANNELS_LAST)
    modes = (
        [EAGER]
        + [CUDA_GRAPH] * args.cuda_graph
        + [f'compile-{mode}' for mode in args.compile or ()]
    )
    for size in args.size:
        for batch in args.batch:
            for precision in args.precision:
                for backend in backends:
                    for layout in layouts:
                        for mode in modes:
                            yield Setting(size, batch, precision, layout, mode, backend)


def prepare(subjects: list[Subject], args: argparse.Namespace) -> list[tuple[Job, dict[str, Any]]]:
    """Build every model, count it, and run it once on one image.

    Args:
        subjects: The models.
        args: The completed command line.

    Returns:
        What is to be measured, with the beginning of its row.

    Raises:
        ConfigError: One cannot be run as asked for.
    """
    device = torch.device(args.device)
    prepared = []
    for subject in subjects:
        print(f'Checking {subject.name}', flush=True)
        models, counts, checked = {}, {}, set()
        for setting in settings_of(subject, args):
            built, size = (setting.size, setting.backend), setting.size
            run = (*built, setting.precision)
            try:
                if size not in counts:
                    # counted on the CPU, where PyTorch's own operators do all of it
                    plain = None if subject.own_backend is None else 'torch'
                    counts[size] = count_complexity(subject.build(size, plain), size)
                if built not in models:
                    models[built] = subject.build(*built)
                if run not in checked:
                    check_runs(models[built], setting, device)
                    checked.add(run)
            except torch.OutOfMemoryError:
                checked.add(run)  # the measurement will say so in its row
            except Exception as error:
                if not isinstance(error, UserError):
                    traceback.print_exc()
                raise ConfigError(
                    f'{subject.name} cannot be run with {setting}: {error}; change '
                    'that, or leave it out'
                ) from error
            row = dict(
                model=subject.name,
                kind=subject.kind,
                params=counts[size].params,
                macs=counts[size].macs,
                height=size[0],
                width=size[1],
                batch=setting.batch,
                precision=setting.precision,
                layout=setting.layout,
                mode=setting.mode,
                backend=setting.backend,
            )
            prepared.append(((subject, setting, models[built]), row))
    return prepared


def describe(args: argparse.Namespace, dense: bool) -> dict[str, str]:
    """Describe the conditions of the measurement.

    Args:
        args: The completed command line.
        dense: Whether backbones are measured.

    Returns:
        Texts by headings.
    """
    on_gpu = args.device == 'cuda'
    what = (
        'backbones with the maps of all stages'
        if dense
        else 'classifiers: backbone and head, from images to logits'
    )
    training = (
        'forward and backward pass, random gradients for the maps'
        if dense
        else 'forward, backward (cross entropy, random labels) and fused AdamW step; fp16 with '
        'a gradient scaler'
    )
    return dict(
        describe_environment(torch.device(args.device)),
        measured=f'{what}; random normal images that are on the device already, without data '
        "loading and preprocessor; constructors' weights; drop path as configured",
        inference='inference mode; latency: batch 1, each step waited for',
        training=training,
        precision=f'{", ".join(args.precision)}; bf16 and fp16 by autocast, entered every step; '
        'TF32 on in rows with tf32, off in all others; cuDNN tries its algorithms',
        layout='peers contiguous'
        + (' and channels-last' if args.channels_last else '')
        + '; ours takes contiguous images and has channels-last tokens inside',
        sizes=f'{", ".join(f"{h}x{w}" for h, w in args.size)}; batch '
        f'{", ".join(map(str, args.batch))}',
        timing=(
            f'medians and quartiles of {args.repeats} steps, '
            + ('by CUDA events, ' if on_gpu else 'by the clock, ')
            + f'after at least {args.warmup}'
            + (' and half a second' if on_gpu else '')
            + ' of warm-up; up to four batches take turns as input'
        ),
        memory='peak of what PyTorch allocated for weights, one input and the step (rows that '
        'replay CUDA graphs: what it reserved, if more), GB = 10^9 bytes; not measured on a CPU',
        MACs='for one image, counted as tools/analysis_tools/get_flops.py does',
    )


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write.

    Args:
        argv: The arguments, None for the process's own.
    """
    args = parse_args(argv)
    complete(args)
    subjects = find_subjects(args.configs, args.peers, SIZES, args.dense, args.cfg_options)
    dense = subjects[0].dense
    args.size = args.size or [(800, 1344) if dense else (224, 224)]
    args.batch = args.batch or [
        {('cuda', False): 128, ('cpu', True): 1}.get((args.device, dense), 2)
    ]
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    jobs = prepare(subjects, args)

    report = Report(args.out, describe(args, dense))
    print(f'\n{conditions_list(report.conditions)}\n')
    effort = Effort(torch.device(args.device), args.warmup, args.repeats)
    try:
        for number, ((subject, setting, model), row) in enumerate(jobs, start=1):
            print(f'[{number}/{len(jobs)}] {subject.name}, {setting}', flush=True)
            row.update(measure(model, setting, effort, args.measure))
            report.add(row)
            print(f'    {summarise(row)}', flush=True)
    except KeyboardInterrupt:
        print(f'\nInterrupted: {len(report.rows)} of {len(jobs)} rows are in {args.out}')
        raise SystemExit(130) from None
    finally:
        if report.rows:
            report.draw()
    print(f'\n{make_table(report.rows)}\n\nWrote {args.out}')


if __name__ == '__main__':
    run_command(main)
