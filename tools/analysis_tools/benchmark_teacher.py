"""Measure what the teacher costs in a training step, with each of its options.

The step is the config's own: mixing, forward and backward pass in its precision, gradient clipping
and optimizer, on random images that are on the device already. It is timed without a teacher (its
answers are given) and with it, in turns, so that a change of the machine's load meets all rows.
Speed does not depend on the weights, so random ones are used and no file is needed.

With --agreement, the config's teacher is read from its file and shown the config's training data,
augmented and mixed as in training, and it is counted how often its decision, the class with the
largest logit, is another one than in fp32.
"""

import argparse
import copy
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import _environment  # noqa: F401, before what may be missing
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from groupmamba_mm.analysis import build_model
from groupmamba_mm.analysis.arguments import positive_int
from groupmamba_mm.distillation import FrozenTeacher
from groupmamba_mm.engine.cli import add_cfg_options, run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.engine.runner import without_amp
from groupmamba_mm.engine.training import set_common_options
from groupmamba_mm.errors import ConfigError

#: The teacher's options, by the names of their rows.
VARIANTS = {
    'fp32': dict(),
    'fp32, channels-last': dict(channels_last=True),
    'bf16': dict(precision='bf16'),
    'bf16, channels-last': dict(precision='bf16', channels_last=True),
}
#: Those for a GPU. The rows above are in the student's stream and launched one by one.
GPU_VARIANTS = {
    'bf16, channels-last, compiled': dict(precision='bf16', channels_last=True, compile=True),
    'bf16, channels-last, CUDA graph': dict(precision='bf16', channels_last=True, cuda_graph=True),
    'the same, compiled': dict(precision='bf16', channels_last=True, cuda_graph=True, compile=True),
    'bf16, channels-last, own stream': dict(precision='bf16', channels_last=True, own_stream=True),
}
EXACT = 'fp32'
NO_TEACHER = 'no teacher'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='a *-distill_* config')
    parser.add_argument(
        '--batch', type=positive_int, default=128, help='images of a step (default: %(default)s)'
    )
    parser.add_argument(
        '--image-size',
        type=positive_int,
        default=224,
        help='side of the images in pixels (default: %(default)s)',
    )
    parser.add_argument(
        '--repeats',
        type=positive_int,
        default=10,
        help='measured steps of each row (default: %(default)s)',
    )
    parser.add_argument(
        '--warmup', type=positive_int, default=3, help='steps before those (default: %(default)s)'
    )
    parser.add_argument(
        '--agreement',
        type=positive_int,
        metavar='IMAGES',
        help="compare the decisions with fp32's on so many training images "
        'instead of measuring time; needs the teacher and the data',
    )
    add_cfg_options(parser)
    return parser.parse_args(argv)


def seconds(work: Callable[[], None]) -> float:
    """Time some work, the wait for the device included.

    Args:
        work: What to do.

    Returns:
        Its duration.
    """

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def given_answers(logits: Tensor) -> Callable[..., Tensor]:
    """A fake teacher that costs nothing: it returns these logits for any image."""

    def teacher(*args) -> Tensor:
        return logits

    teacher.load = lambda num_classes: None
    teacher.start = lambda *args: teacher
    return teacher


def make_batch(args: argparse.Namespace, num_classes: int) -> dict:
    """Random images and labels as a data loader gives them, the images on the device."""
    shape = (args.batch, 3, args.image_size, args.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=get_device())
    labels = torch.randint(num_classes, (args.batch,)).tolist()
    return dict(inputs=images, data_samples=[DataSample().set_gt_label(k) for k in labels])


def read_config(args: argparse.Namespace) -> Config:
    """Read the config, which must have a teacher.

    Args:
        args: The command line.

    Returns:
        The config.

    Raises:
        ConfigError: The config has no teacher.
    """
    cfg = load_config(args.config, args.cfg_options)
    if 'teacher' not in cfg.model:
        raise ConfigError(f'config {args.config} has no teacher; give a *-distill_* config')
    return cfg


def make_teachers(cfg: Config, network: nn.Module) -> dict[str, FrozenTeacher]:
    """Make a teacher of each variant.

    Args:
        cfg: The config.
        network: The teacher's network; each gets a copy.

    Returns:
        The teachers by the names of their rows.
    """
    variants = dict(VARIANTS, **(GPU_VARIANTS if torch.cuda.is_available() else {}))
    plain = dict(
        precision='fp32', channels_last=False, compile=False, cuda_graph=False, own_stream=False
    )
    teachers = {}
    for name, options in variants.items():
        teachers[name] = MODELS.build({**cfg.model.teacher, **plain, **options})
        teachers[name].use(copy.deepcopy(network))
    return teachers


