"""The fused scan as operators of ``torch.library``: what autograd, compile and export see."""
from typing import Optional, Tuple

import torch
from torch import Tensor

# The kernels are imported by the first call: the package has to import without Triton.


def _scan(xz: Tensor, dt_proj: Tensor, A_log: Tensor, norm_weight: Optional[Tensor], columns: int,
          reverses: int, height: int, width: int, gated: bool, eps: float):
    from .launch import Scan
    groups, channels, dt_rank = dt_proj.shape
    return Scan(height, width, groups, channels, xz.shape[-1] // (groups * (2 if gated else 1)),
                dt_rank, A_log.shape[-1], columns, reverses, eps, norm_weight is not None)


def _split(xz: Tensor, gated: bool) -> Tuple[Tensor, Optional[Tensor]]:
    """x and z, channels side by side: tokens from PyTorch's convolutions may lie otherwise."""
    if xz.stride(-1) != 1:
        xz = xz.contiguous()
    if not gated:
        return xz, None
    half = xz.shape[-1] // 2
    return xz[..., :half], xz[..., half:]


@torch.library.custom_op('groupmamba_mm::grouped_ssm', mutates_args=())
def grouped_ssm_op(xz: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
                   D: Tensor, norm_weight: Optional[Tensor], norm_bias: Optional[Tensor],
                   conv_weight: Optional[Tensor], conv_bias: Optional[Tensor], columns: int,
                   reverses: int, height: int, width: int, gated: bool, eps: float,
                   keep: bool) -> Tuple[Tensor, Tensor, Tensor]:
    """See :func:`groupmamba_mm.ops.grouped_ssm`; what follows y is for the backward pass.

    A causal convolution's output is kept: to make it again, as that of one on the grid, took 2 % of
    a training step of the paper's small.
    """
    from .launch import scan_forward
    scan = _scan(xz, dt_proj, A_log, norm_weight, columns, reverses, height, width, gated, eps)
    x, z = _split(xz, gated)
    if conv_weight is not None:
        x = _conv(scan, x, conv_weight, conv_bias)
    y, kept = scan_forward(scan, x, z, x_proj, dt_proj, dt_bias, A_log, D, norm_weight, norm_bias,
                           keep)
    return y, kept, x if keep and _is_causal(conv_weight) else y.new_empty(0)


@grouped_ssm_op.register_fake
def _(xz, x_proj, dt_proj, dt_bias, A_log, D, norm_weight, norm_bias, conv_weight, conv_bias,
      columns, reverses, height, width, gated, eps, keep):
    scan = _scan(xz, dt_proj, A_log, norm_weight, columns, reverses, height, width, gated, eps)
    batch, length, _ = xz.shape
    y = xz.new_empty(batch, length, scan.groups * scan.stored)
    kept = (batch, scan.groups, scan.chunks(True), scan.kept_row(True))
    return (y, xz.new_empty(kept if keep else (0, ), dtype=torch.float32),
            torch.empty_like(y) if keep and _is_causal(conv_weight) else y.new_empty(0))


