"""Measure the inference latency of configs on the CPU, beside mmpretrain's Swin-T.

The models take turns, one image each, so that a change of the machine's load meets all of them.
"""
import argparse
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional

import mmengine
import torch
from mmengine.hub import get_config
from torch import Tensor, nn

from groupmamba_mm.analysis import build_model
from groupmamba_mm.analysis.arguments import positive_int
from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import ConfigError

DEFAULT_CONFIG = (Path(__file__).resolve().parents[2] / 'configs/groupmamba'
                  / 'groupmamba-official-tiny_8xb128_in1k.py')
PEER_NAME = 'Swin-T (mmpretrain)'
PEER_CONFIG = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'
#: Swin's last stage, at stride 32, must hold a window of 7 x 7.
PEER_MIN_SIZE = 6 * 32 + 1


@dataclass(frozen=True)
class Latency:
    """Quartiles of a model's latencies, in milliseconds."""
    lower: float
    median: float
    upper: float


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='*', metavar='CONFIG', default=[str(DEFAULT_CONFIG)],
                        help=f'classification config (default: {DEFAULT_CONFIG.name})')
    parser.add_argument('--threads', type=positive_int, default=torch.get_num_threads(),
                        help='threads of an operator (default: what PyTorch takes, %(default)s)')
    parser.add_argument('--repeats', type=positive_int, default=30,
                        help='measured images of each model (default: %(default)s)')
    parser.add_argument('--warmup', type=positive_int, default=5,
                        help='images before that (default: %(default)s)')
    parser.add_argument('--image-size', type=positive_int, default=224,
                        help='side of the image in pixels (default: %(default)s)')
    args = parser.parse_args(argv)
    if args.image_size < PEER_MIN_SIZE:
        parser.error(f'--image-size {args.image_size}: {PEER_NAME} needs {PEER_MIN_SIZE} or more')
    return args


def load_models(configs: List[str]) -> Dict[str, nn.Module]:
    """Build the configs' models and the peer, by the names of their rows.

    Args:
        configs: Paths of classification configs.

    Returns:
        The models in eval mode, the peer last.

    Raises:
        ConfigError: A config is not a classifier's, or given twice.
    """
    models = {}
    for path in configs:
        cfg = load_config(path)
        if cfg.default_scope != 'mmpretrain':
            raise ConfigError(f'config {path} is for {cfg.default_scope}, and its model cannot be '
                              'compared with a classifier; give configs of configs/groupmamba')
        name = Path(path).stem
        if name in models:
            raise ConfigError(f'config {name} is given twice; give each config once')
        models[name] = build_model(cfg)
    models[PEER_NAME] = build_model(get_config(PEER_CONFIG))
    return models


@torch.inference_mode()
def measure(models: Dict[str, nn.Module], image: Tensor, warmup: int,
            repeats: int) -> Dict[str, Latency]:
    """Time the models' forward passes, in turns.

    Args:
        models: The models by name.
        image: What each of them takes, (1, 3, H, W).
        warmup: Rounds that are not counted.
        repeats: Rounds that are, at least 1.

    Returns:
        The latencies by name.
    """
    seconds = {name: [] for name in models}
    for _ in range(warmup + repeats):
        for name, model in models.items():
            start = time.perf_counter()
            model(image)
            seconds[name].append(time.perf_counter() - start)
    return {name: summarise(values[warmup:]) for name, values in seconds.items()}


def summarise(seconds: List[float]) -> Latency:
    """Quartiles in milliseconds of latencies in seconds."""
    values = [1000 * value for value in seconds]
    if len(values) == 1:
        return Latency(values[0], values[0], values[0])
    return Latency(*statistics.quantiles(values, n=4, method='inclusive'))


def cpu_name() -> str:
    """The processor's name as Linux tells it, elsewhere as Python knows it."""
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def print_conditions(args: argparse.Namespace) -> None:
    """Say what the figures hold for."""
    print(f'\nCPU: {cpu_name()}, {os.cpu_count()} logical cores; '
          f'load average before: {os.getloadavg()[0]:.2f}')
    print(f'PyTorch {torch.__version__}, mmengine {mmengine.__version__}, '
          f'Python {platform.python_version()}; {torch.get_num_threads()} thread(s)')
    print(f'Batch 1, {args.image_size} x {args.image_size}, fp32, eager, inference mode, untrained '
          f'weights; the models in turns, {args.repeats} images each after {args.warmup} of '
          'warm-up')


def print_table(latencies: Dict[str, Latency]) -> None:
    """Print a line for each model, with its median over the peer's."""
    width = max(map(len, latencies))
    peer = latencies[PEER_NAME].median
    print(f"\n{'latency [ms]':{width}}  {'median':>8}  {'quartiles':>17}  {'to Swin-T':>9}")
    for name, latency in latencies.items():
        quartiles = f'{latency.lower:.1f} - {latency.upper:.1f}'
        print(f'{name:{width}}  {latency.median:8.1f}  {quartiles:>17}  '
              f'{latency.median / peer:9.2f}')


def main(argv: Optional[List[str]] = None) -> None:
    """Measure and print.

    Args:
        argv: The arguments, None for the process's own.
    """
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    models = load_models(args.configs)
    print_conditions(args)
    image = torch.randn(1, 3, args.image_size, args.image_size,
                        generator=torch.Generator().manual_seed(0))
    latencies = measure(models, image, args.warmup, args.repeats)
    print(f'Load average after: {os.getloadavg()[0]:.2f}')
    print_table(latencies)


if __name__ == '__main__':
    run_command(main)
