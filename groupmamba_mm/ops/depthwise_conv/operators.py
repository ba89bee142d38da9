"""FFNs as ``torch.library`` operators.

What is between GELU and the last layer is as large as a network's tensors get, so it is computed
again in the backward pass instead of kept. Kernels are in Triton, which is imported when they are
first called.
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


@torch.library.custom_op('groupmamba_mm::conv_ffn', mutates_args=())
def conv_ffn(x: Tensor, in_weight: Tensor, in_bias: Tensor, conv_weight: Tensor, conv_bias: Tensor,
             weight: Tensor, bias: Tensor, height: int, width: int,
             keep_hidden: bool) -> Tuple[Tensor, Tensor]:
    """An FFN with a convolution: GELU(conv(x in_weight^T + in_bias) + conv_bias) weight^T + bias.

    One operator for all of it because the bias of the first layer gets its gradient from the
    convolution's kernel, and because the hidden tensor between those two, the largest of the
    network, may then be made again in the backward pass.

    Args:
        x: (B, L, I) tokens, row-major, L = height * width; fp32, bf16 or fp16.
        in_weight: (C, I) in the dtype of ``x``.
        in_bias: (C,) in the dtype of ``x``.
        conv_weight: (C, 1, 3, 3) or (C, 9), depthwise, any float dtype.
        conv_bias: (C,), any float dtype.
        weight: (O, C) in the dtype of ``x``.
        bias: (O,) in the dtype of ``x``.
        height: Rows of the grid.
        width: Columns of the grid.
        keep_hidden: Whether the hidden tensor is kept for the backward pass, or made again there.

    Returns:
        (B, L, O) in the dtype of ``x``; and what is kept, (B, L, C) or nothing.

    Raises:
        ValueError: Shapes or dtypes of the convolution do not fit; the message names which.
    """
    from .kernels import grid_conv_forward
    hidden = linear(x, in_weight, in_bias)
    activation = grid_conv_forward(hidden, conv_weight, conv_bias, (height, width), 'gelu')
    return linear(activation, weight, bias), hidden if keep_hidden else x.new_empty(0)


@conv_ffn.register_fake
def _(x, in_weight, in_bias, conv_weight, conv_bias, weight, bias, height, width, keep_hidden):
    hidden = (*x.shape[:2], in_weight.shape[0]) if keep_hidden else (0, )
    return x.new_empty(*x.shape[:2], weight.shape[0]), x.new_empty(hidden)


@torch.library.custom_op('groupmamba_mm::conv_ffn_backward', mutates_args=())
def _conv_ffn_backward(
        dy: Tensor, hidden: Tensor, x: Tensor, in_weight: Tensor, in_bias: Tensor,
        conv_weight: Tensor, conv_bias: Tensor, weight: Tensor, height: int, width: int,
        keep_hidden: bool) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, in_weight, in_bias, conv_weight, conv_bias, weight and bias."""
    from .kernels import grid_conv_backward
    if not keep_hidden:
        hidden = linear(x, in_weight, in_bias)
    dhidden, dconv_weight, dconv_bias, activation, din_bias = grid_conv_backward(
        hidden, linear_input_gradient(dy, weight), conv_weight, conv_bias, (height, width), 'gelu',
        want_activation=True)
    del hidden
    dweight, dbias = linear_gradients(dy, activation)
    del activation
    din_weight, _ = linear_gradients(dhidden, x, wants_bias=False)
    return (linear_input_gradient(dhidden, in_weight), din_weight, din_bias.to(in_bias.dtype),
            dconv_weight.view(conv_weight.shape).to(conv_weight.dtype),
            dconv_bias.to(conv_bias.dtype), dweight, dbias)


@_conv_ffn_backward.register_fake
def _(dy, hidden, x, in_weight, in_bias, conv_weight, conv_bias, weight, height, width,
      keep_hidden):
    return (x.new_empty(x.shape), in_weight.new_empty(in_weight.shape),
            in_bias.new_empty(in_bias.shape), conv_weight.new_empty(conv_weight.shape),
            conv_bias.new_empty(conv_bias.shape), weight.new_empty(weight.shape),
            weight.new_empty(weight.shape[0]))


def _keep_conv_ffn(ctx, inputs, output) -> None:
    *tensors, _, ctx.height, ctx.width, ctx.keep_hidden = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _differentiate_conv_ffn(ctx, dy: Tensor, _) -> Tuple:
    return _kept(ctx, _conv_ffn_backward(dy, *ctx.saved_tensors, ctx.height, ctx.width,
                                         ctx.keep_hidden))


conv_ffn.register_autograd(_differentiate_conv_ffn, setup_context=_keep_conv_ffn)


