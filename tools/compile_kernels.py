"""Compile the Triton kernels of configs ahead of their first run, on a machine with or without a GPU.

A first run on a GPU does this by itself, in all cores. On a cluster, run this once on a login node
whose Triton cache (TRITON_CACHE_DIR, by default ~/.triton/cache) the GPU nodes share.

    python tools/compile_kernels.py configs/groupmamba/groupmamba-official-tiny_8xb128_in1k.py
"""

import argparse
import logging
import sys
import time

import _environment  # noqa: F401, before what may be missing
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from groupmamba_mm.backbones.kernels import Pass, compile_backbone, kinds_to_compile
from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.engine.config_checks import load_config
from groupmamba_mm.errors import ConfigError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='configs that will be run')
    parser.add_argument(
        '--capability',
        type=float,
        metavar='X.Y',
        default=None,
        help="of the GPUs: 8.0 A100, 9.0 H100 (default: this machine's)",
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        default=(224, 224),
        help="of a classifier's images (default: 224 224)",
    )
    parser.add_argument('--workers', type=int, metavar='N', help='processes (default: the cores)')
    return parser.parse_args()


def compile_config(
    cfg: Config, path: str, size: tuple[int, int], capability: int, workers: int | None
) -> int:
    """Compile the kernels of a config's training and validation; returns how many there are."""
    if cfg.get('model') is None or cfg.model.get('backbone', {}).get('type') != 'GroupMamba':
        raise ConfigError(f'config {path} has no GroupMamba as model.backbone')
    backbone = MODELS.build({**cfg.model.backbone, 'init_cfg': None}).train()
    wrapper = cfg.get('optim_wrapper', {})
    autocast = None
    if 'Amp' in str(wrapper.get('type', '')):
        autocast = getattr(torch, wrapper.get('dtype') or 'float16')
    kind = Pass(cfg.train_dataloader.batch_size, torch.float32, autocast, True, True)
    return compile_backbone(backbone, size, kinds_to_compile(backbone, kind), capability, workers)


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stdout)
    if args.capability is None:
        if not torch.cuda.is_available():
            raise ConfigError(
                'there is no GPU here to ask for its compute capability; give '
                "--capability, such as '--capability 9.0' for an H100"
            )
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    else:
        capability = round(10 * args.capability)
    for path in args.configs:
        start = time.perf_counter()
        count = compile_config(load_config(path), path, tuple(args.size), capability, args.workers)
        what = f'{count} kernels' if count else 'all in the cache before'
        print(f'{path}: {what}, {time.perf_counter() - start:.0f} s', flush=True)


if __name__ == '__main__':
    run_command(main)
