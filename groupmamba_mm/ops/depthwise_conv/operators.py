"""Linear layers behind a GELU, as ``torch.library`` operators that keep their inputs only.

The tensor between the two is a network's largest, so it is recomputed in the backward pass instead
of kept. The convolution before it runs in Triton, which is imported when it is first called.
"""
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import linear, linear_gradients, linear_input_gradient


def _kept(ctx, gradients) -> Tuple:
    """The gradients that are asked for, and None for the others and the grid."""
    gradients = (*gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients)))
    return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad))


@torch.library.custom_op('groupmamba_mm::conv_gelu_linear', mutates_args=())
def conv_gelu_linear(h: Tensor, h_bias: Tensor, conv_weight: Tensor, conv_bias: Tensor,
                     weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """GELU(3x3 depthwise convolution of h + conv_bias) weight^T + bias: the second half of an FFN.

    Args:
        h: (B, L, C) tokens, row-major, L = height * width; fp32, bf16 or fp16.
        h_bias: (C,) in the dtype of ``h``, the bias that ``h`` has in it already, added without a
            gradient: its gradient is the sum of that of ``h``, which costs nothing here and a pass
            over memory elsewhere.
        conv_weight: (C, 1, 3, 3) or (C, 9), any float dtype.
        conv_bias: (C,), any float dtype.
        weight: (O, C) in the dtype of ``h``.
        bias: (O,) in the dtype of ``h``.
        height: Rows of the grid.
        width: Columns of the grid.

    Returns:
        (B, L, O) in the dtype of ``h``.

    Raises:
        ValueError: Shapes or dtypes of the convolution do not fit; the message names which.
    """
    from .kernels import grid_conv_forward
    activation = grid_conv_forward(h, conv_weight, conv_bias, (height, width), 'gelu')
    return linear(activation, weight, bias)


@conv_gelu_linear.register_fake
def _(h, h_bias, conv_weight, conv_bias, weight, bias, height, width):
    return h.new_empty(*h.shape[:2], weight.shape[0])


@torch.library.custom_op('groupmamba_mm::conv_gelu_linear_backward', mutates_args=())
def _conv_gelu_linear_backward(
        dy: Tensor, h: Tensor, conv_weight: Tensor, conv_bias: Tensor, weight: Tensor, height: int,
        width: int) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, h_bias, conv_weight, conv_bias, weight and bias."""
    from .kernels import grid_conv_backward_activation, grid_conv_backward_input
    grid = (height, width)
    taps = conv_weight.reshape(-1, 9).t().contiguous().t()  # as both kernels want it, made once
    gradient, activation = grid_conv_backward_activation(
        h, linear_input_gradient(dy, weight), taps, conv_bias, grid, 'gelu', want_activation=True,
        overwrite_dy=True)
    dweight, dbias = linear_gradients(dy, activation)
    del activation  # before dh is made
    dh, dconv_weight, dconv_bias, dh_bias = grid_conv_backward_input(h, gradient, taps, grid)
    return (dh, dh_bias.to(h.dtype), dconv_weight.view(conv_weight.shape).to(conv_weight.dtype),
            dconv_bias.to(conv_bias.dtype), dweight, dbias)


@_conv_gelu_linear_backward.register_fake
def _(dy, h, conv_weight, conv_bias, weight, height, width):
    return (h.new_empty(h.shape), h.new_empty(h.shape[2]), conv_weight.new_empty(conv_weight.shape),
            conv_bias.new_empty(conv_bias.shape), weight.new_empty(weight.shape),
            weight.new_empty(weight.shape[0]))


def _keep_conv_gelu_linear(ctx, inputs, output) -> None:
    h, _, conv_weight, conv_bias, weight, _, ctx.height, ctx.width = inputs
    ctx.save_for_backward(h, conv_weight, conv_bias, weight)


def _differentiate_conv_gelu_linear(ctx, dy: Tensor) -> Tuple:
    return _kept(ctx, _conv_gelu_linear_backward(dy, *ctx.saved_tensors, ctx.height, ctx.width))


conv_gelu_linear.register_autograd(_differentiate_conv_gelu_linear,
                                   setup_context=_keep_conv_gelu_linear)


@torch.library.custom_op('groupmamba_mm::gelu_linear', mutates_args=())
def gelu_linear(h: Tensor, h_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(h) weight^T + bias, Eq. 5 from the activation on.

    Args:
        h: (B, L, C) tokens; fp32, bf16 or fp16.
        h_bias: (C,), as in :func:`conv_gelu_linear`.
        weight: (O, C) in the dtype of ``h``.
        bias: (O,) in the dtype of ``h``.

    Returns:
        (B, L, O) in the dtype of ``h``.
    """
    return linear(F.gelu(h), weight, bias)


@gelu_linear.register_fake
def _(h, h_bias, weight, bias):
    return h.new_empty(*h.shape[:2], weight.shape[0])


@torch.library.custom_op('groupmamba_mm::gelu_linear_backward', mutates_args=())
def _gelu_linear_backward(dy: Tensor, h: Tensor,
                          weight: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, h_bias, weight and bias."""
    from .kernels import gelu_backward
    dh, activation, dh_bias = gelu_backward(h.contiguous(), linear_input_gradient(dy, weight))
    dweight, dbias = linear_gradients(dy, activation)
    return dh, dh_bias.to(h.dtype), dweight, dbias


@_gelu_linear_backward.register_fake
def _(dy, h, weight):
    return (h.new_empty(h.shape), h.new_empty(h.shape[2]), weight.new_empty(weight.shape),
            weight.new_empty(weight.shape[0]))


def _keep_gelu_linear(ctx, inputs, output) -> None:
    h, _, weight, _ = inputs
    ctx.save_for_backward(h, weight)


def _differentiate_gelu_linear(ctx, dy: Tensor) -> Tuple:
    return _kept(ctx, _gelu_linear_backward(dy, *ctx.saved_tensors))


gelu_linear.register_autograd(_differentiate_gelu_linear, setup_context=_keep_gelu_linear)
