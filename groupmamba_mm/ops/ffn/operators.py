"""FFNs, and projections of groups, as ``torch.library`` operators.

What is between GELU and the last layer is as large as a network's tensors get, so it is computed
again in the backward pass instead of kept. Kernels are in Triton, which is imported when they are
first called.
"""
import functools
from typing import Iterator, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..integers import cdiv
from ..linear import linear, linear_gradients, linear_input_gradient

#: Channels of a group that :func:`residual_group_ffn` and :func:`group_linear` have kernels for:
#: more do not fit into shared memory.
WIDEST_GROUP, WIDEST_LINEAR_GROUP = 192, 256

#: Bytes of a part of the batch's hidden tensors in the backward pass. There are four of them, two
#: of which are made part by part.
_PART = 2**27


def _parts_of_batch(tensor: Tensor) -> Iterator[slice]:
    """Images of each part of (B, L, C), as few parts of up to _PART bytes as will do."""
    images = tensor.shape[0]
    step = max(1, cdiv(images, max(1, cdiv(tensor.nbytes, _PART))))
    return (slice(first, first + step) for first in range(0, max(1, images), step))


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
    from ..depthwise_conv.kernels import grid_conv_forward
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
    from ..depthwise_conv.kernels import grid_conv_backward
    dhidden, activation = (torch.empty(*x.shape[:2], in_weight.shape[0], dtype=x.dtype,
                                       device=x.device) for _ in range(2))
    sums = []
    for images in _parts_of_batch(dhidden):
        part = hidden[images] if keep_hidden else linear(x[images], in_weight, in_bias)
        _, *sums_of_part = grid_conv_backward(
            part, linear_input_gradient(dy[images], weight), conv_weight, conv_bias,
            (height, width), 'gelu', dx=dhidden[images], activation=activation[images])
        sums.append(sums_of_part)
    dconv_weight, dconv_bias, din_bias = (functools.reduce(torch.add, of_parts)
                                          for of_parts in zip(*sums))
    del hidden, part
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
        in_bias: (C,) in any float dtype: the kernels spare the caller a cast.
        weight: (O, C) in the dtype of ``x``.
        bias: (O,) in any float dtype.
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
        is_weight = tensor.dim() > 1
        if tensor.shape != shape or is_weight and tensor.dtype != x.dtype:
            raise ValueError(f'plain_ffn: {name} must be {shape}'
                             + (f' in {x.dtype}' if is_weight else '')
                             + f' for x of {tuple(x.shape)}, got {tuple(tensor.shape)} in '
                             f'{tensor.dtype}')


@plain_ffn.register_fake
def _(x, in_weight, in_bias, weight, bias, keep_hidden):
    hidden = (*x.shape[:2], in_weight.shape[0]) if keep_hidden else (0, )
    return x.new_empty(*x.shape[:2], weight.shape[0]), x.new_empty(hidden)


