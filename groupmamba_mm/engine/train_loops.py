"""mmengine's training loops, which can start at any iteration."""

from collections.abc import Iterator
from typing import Any

from mmengine.dist import broadcast, get_rank, is_distributed
from mmengine.model import is_model_wrapper
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from .health import RolledBack
from .randomness import SeededBatchSampler, seed_step


class _ResumableLoop:
    """What both loops share: where they are, and validation of what is saved.

    Attributes:
        epoch_start (int): The iteration at which this pass over the data began.
        validated_iter (int): The iteration that was validated last, -1 for none.
    """

    endless: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches = SeededBatchSampler.install(self.dataloader, self.endless)
        self.epoch_start = 0
        self.validated_iter = -1
        # made with the loader, before a checkpoint told the run's seed
        self._seed_of_config = self.runner.seed

    def resume_at(self, epoch: int, iteration: int, batches_done: int, validated_iter: int) -> None:
        """Continue where a checkpoint was saved.

        Args:
            epoch (int): Epochs that are finished.
            iteration (int): Steps that are done.
            batches_done (int): Steps that are done of the next epoch.
            validated_iter (int): As the attribute.
        """
        self._epoch, self._iter = epoch, iteration
        self.epoch_start = iteration - batches_done
        self.validated_iter = validated_iter

    def _place_sampler(self) -> None:
        sampler = self.dataloader.batch_sampler.sampler
        if getattr(sampler, 'seed', None) == self._seed_of_config:  # else the config's own
            sampler.seed = self.runner.seed
        if hasattr(sampler, 'skip'):  # mmengine's endless one: back to its start
            sampler.skip(0)
        self.batches.set_position(self.runner.seed, self._iter, self._iter - self.epoch_start)

    def run_iter(self, *args: Any) -> None:
        """Train one step, with its own random numbers.

        Args:
            *args: See mmengine's loop.
        """
        seed_step(self.runner.seed, self._iter, get_rank())
        super().run_iter(*args)

    def validate_if_due(self) -> None:
        """Validate at the config's intervals, what a checkpoint of this moment holds."""
        self._decide_current_val_interval()
        done, last = (
            (self._iter, self._max_iters) if self.endless else (self._epoch, self._max_epochs)
        )
        if (
            self.runner.val_loop is None
            or done == 0
            or done < self.val_begin
            or self.validated_iter == self._iter
            or (done % self.val_interval and done != last)
        ):
            return
        self._share_buffers()
        self.runner.call_hook('before_train_val')
        self.runner.val_loop.run()
        self.validated_iter = self._iter
        self.runner.call_hook('after_train_val')

    def _share_buffers(self) -> None:
        """Give all processes the BatchNorm statistics of the first one, which are saved."""
        if not is_distributed():
            return
        model = self.runner.model
        models = [model.module if is_model_wrapper(model) else model]
        models += [hook.ema_model for hook in self.runner.hooks if hasattr(hook, 'ema_model')]
        for buffer in (buffer for model in models for buffer in model.buffers()):
            broadcast(buffer)


@LOOPS.register_module()
class ResumableEpochLoop(_ResumableLoop, EpochBasedTrainLoop):
    """Train by epochs, from any iteration on.

    Args: as :class:`mmengine.runner.EpochBasedTrainLoop`.
    """

    endless = False

    def run(self) -> Any:
        """Train.

        Returns:
            nn.Module: The model.
        """
        self.runner.call_hook('before_train')
        while True:
            try:
                if self._iter == self.epoch_start:  # of an epoch's end
                    self.validate_if_due()
                if self._epoch >= self._max_epochs or self.stop_training:
                    break
                self.run_epoch()
            except RolledBack:
                continue
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_epoch(self) -> None:
        """Train what is left of an epoch."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        self._place_sampler()
        for index, batch in enumerate(self.dataloader, start=self._iter - self.epoch_start):
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
        self.epoch_start = self._iter


@LOOPS.register_module()
class ResumableIterLoop(_ResumableLoop, IterBasedTrainLoop):
    """Train for a number of iterations, from any of them on.

    Args: as :class:`mmengine.runner.IterBasedTrainLoop`.
    """

    endless = True

    def run(self) -> Any:
        """Train.

        Returns:
            nn.Module: The model.
        """
        self.runner.call_hook('before_train')
        # mmengine takes the whole training for an epoch
        self.runner.call_hook('before_train_epoch')
        batches = self._batches_from_here()
        while True:
            try:
                self.validate_if_due()
                if self._iter >= self._max_iters or self.stop_training:
                    break
                self.runner.model.train()
                self.run_iter(next(batches))
            except RolledBack:
                batches = self._batches_from_here()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def _batches_from_here(self) -> Iterator[Any]:
        self._place_sampler()
        return iter(self.dataloader)


#: What the runner takes for mmengine's own loops.
RESUMABLE_LOOPS = {
    'EpochBasedTrainLoop': 'ResumableEpochLoop',
    'IterBasedTrainLoop': 'ResumableIterLoop',
}
