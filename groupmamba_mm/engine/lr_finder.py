"""A learning-rate range test: the rate rises in each step, and the loss says where it is too high.

Leslie N. Smith, Cyclical Learning Rates for Training Neural Networks (WACV 2017), section 3.3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner

from groupmamba_mm.errors import ConfigError

from .training import apply_train_options, set_common_options

#: Steps over which a loss is averaged, by an exponential mean.
SMOOTHING = 10
#: The test ends when the averaged loss is above so many times its least value.
DIVERGED = 3.0
#: The rate at which the loss diverges, over the one that is proposed: an old rule of thumb.
MARGIN = 10.0


@dataclass
class LrCurve:
    """Loss over learning rate.

    Attributes:
        lrs: The rates, one for each step.
        losses: What each step lost.
        smooth: The losses averaged over about :data:`SMOOTHING` steps.
    """

    lrs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    smooth: list[float] = field(default_factory=list)
    _mean: float = 0.0

    def add(self, lr: float, loss: float) -> bool:
        """Take a step in.

        Args:
            lr: Its rate.
            loss: Its loss.

        Returns:
            Whether the loss has diverged, so that higher rates tell nothing.
        """
        if not math.isfinite(loss):
            return True
        self.lrs.append(lr)
        self.losses.append(loss)
        decay = 1 - 1 / SMOOTHING
        self._mean = decay * self._mean + (1 - decay) * loss
        self.smooth.append(self._mean / (1 - decay ** len(self.losses)))
        return len(self.losses) > SMOOTHING and self.smooth[-1] > DIVERGED * min(self.smooth)

    @property
    def steepest(self) -> float:
        """The rate at which the loss falls fastest over the logarithm of the rate, up to its least."""
        slope = np.gradient(self.smooth, np.log(self.lrs))
        first, last = SMOOTHING, self._least
        return self.lrs[first + int(np.argmin(slope[first : last + 1]))]

    @property
    def highest(self) -> float:
        """A tenth of the rate at which the loss is least, above which it rises again."""
        return self.lrs[self._least] / MARGIN

    @property
    def _least(self) -> int:
        # the first steps' mean is of few losses
        return SMOOTHING + int(np.argmin(self.smooth[SMOOTHING:]))


@HOOKS.register_module()
class LrRangeHook(Hook):
    """Raises the learning rate by the same factor in each step.

    Groups with a rate of their own keep its ratio to the config's.

    Args:
        low: The first rate.
        high: The last one.
        steps: Number of steps.
        base: The rate of the config, which groups' rates are compared with.
        curve: Takes the losses.
    """

    priority = 'VERY_LOW'

    def __init__(self, low: float, high: float, steps: int, base: float, curve: LrCurve) -> None:
        self.low, self.high, self.steps = low, high, steps
        self.base = base
        self.curve = curve
        self.ratios: list[float] = []

    def before_train(self, runner: Runner) -> None:
        """Note the groups' ratios.

        Args:
            runner: The runner.
        """
        self.ratios = [g['lr'] / self.base for g in runner.optim_wrapper.param_groups]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Set the rate.

        Args:
            runner: The runner.
            batch_idx: Number of the batch.
            data_batch: The batch, unused.
        """
        self.lr = self.low * (self.high / self.low) ** (runner.iter / (self.steps - 1))
        for group, ratio in zip(runner.optim_wrapper.param_groups, self.ratios):
            group['lr'] = self.lr * ratio

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Note the loss, and end the test where it diverges.

        Args:
            runner: The runner.
            batch_idx: Number of the batch.
            data_batch: The batch, unused.
            outputs: The losses.
        """
        if self.curve.add(self.lr, float(outputs['loss'].detach())):
            runner.train_loop.stop_training = True


def find_lr(cfg: Config, low: float, high: float, steps: int, work_dir: str) -> LrCurve:
    """Train a config's model for some steps with a rate that rises.

    Args:
        cfg: The config, changed in place: no schedule, no averages, no checkpoints, no validation.
        low: The first rate.
        high: The last one.
        steps: Number of steps, at most; it ends where the loss diverges.
        work_dir: Folder for the log.

    Returns:
        The curve.

    Raises:
        ConfigError: The options or the config do not allow it, or the loss diverges at once.
    """
    if not 0 < low < high:
        raise ConfigError(f'rates must rise from above 0, got --low {low:g} and --high {high:g}')
    if steps < 2 * SMOOTHING:
        raise ConfigError(f'--steps must be {2 * SMOOTHING} or more, got {steps}')
    apply_train_options(cfg, no_validate=True)
    set_common_options(cfg, cfg.filename, work_dir, 'none')
    base = cfg.optim_wrapper.optimizer.get('lr')
    if not base:
        raise ConfigError(
            f'config {cfg.filename} has no optim_wrapper.optimizer.lr; add the rate that the rates '
            'of groups are ratios of'
        )
    cfg.param_scheduler = None
    cfg.resume = False
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps, val_interval=steps)
    cfg.setdefault('default_hooks', {})
    cfg.default_hooks.update(checkpoint=None, health=None, param_scheduler=None)
    cfg.custom_hooks = None
    curve = LrCurve()
    runner = RUNNERS.build(cfg)
    runner.register_hook(LrRangeHook(low, high, steps, base, curve))
    runner.train()
    if len(curve.lrs) < 2 * SMOOTHING:
        raise ConfigError(
            f'the loss diverged after {len(curve.lrs)} steps, below a rate of '
            f'{curve.lrs[-1] if curve.lrs else low:g}; give a smaller --low'
        )
    return curve


def plot(curve: LrCurve, title: str, path: str) -> None:
    """Draw a curve.

    Args:
        curve: The curve.
        title: Its title.
        path: The picture to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.add_subplot()
    axes.plot(curve.lrs, curve.losses, '.', color='0.75', label='loss')
    axes.plot(curve.lrs, curve.smooth, color='C0', label=f'mean over about {SMOOTHING} steps')
    for rate, label, style in _marks(curve):
        axes.axvline(rate, color='C3', linestyle=style, label=f'{label}: {rate:.2g}')
    low, high = min(curve.smooth), max(curve.smooth[:SMOOTHING])
    axes.set(xscale='log', xlabel='learning rate', ylabel='loss', title=title)
    axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    axes.legend()
    figure.savefig(path)


def _marks(curve: LrCurve) -> Sequence[tuple[float, str, str]]:
    return (
        (curve.steepest, 'steepest fall', ':'),
        (curve.highest, f'least loss / {MARGIN:g}', '--'),
    )
