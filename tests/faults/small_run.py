"""A training of a few seconds, for a launcher: ``small_run.py WORK_DIR [KEY=VALUE ...]``."""

import os
import random
import resource
import sys
import time
from pathlib import Path

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, MODELS

from groupmamba_mm.engine.cli import run_command
from tests.small_training import Points, SmallModel, build


class NoisyPoints(Points):
    """Points that may move at random, and that take a moment to load."""

    def __init__(self, seconds, noise):
        self.seconds, self.noise = seconds, noise

    def __len__(self):
        return 24

    def __getitem__(self, index):
        time.sleep(self.seconds)
        if not self.noise:
            return dict(inputs=torch.tensor([index / 24, 1.0]))
        return dict(
            inputs=torch.tensor([index / 24 + self.noise * random.random(), torch.rand(1).item()])
        )


@METRICS.register_module()
class MeanMetric(BaseMetric):
    """The mean of what the model predicts."""

    default_prefix = None

    def process(self, data_batch, data_samples):
        self.results += [sample['output'].mean().item() for sample in data_samples]

    def compute_metrics(self, results):
        return dict(value=sum(results) / len(results))


@MODELS.register_module()
class NoisyModel(SmallModel):
    """A model with dropout, and with ``nan=(process, iteration)`` one step that is not finite."""

    def __init__(self, nan=None, **kwargs):
        super().__init__(**kwargs)
        self.head = torch.nn.Sequential(torch.nn.Dropout(0.2), self.head, Break(nan))


@MODELS.register_module()
class ExactModel(NoisyModel):
    """In fp64, with a norm that counts no images and without dropout."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm, self.head = torch.nn.LayerNorm(20), self.head[1]
        self.double()

    def forward(self, inputs, mode='tensor'):
        return super().forward([one.double() for one in inputs], mode)


class Break(torch.nn.Module):
    def __init__(self, nan):
        super().__init__()
        self.nan, self.step = nan, 0

    def forward(self, x):
        self.step += self.training
        if (
            self.nan is not None
            and int(os.environ.get('RANK', 0)) == self.nan[0]
            and self.step >= self.nan[1]
        ):
            return x * float('nan')
        return x


def train(work_dir, *options):
    """Train with options such as ``seconds=0.1``."""
    options = dict(option.split('=') for option in options)
    nan, seconds = options.get('nan'), float(options.get('seconds', 0.005))
    if 'machines' in options:
        os.environ['GROUP_RANK'] = os.environ['RANK']
    if 'file_limit' in options:
        limits = int(options['file_limit']), resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if 'pids' in options:
        Path(work_dir, f'pid_{os.environ["RANK"]}').write_text(str(os.getpid()))
    launcher = 'pytorch' if 'RANK' in os.environ else 'none'
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
    minutes, exact = options.get('minutes'), 'exact' in options
    # Adam's first steps divide rounding errors by themselves
    optimizer = dict(type='SGD' if exact else 'AdamW', lr=0.1)
    if 'zero' in options:
        optimizer.update(type='ZeroRedundancyOptimizer', optimizer_type=optimizer['type'])
    runner = build(
        work_dir,
        epochs=int(options.get('epochs', 4)),
        ema='EMAHook',
        val=True,
        model=dict(
            type='ExactModel' if exact else 'NoisyModel',
            nan=nan and [int(number) for number in nan.split(',')],
        ),
        dataset=NoisyPoints(seconds, noise=0 if exact else 0.1),
        val_dataset=NoisyPoints(seconds, noise=0),
        metric='MeanMetric',
        workers=1,
        batch_size=int(options.get('batch', 2)),
        scheduler=dict(
            type='CosineAnnealingLR', by_epoch=True, end=4, T_max=4, convert_to_iter_based=True
        ),
        checkpoint=dict(minutes=minutes and float(minutes), max_keep_ckpts=2),
        optim_wrapper=dict(optimizer=optimizer, accumulative_counts=int(options.get('sum', 1))),
        health=dict(policy=options.get('policy', 'stop')),
        resume=options.get('resume') == '1' or restarted,
        launcher=launcher,
        cfg=dict(sync_bn='torch') if 'sync' in options else None,
    )
    runner.train()


def main(arguments):
    """Train as the commands do."""
    run_command(lambda: train(*arguments))


if __name__ == '__main__':
    main(sys.argv[1:])
