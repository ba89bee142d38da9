"""The norms as PyTorch operators: validation, shapes for tracing, and gradients.

Tokens are channels-last, (B, L, C). C is the length of ``weight``; an input may be wider, padded
for the matmul that wrote it, and then only its first C channels count and the rest of its gradient
is zero. The output is padded likewise, with zeros to Cp = ``round_up(C)``.

All operators run Triton kernels: on CUDA tensors, or on any in Triton's interpreter. Triton is
imported at the first call.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.library import custom_op

from ..integers import round_up
from ..linear import linear, linear_gradients, linear_input_gradient

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# --- LayerNorm ------------------------------------------------------------------------------------


@custom_op('groupmamba_mm::layer_norm', mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int,
               out_dtype: torch.dtype, mean_of: int) -> Tuple[Tensor, Tensor]:
    """LayerNorm over the channels of each group, and a mean over the tokens.

    Args:
        x: Tokens (B, L, >=C).
        weight: Scale (C,).
        bias: Shift (C,).
        eps: Added to the variance, positive.
        groups: Number of groups of C / groups channels with statistics of their own.
        out_dtype: Precision of the output, that of the matmul behind it.
        mean_of: 0 for no mean, 1 for that of ``x``, 2 for that of the output.

    Returns:
        The normed tokens (B, L, Cp), and the mean over L, (B, C) in fp32, or an empty tensor.

    Raises:
        ValueError: If shapes or options do not fit.
        RuntimeError: If the kernels cannot run.
    """
    _check_norm('layer_norm', weight, bias, eps, groups, out_dtype, mean_of)
    channels = weight.shape[0]
    _check_tokens('layer_norm', 'x', x, x, channels)
    _, normed, mean, _ = _kernels('layer_norm', x).add_norm_forward(
        x, None, None, weight, bias, eps, groups, round_up(channels), out_dtype, mean_of)
    return normed, mean


@layer_norm.register_fake
def _(x, weight, bias, eps, groups, out_dtype, mean_of):
    _check_norm('layer_norm', weight, bias, eps, groups, out_dtype, mean_of)
    _check_tokens('layer_norm', 'x', x, x, weight.shape[0])
    return _fake_normed(x, weight, out_dtype), _fake_mean(x, weight, mean_of)


def _layer_norm_setup(ctx, inputs, output):
    x, weight, bias, eps, groups, _, mean_of = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)
    ctx.options = (eps, groups, mean_of, x.shape[2], 0, x.dtype)
    ctx.bias_dtype = bias.dtype


def _layer_norm_backward(ctx, grad_normed, grad_mean):
    x, weight = ctx.saved_tensors
    grad_x, _, grads = _add_norm_backward(x, None, weight, None, None, grad_normed,
                                          grad_mean if ctx.options[2] else None, *ctx.options)
    grad_weight, grad_bias = grads.unbind(0)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), *[None] * 4


layer_norm.register_autograd(_layer_norm_backward, setup_context=_layer_norm_setup)

# --- residual and LayerNorm -----------------------------------------------------------------------


@custom_op('groupmamba_mm::add_layer_norm', mutates_args=())
def add_layer_norm(x: Tensor, branch: Tensor, branch_scale: Optional[Tensor], weight: Tensor,
                   bias: Tensor, eps: float, groups: int, out_dtype: torch.dtype, mean_of: int,
                   stream_dtype: Optional[torch.dtype] = None,
                   wants_rounded: bool = False) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual stream x + branch * branch_scale, and its LayerNorm as :func:`layer_norm`.

    Args:
        x: Tokens (B, L, >=C).
        branch: Tokens (B, L, >=C), of any float precision.
        branch_scale: Factor of each image's branch, (B,), or None; it gets no gradient.
        weight: Scale (C,).
        bias: Shift (C,).
        eps: Added to the variance, positive.
        groups: Number of groups of C / groups channels with statistics of their own.
        out_dtype: Precision of the normed tokens.
        mean_of: 0 for no mean, 1 for that of the stream, 2 for that of the normed tokens.
        stream_dtype: Precision of the stream, that of ``x`` if not given.
        wants_rounded: Whether to return the stream once more, for a second use that needs no more
            than the precision of products. The gradients of both uses are added on the way, where
            autograd would add them in a pass over the stream.

    Returns:
        The stream (B, L, C), the normed tokens (B, L, Cp), the mean over L, (B, C) in fp32, or an
        empty tensor, and the stream in ``out_dtype``, (B, L, C), or an empty tensor.

    Raises:
        ValueError: If shapes or options do not fit.
        RuntimeError: If the kernels cannot run.
    """
    _check_add_norm(x, branch, branch_scale, weight, bias, eps, groups, out_dtype, mean_of)
    return _kernels('add_layer_norm', x).add_norm_forward(
        x, branch, branch_scale, weight, bias, eps, groups, round_up(weight.shape[0]), out_dtype,
        mean_of, stream_dtype, wants_rounded)


