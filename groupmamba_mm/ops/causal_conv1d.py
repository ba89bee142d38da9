"""Causal depthwise convolution along the sequence, then SiLU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import import_problem

#: Numbers of taps that causal-conv1d has kernels for.
LIBRARY_TAPS = (2, 3, 4)


def causal_conv1d_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = 'torch'
) -> Tensor:
    r"""silu(sum_k weight[:, k] x[:, t - K + 1 + k] + bias), zeros before the first token.

    Args:
        x: Tokens, (B, L, C).
        weight: (C, 1, K); the last tap sees the current token.
        bias: (C,), or None.
        backend: A resolved backend. With ``'mamba_ssm'``, causal-conv1d's CUDA kernel runs if that
            package is installed and has one for K taps; everything else is PyTorch's convolution.

    Returns:
        (B, L, C); with the CUDA kernel in the dtype of x, also under autocast.
    """
    if backend == 'mamba_ssm' and _library_has(weight.shape[-1]):
        return _library(x, weight, bias)
    x = F.pad(x, (0, 0, weight.shape[-1] - 1, 0))
    # as a 2-D convolution of a grid of one row, because that has a channels-last kernel
    x = x.transpose(1, 2).unsqueeze(2)  # (B, L, C) -> (B, C, 1, L), no copy
    x = F.conv2d(x, weight.unsqueeze(2), bias, groups=weight.shape[0])
    return F.silu(x.squeeze(2).transpose(1, 2))  # (B, C, 1, L) -> (B, L, C)


@torch.compiler.assume_constant_result
def _library_has(taps: int) -> bool:
    return taps in LIBRARY_TAPS and import_problem('causal_conv1d') is None


@torch.compiler.disable  # the library's extension is no operator that a compiler sees through
def _library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    x = x.contiguous().transpose(1, 2)  # (B, L, C) -> (B, C, L), no copy
    if x.shape[1] % 8:  # all that its channels-last kernel takes are multiples of 8
        # a copy: for one token, contiguous() would keep strides that look like channels-last
        x = x.clone(memory_format=torch.contiguous_format)
    return causal_conv1d_fn(x, weight.squeeze(1), bias, activation='silu').transpose(1, 2)