@torch.library.custom_op('groupmamba_mm::plain_ffn', mutates_args=())
def plain_ffn(x: Tensor, in_weight: Tensor, in_bias: Tensor, weight: Tensor, bias: Tensor,
              keep_hidden: bool) -> Tuple[Tensor, Tensor]:
    """An FFN, Eq. 5: GELU(x in_weight^T + in_bias) weight^T + bias.

    In half precision, on a GPU with the shared memory of an H100, GELU is in the kernel of the
    first product if that has up to 512 inputs. With up to 256 channels before and behind, unless
    the hidden tensor is to be kept, so is its gradient.

    Args:
        x: (B, L, I) tokens; fp32, bf16 or fp16.
        in_weight: (C, I) in the dtype of ``x``.
        in_bias: (C,) in the dtype of ``x``.
        weight: (O, C) in the dtype of ``x``.
        bias: (O,) in the dtype of ``x``.
        keep_hidden: Whether the hidden tensor is kept for the backward pass, or made again there.

    Returns:
        (B, L, O) in the dtype of ``x``; and what is kept, (B, L, C) or nothing.

    Raises:
        ValueError: Shapes or dtypes do not fit; the message names the argument.
    """
    _check_plain_ffn(x, in_weight, in_bias, weight, bias)
    from .hidden import ffn_forward, fits, fits_wide, wide_forward
    if not keep_hidden and fits(x, x.shape[2], weight.shape[0]):
        return ffn_forward(x, in_weight, in_bias, weight, bias), x.new_empty(0)
    if fits_wide(x):
        activation, hidden = wide_forward(x, in_weight, in_bias, keep_hidden)
    else:
        hidden = linear(x, in_weight, in_bias)
        activation = F.gelu(hidden)
    return linear(activation, weight, bias), hidden if keep_hidden else x.new_empty(0)


def _check_plain_ffn(x: Tensor, in_weight: Tensor, in_bias: Tensor, weight: Tensor,
                     bias: Tensor) -> None:
    """Kernels take sizes from the weights: others would be read beyond their end."""
    inputs, channels, outputs = x.shape[-1], in_weight.shape[0], weight.shape[0]
    for name, tensor, shape in (
            ('in_weight', in_weight, (channels, inputs)), ('in_bias', in_bias, (channels, )),
            ('weight', weight, (outputs, channels)), ('bias', bias, (outputs, ))):
        if tensor.shape != shape or tensor.dtype != x.dtype:
            raise ValueError(f'plain_ffn: {name} must be {shape} in {x.dtype} for x of '
                             f'{tuple(x.shape)}, got {tuple(tensor.shape)} in {tensor.dtype}')


@plain_ffn.register_fake
def _(x, in_weight, in_bias, weight, bias, keep_hidden):
    hidden = (*x.shape[:2], in_weight.shape[0]) if keep_hidden else (0, )
    return x.new_empty(*x.shape[:2], weight.shape[0]), x.new_empty(hidden)


@torch.library.custom_op('groupmamba_mm::plain_ffn_backward', mutates_args=())
def _plain_ffn_backward(dy: Tensor, hidden: Tensor, x: Tensor, in_weight: Tensor, in_bias: Tensor,
                        weight: Tensor,
                        keep_hidden: bool) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, in_weight, in_bias, weight and bias."""
    from .hidden import fits, hidden_backward
    from .kernels import gelu_backward
    if not keep_hidden and fits(x, x.shape[2], weight.shape[0]):
        dhidden, activation, din_bias = hidden_backward(x, in_weight, in_bias, dy, weight)
    else:
        if not keep_hidden:
            hidden = linear(x, in_weight, in_bias)
        dhidden, activation, din_bias = gelu_backward(hidden.contiguous(),
                                                      linear_input_gradient(dy, weight))
    del hidden
    dweight, dbias = linear_gradients(dy, activation)
    del activation
    din_weight, _ = linear_gradients(dhidden, x, wants_bias=False)
    return (linear_input_gradient(dhidden, in_weight), din_weight, din_bias.to(in_bias.dtype),
            dweight, dbias)


@_plain_ffn_backward.register_fake
def _(dy, hidden, x, in_weight, in_bias, weight, keep_hidden):
    return (x.new_empty(x.shape), in_weight.new_empty(in_weight.shape),
            in_bias.new_empty(in_bias.shape), weight.new_empty(weight.shape),
            weight.new_empty(weight.shape[0]))


def _keep_plain_ffn(ctx, inputs, output) -> None:
    x, in_weight, in_bias, weight, _, ctx.keep_hidden = inputs
    ctx.save_for_backward(output[1], x, in_weight, in_bias, weight)
    ctx.mark_non_differentiable(output[1])


def _differentiate_plain_ffn(ctx, dy: Tensor, _) -> Tuple:
    return _kept(ctx, _plain_ffn_backward(dy, *ctx.saved_tensors, ctx.keep_hidden))


plain_ffn.register_autograd(_differentiate_plain_ffn, setup_context=_keep_plain_ffn)
