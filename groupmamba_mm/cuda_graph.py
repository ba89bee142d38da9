"""Recording GPU work once and replaying it with one launch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Libraries choose their kernels, and kernels are compiled, in the first runs.
_WARMUP_RUNS = 3


def captured(function: Callable[[Tensor], Any], images: Tensor) -> Callable[[Tensor], Any]:
    """Record a function of a batch in a CUDA graph.

    Args:
        function: GPU work alone that does the same each time and needs no gradient.
        images: An example, which fixes shape and type.

    Returns:
        The function for such batches: it copies them in, replays the graph and returns the tensors
        that the first run returned, which each call fills anew.
    """
    static = images.clone()
    stream = torch.cuda.Stream(images.device)
    stream.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP_RUNS):
            function(static)
    torch.cuda.current_stream(images.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # the threads that pin batches and watch NCCL go on meanwhile
    with torch.cuda.graph(graph, capture_error_mode='thread_local'):
        outputs = function(static)

    def replay(images: Tensor) -> Any:
        static.copy_(images)
        graph.replay()
        return outputs

    return replay