@add_layer_norm.register_fake
def _(x, branch, branch_scale, weight, bias, eps, groups, out_dtype, mean_of, stream_dtype=None,
      wants_rounded=False):
    _check_add_norm(x, branch, branch_scale, weight, bias, eps, groups, out_dtype, mean_of)
    stream = x.new_empty(x.shape[0], x.shape[1], weight.shape[0], dtype=stream_dtype or x.dtype)
    rounded = stream.new_empty(stream.shape if wants_rounded else 0, dtype=out_dtype)
    return stream, _fake_normed(x, weight, out_dtype), _fake_mean(x, weight, mean_of), rounded


def _check_add_norm(x, branch, branch_scale, weight, bias, eps, groups, out_dtype, mean_of):
    _check_norm('add_layer_norm', weight, bias, eps, groups, out_dtype, mean_of)
    _check_tokens('add_layer_norm', 'x', x, x, weight.shape[0])
    _check_tokens('add_layer_norm', 'branch', branch, x, weight.shape[0])
    if branch_scale is not None:
        _check_vector('add_layer_norm', 'branch_scale', branch_scale, (x.shape[0], ), '(B,)')


def _add_layer_norm_setup(ctx, inputs, output):
    x, branch, branch_scale, weight, bias, eps, groups, _, mean_of, _, ctx.has_rounded = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], branch_scale, weight)
    # the same gradient for both, if it is to be rounded alike
    ctx.is_one = (branch_scale is None and branch.dtype == output[0].dtype
                  and branch.shape == x.shape)
    ctx.options = (eps, groups, mean_of, x.shape[2], 0 if ctx.is_one else branch.shape[2],
                   branch.dtype)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, bias.dtype


def _add_layer_norm_backward(ctx, grad_stream, grad_normed, grad_mean, grad_rounded):
    stream, branch_scale, weight = ctx.saved_tensors
    grad_x, grad_branch, grads = _add_norm_backward(
        stream, branch_scale, weight, grad_stream, grad_rounded if ctx.has_rounded else None,
        grad_normed, grad_mean if ctx.options[2] else None, *ctx.options)
    grad_weight, grad_bias = grads.unbind(0)
    return (grad_x.to(ctx.x_dtype), grad_x if ctx.is_one else grad_branch, None,
            grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), *[None] * 6)


add_layer_norm.register_autograd(_add_layer_norm_backward, setup_context=_add_layer_norm_setup)


@custom_op('groupmamba_mm::add_layer_norm_backward', mutates_args=())
def _add_norm_backward(stream: Tensor, branch_scale: Optional[Tensor], weight: Tensor,
                       grad_stream: Optional[Tensor], grad_rounded: Optional[Tensor],
                       grad_normed: Optional[Tensor], grad_mean: Optional[Tensor], eps: float,
                       groups: int, mean_of: int, x_width: int, branch_width: int,
                       branch_dtype: torch.dtype) -> Tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_branch, grads = _kernels('layer_norm', stream).add_norm_backward(
        stream, branch_scale, weight, grad_stream, grad_rounded, grad_normed, grad_mean, eps,
        groups, mean_of, x_width, branch_width, branch_dtype)
    return grad_x, _or_empty(grad_branch, stream), grads


@_add_norm_backward.register_fake
def _(stream, branch_scale, weight, grad_stream, grad_rounded, grad_normed, grad_mean, eps, groups,
      mean_of, x_width, branch_width, branch_dtype):
    rows = stream.shape[:2]
    grad_branch = stream.new_empty(*rows, branch_width, dtype=branch_dtype)
    return (stream.new_empty(*rows, x_width), grad_branch if branch_width else stream.new_empty(0),
            weight.new_empty(2, weight.shape[0], dtype=torch.float32))


# --- modulation and LayerNorm ---------------------------------------------------------------------