@torch.library.custom_op('groupmamba_mm::grouped_ssm_backward', mutates_args=())
def grouped_ssm_backward_op(
        grad_y: Tensor, kept: Tensor, u: Tensor, xz: Tensor, x_proj: Tensor, dt_proj: Tensor,
        dt_bias: Tensor, A_log: Tensor, D: Tensor, norm_weight: Optional[Tensor],
        norm_bias: Optional[Tensor], conv_weight: Optional[Tensor], conv_bias: Optional[Tensor],
        columns: int, reverses: int, height: int, width: int, gated: bool,
        eps: float) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of xz, of the SSM's parameters as one (G, row), of the convolution's two."""
    from .launch import scan_backward
    scan = _scan(xz, dt_proj, A_log, norm_weight, columns, reverses, height, width, gated, eps)
    raw, z = _split(xz, gated)
    grad_xz = torch.empty(xz.shape, dtype=xz.dtype, device=xz.device)
    grad_raw, grad_z = _split(grad_xz, gated)
    x = raw
    if conv_weight is not None:
        x = u if _is_causal(conv_weight) else _conv(scan, raw, conv_weight, conv_bias)
    grad_x = grad_raw if conv_weight is None else torch.empty_like(x)
    if grad_y.stride(-1) != 1:
        grad_y = grad_y.contiguous()
    rows = scan_backward(scan, grad_y, kept, x, z, x_proj, dt_proj, dt_bias, A_log, D,
                         norm_weight, norm_bias, grad_x, grad_z)
    if conv_weight is None:
        none = rows.new_empty(0)
        return grad_xz, rows, none, none.clone()
    grad_weight, grad_bias = _conv_backward(scan, raw, grad_x, conv_weight, conv_bias, grad_raw)
    return grad_xz, rows, grad_weight, grad_bias


@grouped_ssm_backward_op.register_fake
def _(grad_y, kept, u, xz, x_proj, dt_proj, dt_bias, A_log, D, norm_weight, norm_bias, conv_weight,
      conv_bias, columns, reverses, height, width, gated, eps):
    scan = _scan(xz, dt_proj, A_log, norm_weight, columns, reverses, height, width, gated, eps)
    fp32 = dict(dtype=torch.float32)
    rows = xz.new_empty(scan.groups, scan.row, **fp32)
    if conv_weight is None:
        return xz.new_empty(xz.shape), rows, xz.new_empty(0, **fp32), xz.new_empty(0, **fp32)
    return (xz.new_empty(xz.shape), rows, xz.new_empty(conv_weight.shape, **fp32),
            xz.new_empty(conv_bias.shape, **fp32))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.columns, ctx.reverses, ctx.height, ctx.width, ctx.gated, ctx.eps, save = inputs
    ctx.keeps = save
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, *_):
    *tensors, kept, u = ctx.saved_tensors
    if not ctx.keeps:
        raise RuntimeError('grouped_ssm was called with keep=False: it has no gradient')
    x_proj, dt_proj, _, A_log, D, norm_weight, norm_bias, conv_weight, _ = tensors[1:]
    if grad_y is None:
        return (None, ) * 17
    grad_xz, rows, grad_conv_weight, grad_conv_bias = grouped_ssm_backward_op(
        grad_y, kept, u, *tensors, ctx.columns, ctx.reverses, ctx.height, ctx.width, ctx.gated,
        ctx.eps)
    groups, channels, _ = dt_proj.shape
    parts = rows.split([x_proj[0].numel(), dt_proj[0].numel(), A_log[0].numel()]
                       + [channels] * 4, dim=1)
    grads = [
        part.reshape(shape).to(dtype) for part, shape, dtype in zip(
            parts, (x_proj.shape, dt_proj.shape, A_log.shape, (groups, channels), D.shape, D.shape,
                    D.shape),
            (x_proj.dtype, dt_proj.dtype, A_log.dtype, tensors[3].dtype, D.dtype, D.dtype,
             D.dtype))
    ]
    grad_x_proj, grad_dt_proj, grad_A_log, grad_bias, grad_D, grad_norm_w, grad_norm_b = grads
    has_norm, has_conv = norm_weight is not None, conv_weight is not None
    return (grad_xz, grad_x_proj, grad_dt_proj, grad_bias, grad_A_log, grad_D,
            grad_norm_w if has_norm else None, grad_norm_b if has_norm else None,
            grad_conv_weight.to(conv_weight.dtype) if has_conv else None,
            grad_conv_bias.to(conv_weight.dtype) if has_conv else None) + (None, ) * 7


grouped_ssm_op.register_autograd(_backward, setup_context=_setup_context)


def _is_causal(conv_weight: Optional[Tensor]) -> bool:
    """Whether it runs along the scan, (C, 1, K), and not on the grid, (C, 1, 3, 3)."""
    return conv_weight is not None and conv_weight.dim() < 4


def _conv(scan, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of the depthwise convolution: on the grid (C, 1, 3, 3), or along the scan (C, 1, K)."""
    from ..depthwise_conv import kernels as conv
    if not _is_causal(weight):
        return conv.grid_conv_forward(x, weight, bias, (scan.height, scan.width), 'silu',
                                      groups=scan.groups)
    return conv.causal_conv_forward(x, weight, bias, (scan.height, scan.width), scan.directions)


def _conv_backward(scan, x: Tensor, grad_y: Tensor, weight: Tensor, bias: Tensor,
                   grad_x: Tensor) -> Tuple[Tensor, Tensor]:
    """Write the gradient of ``x``; return those of the weight, in its shape, and the bias."""
    from ..depthwise_conv import kernels as conv
    grid = (scan.height, scan.width)
    if not _is_causal(weight):
        _, grad_weight, grad_bias, _ = conv.grid_conv_backward(
            x, grad_y, weight, bias, grid, 'silu', groups=scan.groups, dx=grad_x)
    else:
        _, grad_weight, grad_bias = conv.causal_conv_backward(
            x, grad_y, weight, bias, grid, scan.directions, dx=grad_x)
    return grad_weight.view(weight.shape), grad_bias
