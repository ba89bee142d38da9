"""Recording GPU work once and replaying it with one launch."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

# Libraries choose their kernels, and kernels are compiled, in the first runs.
_WARMUP_RUNS = 3

#: Gradients begin at multiples of so many elements where they can: an optimizer's kernels read
#: several at a time where addresses allow it.
ALIGNED_TO = 32


def captured(
    function: Callable[[Tensor], Any], images: Tensor, pool: tuple | None = None
) -> Callable[[Tensor], Any]:
    """Record a function of a batch in a CUDA graph.

    Args:
        function: GPU work alone that does the same each time and needs no gradient.
        images: An example, which fixes shape and type.
        pool: Of memory, which graphs that never run at the same time may share; None: its own.

    Returns:
        The function for such batches: it copies them in, replays the graph and returns the tensors
        that the first run returned, which each call fills anew.
    """
    static = images.clone()
    _warm_up(lambda: function(static), images.device)
    graph = torch.cuda.CUDAGraph()
    with _capture(graph, pool):
        outputs = function(static)

    def replay(images: Tensor) -> Any:
        static.copy_(images)
        graph.replay()
        return outputs

    return replay


class CapturedTraining:
    """A function of a batch and its gradients, recorded in two CUDA graphs that share memory.

    Args:
        function: GPU work alone that launches the same each time. Its random numbers are new in
            each replay.
        images: An example, which fixes shape and type; it gets no gradient.
        parameters: What gets one, all of one dtype.
        pool: Of memory, which recordings share that are used one after the other; None: its own.
        other: One with the same parameters in the same pool, which shares the gradients' memory.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Sequence[Tensor]],
        images: Tensor,
        parameters: Sequence[Tensor],
        pool: tuple | None = None,
        other: 'CapturedTraining | None' = None,
    ) -> None:
        self._images = images.clone()

        def run() -> None:
            outputs = function(self._images)
            torch.autograd.grad(
                outputs, parameters, [torch.ones_like(y) for y in outputs], allow_unused=True
            )

        _warm_up(run, images.device)
        pool = pool or torch.cuda.graph_pool_handle()
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _capture(self._forward, pool):
            outputs = function(self._images)
        self._grad_outputs = [torch.zeros_like(y) for y in outputs]
        with _capture(self._backward, pool):
            grads = torch.autograd.grad(outputs, parameters, self._grad_outputs, allow_unused=True)
            # those of odd sizes last, so that the rest begins where kernels read fast
            self._order = sorted(
                (i for i, grad in enumerate(grads) if grad is not None),
                key=lambda i: grads[i].numel() % ALIGNED_TO != 0,
            )
            shared = other._grads if other is not None and other._order == self._order else None
            self._grads: Tensor = torch.cat([grads[i].reshape(-1) for i in self._order], out=shared)
        self._outputs = [y.detach() for y in outputs]
        self._shapes = [parameters[i] for i in self._order]
        self._number = len(parameters)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The outputs, in memory that the next call fills anew."""
        self._images.copy_(images)
        self._forward.replay()
        return self._outputs

    def backward(self, grad_outputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the parameters in new memory, None where one has none.

        Only of the last call of :meth:`forward`, and once.
        """
        for static, grad in zip(self._grad_outputs, grad_outputs):
            static.copy_(grad)
        self._backward.replay()
        grads: list[Tensor | None] = [None] * self._number
        flat = _unflatten_dense_tensors(self._grads.clone(), self._shapes)
        for i, grad in zip(self._order, flat):
            grads[i] = grad
        return grads


def _warm_up(run: Callable[[], Any], device: torch.device) -> None:
    """Run in a stream of its own, as a capture does."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP_RUNS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    # garbage that is collected meanwhile, another graph or pinned memory, would call CUDA in its midst
    collects = gc.isenabled()
    gc.disable()
    try:
        # the threads that pin batches and watch NCCL go on meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode='thread_local'):
            yield
    except BaseException:
        # torch leaves the random numbers of the device as in a recording, which draws none outside
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    finally:
        if collects:
            gc.enable()