@custom_op('groupmamba_mm::scaled_layer_norm', mutates_args=())
def scaled_layer_norm(y: Tensor, residual: Optional[Tensor], multiplier: Optional[Tensor],
                      scale: Tensor, weight: Tensor, bias: Tensor, eps: float,
                      out_dtype: torch.dtype) -> Tensor:
    """LayerNorm of (y + residual) * multiplier * scale.

    Args:
        y: Tokens (B, L, >=C).
        residual: Tokens (B, L, >=C), or None.
        multiplier: Tokens (B, L, >=C), or None.
        scale: A factor for each image and channel, (B, C).
        weight: Scale (C,).
        bias: Shift (C,).
        eps: Added to the variance, positive.
        out_dtype: Precision of the output.

    Returns:
        The normed tokens (B, L, Cp).

    Raises:
        ValueError: If shapes or options do not fit.
        RuntimeError: If the kernels cannot run.
    """
    _check_scaled_norm(y, residual, multiplier, scale, weight, bias, eps, out_dtype)
    return _kernels('scaled_layer_norm', y).scaled_norm_forward(
        y, residual, multiplier, scale, weight, bias, eps, round_up(weight.shape[0]), out_dtype)


@scaled_layer_norm.register_fake
def _(y, residual, multiplier, scale, weight, bias, eps, out_dtype):
    _check_scaled_norm(y, residual, multiplier, scale, weight, bias, eps, out_dtype)
    return _fake_normed(y, weight, out_dtype)


def _check_scaled_norm(y, residual, multiplier, scale, weight, bias, eps, out_dtype):
    _check_norm('scaled_layer_norm', weight, bias, eps, 1, out_dtype, 0)
    channels = weight.shape[0]
    for name, tensor in (('y', y), ('residual', residual), ('multiplier', multiplier)):
        if tensor is not None:
            _check_tokens('scaled_layer_norm', name, tensor, y, channels)
    _check_vector('scaled_layer_norm', 'scale', scale, (y.shape[0], channels), '(B, C)')


def _scaled_layer_norm_setup(ctx, inputs, output):
    y, residual, multiplier, scale, weight, bias, eps, _ = inputs
    ctx.save_for_backward(y, residual, multiplier, scale, weight)
    ctx.eps = eps
    ctx.bias_dtype = bias.dtype


def _scaled_layer_norm_backward(ctx, grad_normed):
    y, residual, multiplier, scale, weight = ctx.saved_tensors
    grad_y, grad_residual, grad_multiplier, grad_scale, grads = _scaled_norm_backward(
        y, residual, multiplier, scale, weight, grad_normed, ctx.eps)
    grad_weight, grad_bias = grads.unbind(0)
    return (grad_y, None if residual is None else grad_residual,
            None if multiplier is None else grad_multiplier, grad_scale.to(scale.dtype),
            grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), None, None)


scaled_layer_norm.register_autograd(_scaled_layer_norm_backward,
                                    setup_context=_scaled_layer_norm_setup)


@custom_op('groupmamba_mm::scaled_layer_norm_backward', mutates_args=())
def _scaled_norm_backward(y: Tensor, residual: Optional[Tensor], multiplier: Optional[Tensor],
                          scale: Tensor, weight: Tensor, grad_normed: Tensor,
                          eps: float) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_y, grad_residual, grad_multiplier, grad_scale, grads = _kernels(
        'scaled_layer_norm', y).scaled_norm_backward(y, residual, multiplier, scale, weight,
                                                     grad_normed, eps)
    return grad_y, _or_empty(grad_residual, y), _or_empty(grad_multiplier, y), grad_scale, grads


@_scaled_norm_backward.register_fake
def _(y, residual, multiplier, scale, weight, grad_normed, eps):
    tokens = [y.new_empty(0) if t is None else t.new_empty(t.shape)
              for t in (y, residual, multiplier)]
    return (*tokens, scale.new_empty(scale.shape, dtype=torch.float32),
            weight.new_empty(2, weight.shape[0], dtype=torch.float32))


# --- the same in front of a linear layer ----------------------------------------------------------


@custom_op('groupmamba_mm::scaled_norm_linear', mutates_args=())
def scaled_norm_linear(y: Tensor, residual: Optional[Tensor], multiplier: Optional[Tensor],
                       scale: Tensor, weight: Tensor, bias: Tensor, eps: float,
                       linear_weight: Tensor, linear_bias: Tensor) -> Tensor:
    """A linear layer behind :func:`scaled_layer_norm`, whose output is not kept but recomputed.

    Args:
        y, residual, multiplier, scale, weight, bias, eps: As there.
        linear_weight: (O, Cp), in the precision of the product.
        linear_bias: (O,), in the same.

    Returns:
        (B, L, O) in the precision of the product.

    Raises:
        ValueError: If shapes or options do not fit.
        RuntimeError: If the kernels cannot run.
    """
    normed = scaled_layer_norm(y, residual, multiplier, scale, weight, bias, eps,
                               linear_weight.dtype)
    return linear(normed, linear_weight, linear_bias)


