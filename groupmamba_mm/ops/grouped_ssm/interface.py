"""The public fused scan: validation and the choice of the backend."""
from collections.abc import Sequence

import torch
from torch import Tensor

from ..selective_scan.directions import check_directions, direction_code
from .operators import grouped_ssm_op
from .reference import grouped_ssm_torch


def grouped_ssm(xz: Tensor,
                x_proj_weight: Tensor,
                dt_proj_weight: Tensor,
                dt_proj_bias: Tensor,
                A_log: Tensor,
                D: Tensor,
                *,
                grid: tuple[int, int],
                directions: Sequence[str],
                gated: bool = True,
                norm_weight: Tensor | None = None,
                norm_bias: Tensor | None = None,
                eps: float = 1e-5,
                conv_weight: Tensor | None = None,
                conv_bias: Tensor | None = None,
                backend: str = 'torch') -> Tensor:
    r"""All of a group's Mamba between its two projections (Eq. 1-2, 4 and 6), in one operator.

    For every group g of d channels, tokens taken in the order of ``directions[g]``:

    .. math::
        u = \mathrm{SiLU}(\mathrm{Conv}(x)), \quad (\delta, B, C) = W_x u, \quad
        dt = \mathrm{softplus}(W_{dt} \delta + b), \quad
        y = \mathrm{LN}(\mathrm{S6}(u, dt, e^{A_{log}}, B, C, D)) \cdot \mathrm{SiLU}(z).

    Convolution (without it u = x), norm and gate are optional. A group's channels may be padded in
    memory to dp >= d, so that its rows are aligned: the padding of ``xz`` has to be zero, that of
    the output is.

    Args:
        xz: (B, L, 2 * G * dp), x of all groups, then z; (B, L, G * dp) without a gate. L = H * W
            tokens in row-major order, fp32, fp16 or bf16 ('torch': fp64 as well).
        x_proj_weight: (G, dt_rank + 2N, d).
        dt_proj_weight: (G, d, dt_rank).
        dt_proj_bias: (G, d).
        A_log: (G, d, N) with N = ``d_state``.
        D: (G * d,).
        grid: (H, W).
        directions: For each group one of DIRECTIONS or MIRRORED_DIRECTIONS; 'torch' takes any
            that is registered.
        gated: Whether ``xz`` has a z.
        norm_weight: (G * d,) of a LayerNorm over each group's channels, or None.
        norm_bias: (G * d,), or None without a norm.
        eps: Added to its variance.
        conv_weight: Depthwise, (G * d, 1, 3, 3) on the grid or (G * d, 1, K) causal along each
            group's direction; or None.
        conv_bias: (G * d,), or None without a convolution.
        backend: ``'triton'`` (fused kernels; gradients repeat bit by bit) or ``'torch'``.

    Returns:
        y, (B, L, G * dp), row-major, in the dtype of ``xz``.

    Raises:
        ValueError: Shapes, directions or the backend do not fit; the message names which.
    """
    directions = check_directions(directions)
    groups, channels, dt_rank = dt_proj_weight.shape
    d_state = A_log.shape[-1]
    height, width = grid
    if xz.dim() != 3 or xz.shape[1] != height * width:
        raise ValueError(f'grouped_ssm: xz must be (B, L, ...) with L = {height * width} tokens of '
                         f'the grid {tuple(grid)}, got {tuple(xz.shape)}')
    lanes = groups * (2 if gated else 1)
    if xz.shape[2] % lanes or xz.shape[2] // lanes < channels:
        raise ValueError(f'grouped_ssm: xz has {xz.shape[2]} channels; {lanes} times at least '
                         f'{channels} are needed (groups, gated, d)')
    if len(directions) != groups:
        raise ValueError(f'grouped_ssm: {len(directions)} directions for {groups} groups')
    if (conv_weight is None) != (conv_bias is None) or (norm_weight is None) != (norm_bias is None):
        raise ValueError('grouped_ssm: weight and bias of the convolution and of the norm come in '
                         'pairs; one of a pair is None')
    for name, tensor, shape in (('x_proj_weight', x_proj_weight,
                                 (groups, dt_rank + 2 * d_state, channels)),
                                ('dt_proj_bias', dt_proj_bias, (groups, channels)),
                                ('A_log', A_log, (groups, channels, d_state)),
                                ('D', D, (groups * channels, ))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f'grouped_ssm: {name} must have shape {shape}, got '
                             f'{tuple(tensor.shape)}')
    for name, tensor in (('conv_weight', conv_weight), ('conv_bias', conv_bias)):
        if tensor is not None and tensor.shape[0] != groups * channels:
            raise ValueError(f'grouped_ssm: {name} must have {groups * channels} channels, got '
                             f'{tensor.shape[0]}')
    if backend == 'torch':
        return grouped_ssm_torch(xz, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D,
                                 norm_weight, norm_bias, conv_weight, conv_bias, grid, directions,
                                 gated, eps)
    if backend != 'triton':
        raise ValueError(f"grouped_ssm: unknown backend {backend!r}; choose 'triton' or 'torch'")
    params = (x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, norm_weight, norm_bias,
              conv_weight, conv_bias)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (xz, *params))
    return grouped_ssm_op(xz, *params, direction_code(directions), height, width, gated, eps,
                          needs_grad)[0]
