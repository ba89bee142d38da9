"""The fused scan step by step in plain PyTorch: what the kernels have to agree with."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..selective_scan import group_from_scan_order, group_to_scan_order, selective_scan


def grouped_ssm_torch(xz: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
                      D: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
                      conv_weight: Tensor | None, conv_bias: Tensor | None,
                      grid: tuple[int, int], directions: Sequence[str], gated: bool, eps: float,
                      scan_backend: str = 'torch') -> Tensor:
    """See :func:`groupmamba_mm.ops.grouped_ssm`; any dtype, also fp64."""
    groups, channels, dt_rank = dt_proj.shape
    d_state = A_log.shape[-1]
    x, *z = xz.unflatten(-1, (2 if gated else 1, groups, -1)).unbind(2)
    padding = x.shape[-1] - channels
    x = x[..., :channels]
    if conv_weight is not None:
        x = F.silu(_conv(x, conv_weight, conv_bias, grid, directions))
    low, B, C = torch.einsum('blgi,goi->blgo', x, x_proj).split([dt_rank, d_state, d_state], -1)
    dt = F.softplus(torch.einsum('blgr,gcr->blgc', low, dt_proj) + dt_bias)
    y = selective_scan(x.flatten(2), dt.flatten(2), -A_log.exp().flatten(0, 1), B, C, D, grid=grid,
                       directions=directions, backend=scan_backend).unflatten(-1, x.shape[2:])
    if norm_weight is not None:
        y = F.layer_norm(y, (channels, ), eps=eps)
        y = y * norm_weight.view(groups, channels) + norm_bias.view(groups, channels)
    if gated:
        y = y * F.silu(z[0][..., :channels])
    return F.pad(y, (0, padding)).flatten(2)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int],
          directions: Sequence[str]) -> Tensor:
    """Depthwise, (B, L, G, d) to the same: on the grid, or causal along each group's direction."""
    if weight.dim() == 4:
        y = F.conv2d(x.flatten(2).transpose(1, 2).unflatten(-1, grid), weight, bias, padding=1,
                     groups=len(weight))
        return y.flatten(2).transpose(1, 2).view(x.shape)
    tokens = group_to_scan_order(x, grid, directions).flatten(2).transpose(1, 2)  # (B, C, L)
    y = F.conv1d(F.pad(tokens, (weight.shape[-1] - 1, 0)), weight, bias, groups=len(weight))
    return group_from_scan_order(y.transpose(1, 2).view(x.shape), grid, directions)