@scaled_norm_linear.register_fake
def _(y, residual, multiplier, scale, weight, bias, eps, linear_weight, linear_bias):
    _check_scaled_norm(y, residual, multiplier, scale, weight, bias, eps, linear_weight.dtype)
    return linear_weight.new_empty(*y.shape[:2], linear_weight.shape[0])


def _scaled_norm_linear_setup(ctx, inputs, output):
    y, residual, multiplier, scale, weight, bias, eps, linear_weight, _ = inputs
    ctx.save_for_backward(y, residual, multiplier, scale, weight, bias, linear_weight)
    ctx.eps = eps


def _scaled_norm_linear_backward(ctx, grad):
    y, residual, multiplier, scale, weight, bias, linear_weight = ctx.saved_tensors
    wants_bias = ctx.needs_input_grad[8]
    (grad_y, grad_residual, grad_multiplier, grad_scale, grads, grad_linear_weight,
     grad_linear_bias) = _scaled_norm_linear_gradients(
         grad, y, residual, multiplier, scale, weight, bias, linear_weight, ctx.eps, wants_bias)
    grad_weight, grad_bias = grads.unbind(0)
    return (grad_y, None if residual is None else grad_residual,
            None if multiplier is None else grad_multiplier, grad_scale.to(scale.dtype),
            grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, grad_linear_weight,
            grad_linear_bias if wants_bias else None)


scaled_norm_linear.register_autograd(_scaled_norm_linear_backward,
                                     setup_context=_scaled_norm_linear_setup)


@custom_op('groupmamba_mm::scaled_norm_linear_backward', mutates_args=())
def _scaled_norm_linear_gradients(
        grad: Tensor, y: Tensor, residual: Optional[Tensor], multiplier: Optional[Tensor],
        scale: Tensor, weight: Tensor, bias: Tensor, linear_weight: Tensor, eps: float,
        wants_bias: bool) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    normed = scaled_layer_norm(y, residual, multiplier, scale, weight, bias, eps,
                               linear_weight.dtype)
    grad_linear_weight, grad_linear_bias = linear_gradients(grad, normed, wants_bias)
    del normed  # before its gradient is made
    grads = _scaled_norm_backward(y, residual, multiplier, scale, weight,
                                  linear_input_gradient(grad, linear_weight), eps)
    return (*grads, grad_linear_weight, _or_empty(grad_linear_bias, y))


@_scaled_norm_linear_gradients.register_fake
def _(grad, y, residual, multiplier, scale, weight, bias, linear_weight, eps, wants_bias):
    tokens = [y.new_empty(0) if t is None else t.new_empty(t.shape)
              for t in (y, residual, multiplier)]
    return (*tokens, scale.new_empty(scale.shape, dtype=torch.float32),
            weight.new_empty(2, weight.shape[0], dtype=torch.float32),
            linear_weight.new_empty(linear_weight.shape),
            linear_weight.new_empty(linear_weight.shape[0]) if wants_bias else y.new_empty(0))


# --- channel affinity -----------------------------------------------------------------------------


@custom_op('groupmamba_mm::channel_affinity', mutates_args=())
def channel_affinity(mean: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor,
                     fc2_bias: Tensor, skip_scale: Optional[Tensor]) -> Tensor:
    """skip_scale * sigmoid(fc2(relu(fc1(mean)))): Eq. 7-8, and the released model's skip.

    Args:
        mean: Mean over the tokens, (B, C), fp32.
        fc1_weight: Weight of the squeeze, (Hd, C).
        fc1_bias: Its bias, (Hd,).
        fc2_weight: Weight of the excitation, (C, Hd).
        fc2_bias: Its bias, (C,).
        skip_scale: One factor for all, (1,), or None.

    Returns:
        The scale of each image's channels, (B, C), fp32.

    Raises:
        ValueError: If shapes do not fit.
        RuntimeError: If the kernels cannot run.
    """
    _check_affinity(mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias, skip_scale)
    return _kernels('channel_affinity', mean).affinity_forward(
        mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias, skip_scale)


@channel_affinity.register_fake
def _(mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias, skip_scale):
    _check_affinity(mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias, skip_scale)
    return mean.new_empty(mean.shape)


