"""A training of a few seconds, for a launcher: ``small_run.py WORK_DIR [KEY=VALUE ...]``."""
import os
import random
import sys
import time

import torch
from mmengine.registry import MODELS

from groupmamba_mm.engine.cli import run_command
from tests.small_training import Points, SmallModel, build


class NoisyPoints(Points):
    """Points that move at random, and that take a moment to load."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 24

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return dict(inputs=torch.tensor([index / 24 + 0.1 * random.random(), torch.rand(1).item()]))


@MODELS.register_module()
class NoisyModel(SmallModel):
    """A model with dropout, and with ``nan=(process, iteration)`` one step that is not finite."""

    def __init__(self, nan=None, **kwargs):
        super().__init__(**kwargs)
        self.head = torch.nn.Sequential(torch.nn.Dropout(0.2), self.head, Break(nan))


class Break(torch.nn.Module):

    def __init__(self, nan):
        super().__init__()
        self.nan, self.step = nan, 0

    def forward(self, x):
        self.step += self.training
        if self.nan is not None and int(os.environ.get('RANK', 0)) == self.nan[0] \
                and self.step >= self.nan[1]:
            return x * float('nan')
        return x


def main():
    work_dir, *options = sys.argv[1:]
    options = dict(option.split('=') for option in options)
    nan = options.get('nan')
    launcher = 'pytorch' if 'RANK' in os.environ else 'none'
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
    minutes = options.get('minutes')
    runner = build(
        work_dir, epochs=int(options.get('epochs', 4)), ema='EMAHook', val=True,
        model=dict(type='NoisyModel', nan=nan and [int(number) for number in nan.split(',')]),
        dataset=NoisyPoints(float(options.get('seconds', 0.005))), workers=1, batch_size=2,
        scheduler=dict(type='CosineAnnealingLR', by_epoch=True, end=4, T_max=4,
                       convert_to_iter_based=True),
        checkpoint=dict(minutes=minutes and float(minutes), max_keep_ckpts=2),
        health=dict(policy=options.get('policy', 'stop')),
        resume=options.get('resume') == '1' or restarted, launcher=launcher)
    runner.train()


if __name__ == '__main__':
    run_command(main)
