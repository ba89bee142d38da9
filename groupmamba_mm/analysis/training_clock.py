"""Timing of a training, from inside."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

#: The phases of an iteration, in their order.
PHASES = ('data', 'forward', 'backward', 'optimizer', 'hooks')
#: The iteration at whose end a training counts as started.
STARTED = 20


class Clock:
    """Timestamps of the GPU, or of the host where there is no GPU."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()

    def mark(self) -> Any:
        """Record a timestamp; on a GPU, of when all work queued so far is done."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """The time between two moments, which must have passed."""
        return start.elapsed_time(end) if self.on_gpu else 1000 * (end - start)

    def wait(self) -> None:
        """Wait until the GPU has done all work so far."""
        if self.on_gpu:
            torch.cuda.synchronize()


@HOOKS.register_module()
class TrainingClockHook(Hook):
    """Time a training, stop it after some iterations, and write the times to a file.

    On a GPU the phases are measured on its time line by events, without waiting for it; 'data' is
    the time from the end of one iteration's work to the beginning of the next one's, in which the
    GPU has nothing to do. 'forward' includes the preprocessor, 'hooks' the EMA.

    Args:
        out (str): The JSON file, written by the first process.
        warmup (int): Iterations that are not measured, at least :data:`STARTED`.
        iterations (int): Iterations after them that are.
    """

    priority = 'LOWEST'

    def __init__(self, out: str, warmup: int, iterations: int) -> None:
        self.out = out
        self.first, self.last = warmup, warmup + iterations
        self.clock = Clock()
        self.marks: list[list[Any]] = []
        self.current: list[Any] = []
        self.started: float | None = None

    def before_train(self, runner: Runner) -> None:
        """Put marks around the optimizer wrapper's parts.

        Args:
            runner (Runner): The runner.
        """
        wrapper = runner.optim_wrapper
        wrapper.scale_loss = self._marked_before(wrapper.scale_loss)
        for name in ('backward', 'step'):
            setattr(wrapper, name, self._marked(getattr(wrapper, name)))

    def _marked_before(self, work: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.current.append(self.clock.mark())
            return work(*args, **kwargs)

        return run

    def _marked(self, work: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> None:
            work(*args, **kwargs)
            self.current.append(self.clock.mark())

        return run

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Mark the end of the wait for data.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch.
            data_batch (Any): The batch.
        """
        self.current.append(self.clock.mark())

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Mark the end of an iteration; after the last one write down and stop.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch.
            data_batch (Any): The batch.
            outputs (dict, optional): The losses.

        Raises:
            SystemExit: After the last iteration.
        """
        end, done = self.clock.mark(), runner.iter + 1
        # in a step that only adds up gradients, the optimizer has no part
        if done > self.first and len(self.current) == len(PHASES):
            self.marks.append([*self.current, end])
        self.current = [end]
        if done == STARTED:
            self.clock.wait()
            self.started = time.time()
        if done == self.last:
            self.clock.wait()
            if get_rank() == 0:
                Path(self.out).write_text(json.dumps(self._result()))
            raise SystemExit(0)

    def _result(self) -> dict[str, Any]:
        phases = {name: [] for name in PHASES}
        for moments in self.marks:
            for name, start, end in zip(PHASES, moments, moments[1:]):
                phases[name].append(self.clock.milliseconds(start, end))
        result = dict(
            started=self.started,
            phases={
                name: statistics.mean(values) if values else None for name, values in phases.items()
            },
        )
        if self.clock.on_gpu:
            result.update(
                reserved_gb=torch.cuda.memory_reserved() / 1e9,
                peak_gb=torch.cuda.max_memory_allocated() / 1e9,
            )
        return result