def measure(args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Time the step without a teacher and with each variant of it.

    Args:
        args: The command line.

    Returns:
        Milliseconds of the step and of the teacher run alone, by row, :data:`NO_TEACHER` first.
    """
    cfg = read_config(args)
    # so that none are downloaded; the file is not read here
    cfg.model.teacher.setdefault('checkpoint', 'unused')
    model = build_model(cfg).to(get_device()).train()
    optimizer = cfg.optim_wrapper
    if get_device() == 'cpu':
        optimizer = without_amp(optimizer, MMLogger.get_current_instance())
    optimizer = build_optim_wrapper(model, optimizer)
    num_classes = model.head.num_classes
    batch = make_batch(args, num_classes)
    prepared = model.data_preprocessor(copy.copy(batch), training=True)['inputs']

    teachers = {
        NO_TEACHER: given_answers(torch.randn(args.batch, num_classes, device=get_device()))
    }
    teachers.update(make_teachers(cfg, model.teacher.build().to(get_device())))
    steps, alone = ({name: [] for name in teachers} for _ in range(2))
    for _ in range(args.warmup + args.repeats):
        for name, teacher in teachers.items():
            model.teacher = teacher
            steps[name].append(seconds(lambda: model.train_step(batch, optimizer)))
            alone[name].append(seconds(lambda: teacher(prepared, model.normalization)))
    return {
        name: tuple(
            1000 * statistics.median(times[name][args.warmup :]) for times in (steps, alone)
        )
        for name in teachers
    }


def count_other_decisions(args: argparse.Namespace) -> tuple[int, dict[str, int]]:
    """Count how often a variant's decision differs from fp32's.

    Args:
        args: The command line.

    Returns:
        The number of images, and the counts by row.
    """
    cfg = read_config(args)
    set_common_options(cfg, args.config, None, 'none')
    model = build_model(cfg).to(get_device()).train()
    model.prepare_training()
    teachers = make_teachers(cfg, model.teacher.network)
    loader = cfg.train_dataloader
    loader.update(batch_size=min(args.batch, args.agreement))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        loader = Runner.build_dataloader(loader, seed=0)
    seen, others = 0, dict.fromkeys(teachers, 0)
    while seen < args.agreement:
        for batch in loader:
            images = model.data_preprocessor(batch, training=True)['inputs']
            images = images[: args.agreement - seen]
            decisions = {
                name: teacher(images, model.normalization).argmax(1)
                for name, teacher in teachers.items()
            }
            for name, found in decisions.items():
                others[name] += (found != decisions[EXACT]).sum().item()
            seen += len(images)
            print(f'{seen} of {args.agreement} images', flush=True)
            if seen == args.agreement:
                break
    return seen, others


def main(argv: list[str] | None = None) -> None:
    """Measure and print.

    Args:
        argv: The arguments, None for the process's own.
    """
    args = parse_args(argv)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    if args.agreement is not None:
        seen, others = count_other_decisions(args)
        print(
            f'\n{device}; PyTorch {torch.__version__}; {seen} training images, augmented and '
            f'mixed as in training\n\n{"":32}{"other decisions than fp32":>26}'
        )
        for name, count in others.items():
            print(f'{name:32}{count:14d} ({count / seen:.2%})')
        return
    rows = measure(args)
    print(
        f'\n{device}; PyTorch {torch.__version__}; batch {args.batch}, {args.image_size} x '
        f'{args.image_size}; TF32 in convolutions: {torch.backends.cudnn.allow_tf32}, in matrix '
        f'products: {torch.backends.cuda.matmul.allow_tf32}; medians of {args.repeats} steps '
        f'after {args.warmup}'
    )
    print(f'\n{"":32}{"step [ms]":>12}{"share of the step":>19}{"teacher alone [ms]":>20}')
    without = rows[NO_TEACHER][0]
    for name, (step, alone) in rows.items():
        print(f'{name:32}{step:12.1f}{(step - without) / step:19.1%}{alone:20.1f}')


if __name__ == '__main__':
    run_command(main)