def _check_affinity(mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias, skip_scale):
    if mean.dim() != 2 or mean.dtype != torch.float32:
        raise ValueError('channel_affinity: mean must be (B, C) in torch.float32, got '
                         f'{tuple(mean.shape)} in {mean.dtype}')
    if fc1_weight.dim() != 2:
        raise ValueError('channel_affinity: fc1_weight must be (Hd, C), got '
                         f'{tuple(fc1_weight.shape)}')
    channels, hidden = mean.shape[1], fc1_weight.shape[0]
    for name, tensor, shape, layout in (
            ('fc1_weight', fc1_weight, (hidden, channels), '(Hd, C)'),
            ('fc1_bias', fc1_bias, (hidden, ), '(Hd,)'),
            ('fc2_weight', fc2_weight, (channels, hidden), '(C, Hd)'),
            ('fc2_bias', fc2_bias, (channels, ), '(C,)'),
            ('skip_scale', skip_scale, (1, ), '(1,)')):
        if tensor is not None:
            _check_vector('channel_affinity', name, tensor, shape, layout)


def _channel_affinity_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _channel_affinity_backward(ctx, grad):
    arguments = ctx.saved_tensors  # to be read once, for activation checkpointing
    *grads, grad_skip = _affinity_backward(*arguments, grad)
    return (*grads, None if arguments[-1] is None else grad_skip)


channel_affinity.register_autograd(_channel_affinity_backward,
                                   setup_context=_channel_affinity_setup)


@custom_op('groupmamba_mm::channel_affinity_backward', mutates_args=())
def _affinity_backward(mean: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor,
                       fc2_bias: Tensor, skip_scale: Optional[Tensor], grad: Tensor
                       ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *grads, grad_skip = _kernels('channel_affinity', mean).affinity_backward(
        mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias, skip_scale, grad)
    return (*grads, _or_empty(grad_skip, mean))


@_affinity_backward.register_fake
def _(mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias, skip_scale, grad):
    return tuple(mean.new_empty(0) if t is None else t.new_empty(t.shape)
                 for t in (mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias, skip_scale))


# --- shared ---------------------------------------------------------------------------------------


def _kernels(operator: str, tensor: Tensor):
    """The module of the Triton kernels, if they can run on ``tensor``."""
    try:
        from . import kernels
    except ImportError as error:
        raise RuntimeError(f'{operator}: Triton cannot be imported ({error}); install it with '
                           "'pip install triton'") from error
    if not kernels.runs_on(tensor.device):
        raise RuntimeError(f'{operator}: Triton kernels cannot run on {tensor.device.type} '
                           'tensors; move them to a CUDA GPU, or set TRITON_INTERPRET=1 before '
                           'the start to interpret the kernels')
    return kernels


def _check_norm(operator, weight, bias, eps, groups, out_dtype, mean_of):
    if weight.dim() != 1 or bias.shape != weight.shape:
        raise ValueError(f'{operator}: weight and bias must both be (C,), got '
                         f'{tuple(weight.shape)} and {tuple(bias.shape)}')
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f'{operator}: {weight.shape[0]} channels cannot be divided into '
                         f'{groups} groups; choose a divisor')
    if eps <= 0:
        raise ValueError(f'{operator}: eps must be positive, got {eps}')
    if out_dtype not in _FLOATS:
        raise ValueError(f'{operator}: out_dtype must be one of {_FLOATS}, got {out_dtype}')
    if mean_of not in (0, 1, 2):
        raise ValueError(f'{operator}: mean_of must be 0, 1 or 2, got {mean_of}')


def _check_tokens(operator, name, tensor, like, channels):
    """Tokens of as many images and positions as ``like``, with at least ``channels`` channels."""
    if tensor.dim() != 3 or tensor.shape[:2] != like.shape[:2] or tensor.shape[2] < channels:
        raise ValueError(f'{operator}: {name} must be (B, L, >=C) with B, L = '
                         f'{tuple(like.shape[:2])} and C = {channels}, got {tuple(tensor.shape)}')
    if tensor.dtype not in _FLOATS:
        raise ValueError(f'{operator}: {name} must be of one of {_FLOATS}, got {tensor.dtype}')


def _check_vector(operator, name, tensor, shape, layout):
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f'{operator}: {name} must be {layout} = {tuple(shape)}, got '
                         f'{tuple(tensor.shape)}')


def _fake_normed(x, weight, out_dtype):
    return x.new_empty(x.shape[0], x.shape[1], round_up(weight.shape[0]), dtype=out_dtype)


def _fake_mean(x, weight, mean_of):
    shape = (x.shape[0], weight.shape[0]) if mean_of else (0, )
    return x.new_empty(shape, dtype=torch.float32)


def _or_empty(tensor, like):
    return like.new_empty(0) if tensor is None else tensor