@torch.library.custom_op('groupmamba_mm::plain_ffn_backward', mutates_args=())
def _plain_ffn_backward(dy: Tensor, hidden: Tensor, x: Tensor, in_weight: Tensor, in_bias: Tensor,
                        weight: Tensor,
                        keep_hidden: bool) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, in_weight, in_bias, weight and bias, those of the biases in fp32."""
    from ..sums import column_sums
    from .hidden import fits, gelu_backward, hidden_backward
    if not keep_hidden and fits(x, x.shape[2], weight.shape[0]):
        dhidden, activation, din_bias = hidden_backward(x, in_weight, in_bias, dy, weight)
    else:
        if not keep_hidden:
            hidden = linear(x, in_weight, in_bias)
        dhidden, activation, din_bias = gelu_backward(hidden.contiguous(),
                                                      linear_input_gradient(dy, weight))
    del hidden
    dweight, _ = linear_gradients(dy, activation, wants_bias=False)
    del activation
    din_weight, _ = linear_gradients(dhidden, x, wants_bias=False)
    return (linear_input_gradient(dhidden, in_weight), din_weight, din_bias, dweight,
            column_sums(dy.flatten(0, 1), torch.float32))


@_plain_ffn_backward.register_fake
def _(dy, hidden, x, in_weight, in_bias, weight, keep_hidden):
    return (x.new_empty(x.shape), in_weight.new_empty(in_weight.shape),
            in_bias.new_empty(in_bias.shape, dtype=torch.float32), weight.new_empty(weight.shape),
            weight.new_empty(weight.shape[0], dtype=torch.float32))


def _keep_plain_ffn(ctx, inputs, output) -> None:
    x, in_weight, in_bias, weight, bias, ctx.keep_hidden = inputs
    ctx.save_for_backward(output[1], x, in_weight, in_bias, weight)
    ctx.mark_non_differentiable(output[1])
    ctx.bias_dtypes = in_bias.dtype, bias.dtype


def _differentiate_plain_ffn(ctx, dy: Tensor, _) -> Tuple:
    dx, din_weight, din_bias, dweight, dbias = _plain_ffn_backward(dy, *ctx.saved_tensors,
                                                                   ctx.keep_hidden)
    of_in_bias, of_bias = ctx.bias_dtypes
    return _kept(ctx, (dx, din_weight, din_bias.to(of_in_bias), dweight, dbias.to(of_bias)))


plain_ffn.register_autograd(_differentiate_plain_ffn, setup_context=_keep_plain_ffn)


@torch.library.custom_op('groupmamba_mm::residual_group_ffn', mutates_args=())
def residual_group_ffn(x: Tensor, branch: Tensor, norm_weight: Tensor, norm_bias: Tensor,
                       eps: float, in_weight: Tensor, in_bias: Tensor, weight: Tensor,
                       bias: Tensor, keep: bool) -> Tuple[Tensor, Tensor, Tensor]:
    """s + FFN(LN(s)) with s = x + branch, norm and FFN in each group of W channels on its own.

    In half precision, on a GPU with the shared memory of an H100, all of it is one kernel, or two
    in training: the backward pass needs s and its norm. The hidden tensor it makes again.

    Args:
        x: (B, L, C) tokens, C = G * W, any float dtype.
        branch: (B, L, >=C), any float dtype.
        norm_weight, norm_bias: (C,) of the LayerNorm of s, any float dtype.
        eps: Added to its variance.
        in_weight: (G, H, >=W), zero from column W on; its dtype, fp32, bf16 or fp16, is that of s,
            of the products and of the output. Rows of a multiple of 8 are faster than others.
        in_bias: (G, H), any float dtype.
        weight: (G, W, H), in the dtype of in_weight.
        bias: (G, W), any float dtype.
        keep: Whether what the backward pass needs is returned, else two empty tensors.

    Returns:
        (B, L, C); s and LN(s), both (B, L, C).

    Raises:
        ValueError: Shapes or dtypes do not fit; the message names the argument.
    """
    _check_residual_ffn(x, branch, norm_weight, norm_bias, in_weight, in_bias, weight, bias)
    from ..norm.kernels import add_norm_forward
    from .groups import fits, residual_forward
    is_one = fits(in_weight)
    kept = None
    if keep or not is_one:
        # a kernel of its own for these two is faster than one that also writes them
        *kept, _, _ = add_norm_forward(x, branch, None, norm_weight, norm_bias, eps,
                                       in_weight.shape[0], x.shape[2], in_weight.dtype, 0,
                                       in_weight.dtype)
    if is_one:
        y = residual_forward(x, branch, norm_weight, norm_bias, eps, in_weight, in_bias, weight,
                             bias, kept)
    else:
        stream, n = kept
        with torch.autocast(x.device.type, enabled=False):
            activation = F.gelu(_group_hidden(n, in_weight, in_bias))
            y = torch.baddbmm(bias.to(weight.dtype)[:, None], activation, weight.mT)
            y = stream + _from_groups(y, x)
    return y, *(kept if keep else (y.new_empty(0), y.new_empty(0)))


def _check_residual_ffn(x, branch, norm_weight, norm_bias, in_weight, in_bias, weight,
                        bias) -> None:
    """Kernels take sizes from the last weight: others would be read beyond their end."""
    if weight.dim() != 3:
        raise ValueError(f'residual_group_ffn: weight must be (G, W, H), got {tuple(weight.shape)}')
    groups, width, hidden = weight.shape
    channels = groups * width
    for name, tensor, shape in (
            ('x', x, (*x.shape[:2], channels)),
            ('branch', branch, (*x.shape[:2], max(channels, branch.shape[-1]))),
            ('norm_weight', norm_weight, (channels, )), ('norm_bias', norm_bias, (channels, )),
            ('in_weight', in_weight, (groups, hidden, max(width, in_weight.shape[-1]))),
            ('in_bias', in_bias, (groups, hidden)), ('bias', bias, (groups, width))):
        is_other = name == 'in_weight' and tensor.dtype != weight.dtype
        if tensor.shape != shape or is_other:
            raise ValueError(f'residual_group_ffn: {name} must be {tuple(shape)}'
                             + (f' in {weight.dtype}' if is_other else '')
                             + f' for weight of {tuple(weight.shape)}, got '
                             f'{tuple(tensor.shape)} in {tensor.dtype}')


def _to_groups(x: Tensor, groups: int) -> Tensor:
    """(B, L, G * W) to (G, B * L, W)."""
    return x.unflatten(-1, (groups, -1)).flatten(0, 1).transpose(0, 1)


def _from_groups(y: Tensor, x: Tensor) -> Tensor:
    """(G, B * L, W) to (B, L, G * W), the tokens of ``x``."""
    return y.transpose(0, 1).flatten(1).unflatten(0, x.shape[:2])


def _group_hidden(n: Tensor, in_weight: Tensor, in_bias: Tensor) -> Tensor:
    """What GELU is applied to, (G, B * L, H)."""
    n = _to_groups(n, in_weight.shape[0])
    return torch.baddbmm(in_bias.to(n.dtype)[:, None], n, in_weight[..., :n.shape[2]].mT)


@residual_group_ffn.register_fake
def _(x, branch, norm_weight, norm_bias, eps, in_weight, in_bias, weight, bias, keep):
    kept = x.shape if keep else (0, )
    return tuple(in_weight.new_empty(shape) for shape in (x.shape, kept, kept))


@torch.library.custom_op('groupmamba_mm::residual_group_ffn_backward', mutates_args=())
def _residual_ffn_backward(dy: Tensor, stream: Tensor, n: Tensor, norm_weight: Tensor, eps: float,
                           in_weight: Tensor, in_bias: Tensor,
                           weight: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of s; of norm_weight, norm_bias and bias, (3, C); of the others, a row a group."""
    from ..norm.kernels import add_norm_backward
    from .groups import ffn_backward, fits
    groups, width, _ = weight.shape
    if fits(in_weight):
        dn, rows = ffn_backward(n, dy, in_weight, in_bias, weight)
    else:
        with torch.autocast(n.device.type, enabled=False):
            dy_of_groups, hidden = _to_groups(dy, groups), _group_hidden(n, in_weight, in_bias)
            dhidden = torch.ops.aten.gelu_backward(dy_of_groups @ weight, hidden)
            dn = _from_groups(dhidden @ in_weight[..., :width], n)
            din_weight = F.pad(dhidden.mT @ _to_groups(n, groups), (0, in_weight.shape[2] - width))
            gradients = din_weight, dhidden.sum(1), dy_of_groups.mT @ F.gelu(hidden)
        rows = torch.cat([gradient.flatten(1) for gradient in gradients], 1)
    ds, _, vectors = add_norm_backward(stream, None, norm_weight, dy, None, dn, None, eps, groups,
                                       0, n.shape[2], 0, n.dtype, wants_sum=True)
    return ds, vectors, rows


