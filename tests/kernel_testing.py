"""What tests of the kernels share: where they run, and comparison with fp64.

Without a GPU the kernels run in Triton's interpreter; see conftest.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from groupmamba_mm.ops.backend import import_problem

needs_triton = pytest.mark.skipif(
    import_problem('triton') is not None, reason=str(import_problem('triton'))
)
INTERPRETED = not torch.cuda.is_available() or os.environ.get('TRITON_INTERPRET') == '1'
gpu = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason='needs a CUDA GPU')]
# the interpreter cuts off what bf16 cannot hold, where a GPU rounds to nearest
TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 8e-3 if INTERPRETED else 5e-3,
    torch.float16: 1e-3,
}
ACTIVATE = {'none': lambda p: p, 'silu': F.silu, 'gelu': F.gelu}


def assert_near(name, actual, expected, tolerance):
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= tolerance, f'{name}: relative error {error:.2e}'  # NaN fails, too


def randn(seed, device, dtype, *shape):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen).to(device, dtype)


def grid_reference(x, weight, bias, grid, act):
    """(B, L, C) to (B, L, C) by PyTorch's own convolution."""
    p = x.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, L, C) -> (B, C, H, W)
    p = F.conv2d(p, weight, bias, padding=1, groups=len(bias))
    return ACTIVATE[act](p.permute(0, 2, 3, 1).flatten(1, 2))  # (B, C, H, W) -> (B, L, C)


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, *tensors):
        ctx.set_materialize_grads(False)  # as in the blocks: what has no gradient brings None
        outputs, saved = forward(*tensors)
        ctx.run = lambda *grads: backward(saved, *grads)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        return (None, None, *ctx.run(*grads))


def differentiable(forward, backward, *tensors):
    """What kernels compute, with the gradients that they compute, for autograd.

    Args:
        forward: Called with the tensors; returns a tuple of outputs, and anything for ``backward``.
        backward: Called with that and the outputs' gradients, each perhaps None; returns the
            tensors' gradients in their order, None for those without.
        tensors: Each perhaps None.

    Returns:
        The outputs.
    """
    return _Pair.apply(forward, backward, *tensors)


def run_apart(*command, **variables):
    """Python in a process of its own, in which Triton compiles: this one's interprets."""
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    return subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).resolve().parents[1],
        env={**environment, **variables},
        text=True,
        capture_output=True,
    )
