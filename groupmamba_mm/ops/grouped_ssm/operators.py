"""The fused scan as operators of ``torch.library``: what autograd, compile and export see."""

import torch
from torch import Tensor

# The kernels are imported by the first call: the package has to import without Triton.


def _scan(xz: Tensor, dt_proj: Tensor, A_log: Tensor, norm_weight: Tensor | None, directions: int,
          height: int, width: int, gated: bool, eps: float):
    from .launch import Scan
    groups, channels, dt_rank = dt_proj.shape
    return Scan(height, width, groups, channels, xz.shape[-1] // (groups * (2 if gated else 1)),
                dt_rank, A_log.shape[-1], directions, eps, norm_weight is not None)


def _taps(conv_weight: Tensor | None) -> tuple[Tensor | None, bool]:
    """The convolution's weight as the kernels read it, and whether it runs along the scan,
    (C, 1, K), and not on the grid, (C, 1, 3, 3).
    """
    if conv_weight is None:
        return None, False
    from ..depthwise_conv.kernels import by_tap
    return by_tap(conv_weight), conv_weight.dim() < 4


def _run(xz: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
                   D: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
                   conv_weight: Tensor | None, conv_bias: Tensor | None, directions: int,
                   height: int, width: int, gated: bool, eps: float,
                   keep: bool) -> list[Tensor]:
    """See :func:`groupmamba_mm.ops.grouped_ssm`; what follows y is for the backward pass."""
    from .launch import ssm_forward
    scan = _scan(xz, dt_proj, A_log, norm_weight, directions, height, width, gated, eps)
    taps, causal = _taps(conv_weight)
    outputs = ssm_forward(scan, xz, gated, (x_proj, dt_proj, dt_bias, A_log, D, norm_weight,
                                            norm_bias), taps, conv_bias, causal, keep)
    return [tensor for tensor in outputs if tensor is not None]


# without data, launches do nothing: the shapes are those of the operator itself
grouped_ssm_op = torch.library.custom_op('groupmamba_mm::grouped_ssm', _run, mutates_args=())
grouped_ssm_op.register_fake(_run)


def _run_backward(
        grad_y: Tensor, kept: Tensor, u: Tensor | None, xz: Tensor, x_proj: Tensor,
        dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, norm_weight: Tensor | None,
        norm_bias: Tensor | None, conv_weight: Tensor | None, conv_bias: Tensor | None,
        directions: int, height: int, width: int, gated: bool,
        eps: float) -> list[Tensor]:
    """Gradients of xz, of the SSM's parameters as one (G, row), of the convolution's two."""
    from .launch import ssm_backward
    scan = _scan(xz, dt_proj, A_log, norm_weight, directions, height, width, gated, eps)
    taps, causal = _taps(conv_weight)
    grads = ssm_backward(scan, grad_y, kept, u, xz, gated, (
        x_proj, dt_proj, dt_bias, A_log, D, norm_weight, norm_bias), taps, conv_bias, causal)
    return [tensor for tensor in grads if tensor is not None]


grouped_ssm_backward_op = torch.library.custom_op('groupmamba_mm::grouped_ssm_backward',
                                                  _run_backward, mutates_args=())
grouped_ssm_backward_op.register_fake(_run_backward)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.directions, ctx.height, ctx.width, ctx.gated, ctx.eps, save = inputs
    ctx.keeps = save
    kept = [*output[1:], None, None][:2]
    ctx.save_for_backward(*tensors, *kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    *tensors, kept, u = ctx.saved_tensors
    if not ctx.keeps:
        raise RuntimeError('grouped_ssm was called with keep=False: it has no gradient')
    x_proj, dt_proj, _, A_log, D, norm_weight, norm_bias, conv_weight, _ = tensors[1:]
    if grads[0] is None:
        return (None, ) * 16
    grad_xz, rows, *of_conv = grouped_ssm_backward_op(
        grads[0], kept, u, *tensors, ctx.directions, ctx.height, ctx.width, ctx.gated,
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
    has_norm = norm_weight is not None
    grad_conv_weight = grad_conv_bias = None
    if of_conv:
        grad_conv_weight = of_conv[0].view(conv_weight.shape).to(conv_weight.dtype)
        grad_conv_bias = of_conv[1].to(conv_weight.dtype)
    return (grad_xz, grad_x_proj, grad_dt_proj, grad_bias, grad_A_log, grad_D,
            grad_norm_w if has_norm else None, grad_norm_b if has_norm else None,
            grad_conv_weight, grad_conv_bias) + (None, ) * 6


grouped_ssm_op.register_autograd(_backward, setup_context=_setup_context)
