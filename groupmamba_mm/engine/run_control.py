"""Decisions that all processes of a training take at the same step: to save, and to stop."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import all_reduce, is_distributed, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from .checkpointing import SafeCheckpointHook
from .health import HealthHook
from .heartbeat import Heartbeat

#: The exit code of a training that a signal ended, with its state saved: sysexits.h's EX_TEMPFAIL.
EXIT_STOPPED = 75

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# A launcher passes on what a terminal or Slurm has sent to all processes already.
_SAME_SIGNAL_SECONDS = 2.0


class RunStopped(BaseException):
    """A signal ended the training after a step; not an error."""


class SignalListener:
    """Remember the first signal, and let the second one end the process at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._time = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def start(self) -> None:
        """Listen, if this is the main thread: Python delivers signals to no other."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def stop(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received, self._time = signal.Signals(number), time.monotonic()
            _say(f'{name}: saving after the next step and ending; a second signal ends at once')
        elif time.monotonic() - self._time > _SAME_SIGNAL_SECONDS:
            _say(f'error: {name}, the second signal: ending at once, without saving')
            os._exit(128 + number)


def _say(text: str) -> None:
    if is_main_process():
        # not print: the handler may have interrupted one
        os.write(sys.stderr.fileno(), f'{text}\n'.encode())


class _IgnoreSignals:
    """Keep data workers alive until the state is saved, whichever process gets the signal.

    Launchers and terminals send it to all processes of a training.

    Args:
        worker_init_fn (Callable, optional): What the loader's config does in a new worker.
    """

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self.worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)


class Agreement:
    """Numbers whose maximum over the processes is known one call later, without waiting for it.

    They travel through gloo, beside the GPUs' own communication.

    Args:
        size (int): How many numbers.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.group = dist.new_group(backend='gloo') if is_distributed() else None
        self._work: dist.Work | None = None
        self._values = torch.zeros(size, dtype=torch.int64)

    def exchange(self, numbers: Sequence[int]) -> list[int]:
        """Contribute numbers and read the result of the call before. All processes must call it.

        Args:
            numbers (Sequence[int]): This process's.

        Returns:
            list[int]: The largest of the processes' at the call before; with one process its own.
        """
        if self.group is None:
            return list(numbers)
        agreed = self._finish()
        self._values = torch.tensor(numbers, dtype=torch.int64)
        self._work = dist.all_reduce(self._values, dist.ReduceOp.MAX, self.group, async_op=True)
        return agreed

    def finish(self, numbers: Sequence[int]) -> list[int]:
        """Contribute numbers and wait for their result. All processes must call it.

        Args:
            numbers (Sequence[int]): This process's.

        Returns:
            list[int]: The largest of the processes', those handed in before included.
        """
        before = self.exchange(numbers)
        if self.group is None:
            return before
        return [max(pair) for pair in zip(before, self._finish())]

    def _finish(self) -> list[int]:
        if self._work is None:
            return [0] * self.size
        self._work.wait()
        self._work = None
        return self._values.tolist()


@HOOKS.register_module()
class RunControlHook(Hook):
    """Save by time, stop on a signal, and act on numbers that are not finite, in all processes.

    The runner registers it in every training.
    """

    priority = 'LOWEST'  # after the checkpoints of the config's interval

    def __init__(self) -> None:
        self.signals = SignalListener()
        self.agreement: Agreement | None = None
        self.heartbeat: Heartbeat | None = None
        self.health: HealthHook | None = None
        self._shared_val_steps = 0

    def before_train(self, runner: Runner) -> None:
        """Begin to listen.

        Args:
            runner (Runner): The runner.
        """
        self.checkpoint = next(
            (hook for hook in runner.hooks if isinstance(hook, SafeCheckpointHook)), None
        )
        self.health = next(hook for hook in runner.hooks if isinstance(hook, HealthHook))
        loops = [runner.train_loop] + ([] if runner.val_loop is None else [runner.val_loop])
        for loader in (loop.dataloader for loop in loops):
            if not isinstance(loader.worker_init_fn, _IgnoreSignals):
                loader.worker_init_fn = _IgnoreSignals(loader.worker_init_fn)
        self.agreement = Agreement(3)
        if self.agreement.group is not None:
            self.heartbeat = Heartbeat(self.agreement.group)
        self.signals.start()
        self._time = time.monotonic()

    def after_train(self, runner: Runner) -> None:
        """Stop listening.

        Args:
            runner (Runner): The runner.
        """
        self.close()

    def close(self) -> None:
        """Stop listening, also after an error."""
        self.signals.stop()
        if self.health is not None:
            self.health.close()
        if self.heartbeat is not None:
            self.heartbeat.close()
        self.agreement = self.heartbeat = None

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Agree on what follows after this step, and do it.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch.
            data_batch (Any): The batch, unused.
            outputs (dict, optional): The losses, unused.

        Raises:
            RunStopped: If a signal came.
        """
        stop, save, failure = self.agreement.exchange(
            [self.signals.received or 0, self._is_time(), self.health.failure_code()]
        )
        if failure:
            self.health.act(runner, failure, self.agreement.group)
        if not stop and not save:
            return
        done = runner.iter + 1
        if self.checkpoint is not None and self.checkpoint.saved_iter != done:
            self.checkpoint.save_interim(runner, dict(epoch=runner.epoch, iter=done))
        self._time = time.monotonic()
        if stop:
            self._stop(stop, done)

    def _is_time(self) -> bool:
        minutes = getattr(self.checkpoint, 'minutes', None)
        return (
            minutes is not None
            and is_main_process()
            and time.monotonic() - max(self._time, self.checkpoint.saved_time) > minutes * 60
        )

    def finish(self, runner: Runner) -> None:
        """Check all that was computed so far, before it is saved. All processes must call it.

        Args:
            runner (Runner): The runner.
        """
        if self.agreement is None:  # not in training
            return
        *_, failure = self.agreement.finish([0, 0, self.health.failure_code(wait=True)])
        if failure:
            self.health.act(runner, failure, self.agreement.group)

    def before_train_val(self, runner: Runner) -> None:
        """Count the steps of a validation that all processes have.

        Args:
            runner (Runner): The runner.
        """
        steps = torch.tensor(len(runner.val_dataloader))
        all_reduce(steps, op='min')
        self._shared_val_steps = int(steps)

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence | None = None,
    ) -> None:
        """Stop inside a validation, before which the training was saved.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch.
            data_batch (Any): The batch, unused.
            outputs (Sequence, optional): The predictions, unused.

        Raises:
            RunStopped: If a signal came.
        """
        if self.agreement is None or batch_idx >= self._shared_val_steps:
            return
        stop = self.agreement.exchange([self.signals.received or 0, 0, 0])[0]
        if stop:
            self._stop(stop, runner.iter)

    def _stop(self, number: int, done: int) -> None:
        name = signal.Signals(number).name
        saved = self.checkpoint is not None and self.checkpoint.saved_iter == done
        raise RunStopped(
            f'stopped by {name} after iteration {done}; '
            + (
                f'{self.checkpoint.last_ckpt} is saved, continue with --resume'
                if saved
                else 'the config saves no checkpoint, or it could not be written'
            )
        )
