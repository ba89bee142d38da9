"""The released model's FFN: a depthwise convolution between the two linear layers.

What is behind the convolution is as large as a network's tensors get: it is recomputed in the
backward pass instead of kept.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from ..depthwise_conv.kernels import grid_conv_backward, grid_conv_forward
from ..integers import cdiv
from ..launch import is_abstract
from ..linear import linear, linear_input_gradient, linear_weight_gradient

#: Bytes of a part of the batch's hidden tensors in the backward pass. There are four of them, two
#: of which are made part by part.
_PART = 2**27


def _parts_of_batch(tensor: Tensor) -> Iterator[slice]:
    """Images of each part of (B, L, C), as few parts of up to _PART bytes as will do."""
    images = tensor.shape[0]
    if is_abstract(tensor):  # its sizes may be symbols
        return iter((slice(None), ))
    step = max(1, cdiv(images, max(1, cdiv(tensor.nbytes, _PART))))
    return (slice(first, first + step) for first in range(0, max(1, images), step))


def conv_ffn_forward(x: Tensor, in_weight: Tensor, in_bias: Tensor, taps: Tensor,
                     conv_bias: Tensor, weight: Tensor, bias: Tensor,
                     grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """GELU(conv(x in_weight^T + in_bias) + conv_bias) weight^T + bias.

    Args:
        x: (B, L, I) tokens, row-major; fp32, bf16 or fp16.
        in_weight, in_bias: (C, I) and (C,) in the dtype of ``x``.
        taps, conv_bias: (9, C) and (C,) in fp32.
        weight, bias: (O, C) and (O,) in the dtype of ``x``.
        grid: (H, W).

    Returns:
        (B, L, O) in the dtype of ``x``, and the hidden tensor (B, L, C) before the convolution.
    """
    hidden = linear(x, in_weight, in_bias)
    return linear(grid_conv_forward(hidden, taps, conv_bias, grid, 'gelu'), weight, bias), hidden


def conv_ffn_backward(dy: Tensor, hidden: Tensor | None, x: Tensor, in_weight: Tensor,
                      in_bias: Tensor, taps: Tensor, conv_bias: Tensor, weight: Tensor,
                      grid: tuple[int, int], din_weight: Tensor, dweight: Tensor, din_bias: Tensor,
                      dtaps: Tensor, dconv_bias: Tensor) -> Tensor:
    """Gradients of :func:`conv_ffn_forward`, but for that of ``bias``.

    Args:
        dy: (B, L, O), contiguous.
        hidden: What the forward pass returned, or None to recompute it.
        x, in_weight, in_bias, taps, conv_bias, weight, grid: As there.
        din_weight, dweight: Where to write those of in_weight and weight.
        din_bias, dtaps, dconv_bias: The same, as the parameters lie, without padded channels:
            (C',), (C' * 9,) channel by channel, (C',).

    Returns:
        The gradient of x.
    """
    dhidden, activation = (torch.empty(*x.shape[:2], in_weight.shape[0], dtype=x.dtype,
                                       device=x.device) for _ in range(2))
    sums = dtaps, dconv_bias, din_bias
    parts = list(_parts_of_batch(dhidden))
    for number, images in enumerate(parts):
        part = linear(x[images], in_weight, in_bias) if hidden is None else hidden[images]
        target = sums if number == 0 else [torch.empty_like(total) for total in sums]
        grid_conv_backward(part, linear_input_gradient(dy[images], weight), taps, conv_bias, grid,
                           'gelu', dx=dhidden[images], activation=activation[images],
                           dweight=target[0], dbias=target[1], dx_sum=target[2])
        if number:
            torch._foreach_add_(sums, target)
    del part
    linear_weight_gradient(dy, activation, out=dweight)
    del activation
    linear_weight_gradient(dhidden, x, out=din_weight)
    return linear_input_gradient(dhidden, in_weight)