@_residual_ffn_backward.register_fake
def _(dy, stream, n, norm_weight, eps, in_weight, in_bias, weight):
    groups, width, hidden = weight.shape
    return (torch.empty_like(stream), norm_weight.new_empty(3, groups * width, dtype=torch.float32),
            in_weight.new_empty(groups, hidden * (in_weight.shape[2] + 1 + width)))


def _keep_residual_ffn(ctx, inputs, output) -> None:
    x, branch, norm_weight, _, ctx.eps, in_weight, in_bias, weight, bias, ctx.keeps = inputs
    ctx.save_for_backward(*output[1:], norm_weight, in_weight, in_bias, weight)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes, ctx.padding = (x.dtype, branch.dtype), branch.shape[2] - x.shape[2]


def _differentiate_residual_ffn(ctx, dy: Tensor, *_) -> Tuple:
    if not ctx.keeps:
        raise RuntimeError('residual_group_ffn was called with keep=False: it has no gradient')
    stream, n, norm_weight, in_weight, in_bias, weight = ctx.saved_tensors
    ds, vectors, rows = _residual_ffn_backward(dy, stream, n, norm_weight, ctx.eps, in_weight,
                                               in_bias, weight)
    din_weight, din_bias, dweight = rows.split(
        [in_weight[0].numel(), in_bias.shape[1], weight[0].numel()], 1)
    dnorm_weight, dnorm_bias, dbias = vectors.unbind(0)
    dx, dbranch = (ds.to(dtype) for dtype in ctx.dtypes)
    return _kept(ctx, (dx, F.pad(dbranch, (0, ctx.padding)) if ctx.padding else dbranch,
                       dnorm_weight.to(norm_weight.dtype), dnorm_bias.to(norm_weight.dtype), None,
                       din_weight.view(in_weight.shape), din_bias.to(in_bias.dtype),
                       dweight.view(weight.shape),
                       dbias.to(ctx.bias_dtype).view(weight.shape[:2])))


