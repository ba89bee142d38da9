"""Measure what the teacher costs in a training step, with each of its options.

The step is the config's own: mixing, forward and backward pass in its precision, gradient clipping
and optimizer, on random images that are on the device already. It is timed without a teacher (its
answers are given) and with it, in turns, so that a change of the machine's load meets all rows.
Speed does not depend on the weights, so random ones are used and no file is needed.
"""
import argparse
import copy
import statistics
import time
from typing import Callable, Dict, List, Optional, Tuple

import torch
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor

from groupmamba_mm.analysis import build_model
from groupmamba_mm.analysis.arguments import positive_int
from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.engine.runner import without_amp
from groupmamba_mm.errors import ConfigError

#: The teacher's options, by the names of their rows.
VARIANTS = {
    'fp32': dict(),
    'fp32, channels-last': dict(channels_last=True),
    'bf16': dict(precision='bf16'),
    'bf16, channels-last': dict(precision='bf16', channels_last=True),
    'bf16, channels-last, compiled': dict(precision='bf16', channels_last=True, compile=True),
}
NO_TEACHER = 'no teacher'


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='a *-distill_* config')
    parser.add_argument('--batch', type=positive_int, default=128,
                        help='images of a step (default: %(default)s)')
    parser.add_argument('--image-size', type=positive_int, default=224,
                        help='side of the images in pixels (default: %(default)s)')
    parser.add_argument('--repeats', type=positive_int, default=10,
                        help='measured steps of each row (default: %(default)s)')
    parser.add_argument('--warmup', type=positive_int, default=3,
                        help='steps before those (default: %(default)s)')
    return parser.parse_args(argv)


def seconds(work: Callable[[], None]) -> float:
    """Time some work until the device has done it.

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
    """Stand in for a teacher that costs nothing: it gives these logits, whatever the images."""
    def teacher(*args) -> Tensor:
        return logits

    teacher.load = lambda num_classes: None
    return teacher


def make_batch(args: argparse.Namespace, num_classes: int) -> Dict:
    """Random images and labels as a data loader gives them, the images on the device."""
    shape = (args.batch, 3, args.image_size, args.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=get_device())
    labels = torch.randint(num_classes, (args.batch, )).tolist()
    return dict(inputs=images, data_samples=[DataSample().set_gt_label(k) for k in labels])


def measure(args: argparse.Namespace) -> Dict[str, Tuple[float, float]]:
    """Time the step without a teacher and with each variant of it.

    Args:
        args: The command line.

    Returns:
        Milliseconds of the step and of the teacher run alone, by row, :data:`NO_TEACHER` first.

    Raises:
        ConfigError: The config has no teacher.
    """
    cfg = load_config(args.config)
    if 'teacher' not in cfg.model:
        raise ConfigError(f'config {args.config} has no teacher; give a *-distill_* config')
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

    teachers = {NO_TEACHER: given_answers(torch.randn(args.batch, num_classes,
                                                      device=get_device()))}
    network = model.teacher.build().to(get_device())
    for name, options in VARIANTS.items():
        teachers[name] = MODELS.build(dict(cfg.model.teacher, **options))
        teachers[name].use(copy.deepcopy(network))
    steps, alone = ({name: [] for name in teachers} for _ in range(2))
    for _ in range(args.warmup + args.repeats):
        for name, teacher in teachers.items():
            model.teacher = teacher
            steps[name].append(seconds(lambda: model.train_step(batch, optimizer)))
            alone[name].append(seconds(lambda: teacher(prepared, model.normalization)))
    return {name: tuple(1000 * statistics.median(times[name][args.warmup:])
                        for times in (steps, alone)) for name in teachers}


def main(argv: Optional[List[str]] = None) -> None:
    """Measure and print.

    Args:
        argv: The arguments, None for the process's own.
    """
    args = parse_args(argv)
    torch.manual_seed(0)
    rows = measure(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    print(f'\n{device}; PyTorch {torch.__version__}; batch {args.batch}, {args.image_size} x '
          f'{args.image_size}; TF32 in convolutions: {torch.backends.cudnn.allow_tf32}, in matrix '
          f'products: {torch.backends.cuda.matmul.allow_tf32}; medians of {args.repeats} steps '
          f'after {args.warmup}')
    print(f'\n{"":32}{"step [ms]":>12}{"share of the step":>19}{"teacher alone [ms]":>20}')
    without = rows[NO_TEACHER][0]
    for name, (step, alone) in rows.items():
        print(f'{name:32}{step:12.1f}{(step - without) / step:19.1%}{alone:20.1f}')


if __name__ == '__main__':
    run_command(main)