residual_group_ffn.register_autograd(_differentiate_residual_ffn, setup_context=_keep_residual_ffn)


@torch.library.custom_op('groupmamba_mm::group_linear', mutates_args=())
def group_linear(x: Tensor, weight: Tensor, width: int, parts: int, stored: int) -> Tensor:
    """A linear layer of each group without bias: x weight^T, in ``parts`` of all groups.

    Args:
        x: (B, L, >=G * width) tokens, what is behind the groups is ignored; fp32, bf16 or fp16.
        weight: (G, parts * d, >=width) in the dtype of ``x``, zero from column ``width`` on. Rows
            of a multiple of 8 are faster than others.
        width: Channels of a group of ``x``.
        parts: What each group's outputs are split into.
        stored: Channels of a group in memory, at least d.

    Returns:
        (B, L, parts * G * stored) in the dtype of ``x``: all groups of the first part, then those
        of the next; zero in the padding of each group's channels.

    Raises:
        ValueError: Shapes or dtypes do not fit; the message names the argument.
    """
    _check_group_linear(x, weight, width, parts, stored)
    from .groups import fits_projection, project_forward
    if fits_projection(weight):
        return project_forward(x, weight, width, parts, stored)
    groups, outputs, _ = weight.shape
    with torch.autocast(x.device.type, enabled=False):
        y = torch.bmm(_to_groups(x[..., :groups * width], groups), weight[..., :width].mT)
    y = F.pad(y.unflatten(2, (parts, -1)), (0, stored - outputs // parts))
    return y.movedim(0, 2).flatten(1).unflatten(0, x.shape[:2])


def _check_group_linear(x: Tensor, weight: Tensor, width: int, parts: int, stored: int) -> None:
    if weight.dim() != 3:
        raise ValueError(f'group_linear: weight must be (G, parts * d, >={width}), got '
                         f'{tuple(weight.shape)}')
    groups, outputs, columns = weight.shape
    if not 1 <= width <= columns:
        raise ValueError(f'group_linear: width must be one of 1 to {columns}, the columns of '
                         f'weight, got {width}')
    if x.dim() != 3 or x.shape[2] < groups * width:
        raise ValueError(f'group_linear: x must be (B, L, >={groups * width}) for {groups} groups '
                         f'of {width} channels, got {tuple(x.shape)}')
    if weight.dtype != x.dtype:
        raise ValueError(f'group_linear: weight must be in {x.dtype} as x is, got {weight.dtype}')
    if parts < 1 or outputs % parts or stored < outputs // parts:
        raise ValueError(f'group_linear: weight has {outputs} outputs a group, which are not '
                         f'{parts} parts of up to {stored} (parts, stored)')


@group_linear.register_fake
def _(x, weight, width, parts, stored):
    return x.new_empty(*x.shape[:2], parts * weight.shape[0] * stored)


@torch.library.custom_op('groupmamba_mm::group_linear_backward', mutates_args=())
def _group_linear_backward(dy: Tensor, x: Tensor, weight: Tensor, width: int, parts: int,
                           stored: int) -> Tuple[Tensor, Tensor]:
    from .groups import fits_projection, project_backward
    if fits_projection(weight):
        return project_backward(dy, x, weight, width, parts, stored)
    groups, outputs, columns = weight.shape
    dy = dy.flatten(0, 1).unflatten(1, (parts, groups, stored))[..., :outputs // parts]
    dy = dy.movedim(2, 0).flatten(2)
    with torch.autocast(x.device.type, enabled=False):
        dx = _from_groups(dy @ weight[..., :width], x)
        dweight = dy.mT @ _to_groups(x[..., :groups * width], groups)
    return F.pad(dx, (0, x.shape[2] - dx.shape[2])), F.pad(dweight, (0, columns - width))


@_group_linear_backward.register_fake
def _(dy, x, weight, width, parts, stored):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep_group_linear(ctx, inputs, output) -> None:
    x, weight, *ctx.sizes = inputs
    ctx.save_for_backward(x, weight)


def _differentiate_group_linear(ctx, dy: Tensor) -> Tuple:
    return _kept(ctx, _group_linear_backward(dy, *ctx.saved_tensors, *ctx.sizes))


group_linear.register_autograd(_differentiate_group_linear, setup_context=_keep_group_linear)
