"""The blocks of both families from fused kernels: the same parameters and results, less traffic.

Each function here does what the ``forward`` of the module it takes says, and is called by it where
the backend is 'triton'. What differs is the order of reading and writing memory: norms write the
precision of the product behind them, all groups share one product, the tensors between a
convolution and a projection are recomputed in the backward pass instead of kept.

Rows are padded with zeros to multiples of 8 channels inside (``Cp``), because products of unaligned
rows are slow; so are the channels of each group in the scan (``dp``).
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupmamba_mm.ops.depthwise_conv import conv_gelu_linear, gelu_linear
from groupmamba_mm.ops.grouped_ssm import grouped_ssm
from groupmamba_mm.ops.norm import (add_layer_norm, channel_affinity, layer_norm, round_up,
                                    scaled_layer_norm)
from .channel_affinity import ChannelAffinity

#: What ``mean_of`` of the norms stands for.
NO_MEAN, MEAN_OF_INPUT, MEAN_OF_NORMED = range(3)


def official_block(block: nn.Module, x: Tensor, grid: Tuple[int, int]) -> Tensor:
    """:meth:`OfficialBlock.forward`: (B, L, C) to (B, L, C)."""
    mixer, ss2d = block.mixer, block.mixer.ss2d
    dtype, channels = _compute_dtype(x), x.shape[-1]
    norm, groups = mixer.norm, ss2d.ssm.num_groups
    u, mean = layer_norm(x, norm.weight, norm.bias, norm.eps, 1, dtype,
                         MEAN_OF_NORMED if isinstance(mixer.affinity, ChannelAffinity) else NO_MEAN)
    scale = _affinity(mixer.affinity, mean, mixer.skip_scale, x)
    xz = F.linear(u, _packed_in_proj(ss2d.in_proj, 2, u.shape[-1], dtype))
    y = grouped_ssm(
        xz, *ss2d.ssm.parameters_of_scan(), grid=grid, directions=ss2d.plan[0],
        norm_weight=ss2d.out_norm.weight, norm_bias=ss2d.out_norm.bias, eps=ss2d.out_norm.eps,
        conv_weight=ss2d.conv2d.weight, conv_bias=ss2d.conv2d.bias, backend='triton')
    y = F.linear(y, _packed_out_proj(ss2d.out_proj, y.shape[-1] // groups, dtype))
    y = scaled_layer_norm(y, None, u, scale, norm.weight, norm.bias, norm.eps, dtype)
    drop_scale = _drop_path_scale(block.drop_path, x)
    x, v, _ = add_layer_norm(
        x, F.linear(y, *_padded_linear(mixer.proj, y.shape[-1], dtype)), drop_scale,
        block.norm2.weight, block.norm2.bias, block.norm2.eps, 1, dtype, NO_MEAN)
    ffn = block.ffn
    weight, h_bias = _padded_linear(ffn.fc1, v.shape[-1], dtype)
    h = F.linear(v, weight, h_bias.detach())  # its gradient comes from the operator below
    y = conv_gelu_linear(h, h_bias, _padded_rows(ffn.dwconv.weight, h.shape[-1]),
                         _padded_rows(ffn.dwconv.bias, h.shape[-1]),
                         *_padded_linear(ffn.fc2, h.shape[-1], dtype), *grid)
    return _add(x, y[..., :channels], drop_scale)


def paper_layer(layer: nn.Module, x: Tensor, grid: Tuple[int, int]) -> Tensor:
    """:meth:`ModulatedGroupMambaLayer.forward`: (B, L, C) to (B, L, C)."""
    vsss, mamba = layer.vsss, layer.vsss.mamba
    dtype, channels, groups = _compute_dtype(x), x.shape[-1], vsss.num_groups
    v, mean = layer_norm(x, vsss.norm1.weight, vsss.norm1.bias, vsss.norm1.eps, groups, dtype,
                         MEAN_OF_INPUT if isinstance(layer.affinity, ChannelAffinity) else NO_MEAN)
    xz = F.linear(v, _packed_in_proj(mamba.in_proj, 2, v.shape[-1], dtype))
    y = grouped_ssm(
        xz, *mamba.ssm.parameters_of_scan(), grid=grid, directions=mamba.plan[0],
        conv_weight=mamba.conv1d.weight, conv_bias=mamba.conv1d.bias, backend='triton')
    y = F.linear(y, _packed_out_proj(mamba.out_proj, y.shape[-1] // groups, dtype))
    stream, v, _ = add_layer_norm(x, y, None, vsss.norm2.weight, vsss.norm2.bias, vsss.norm2.eps,
                                  groups, dtype, NO_MEAN)
    y = _mlp(v, _packed_linear(vsss.ffn.fc1, v.shape[-1], dtype),
             _packed_linear(vsss.ffn.fc2, round_up(vsss.ffn.fc1.bias.numel()), dtype))
    scale = _affinity(layer.affinity, mean, None, x)
    v = scaled_layer_norm(y, stream, None, scale, layer.norm.weight, layer.norm.bias,
                          layer.norm.eps, dtype)
    hidden = round_up(layer.ffn.fc1.out_features)
    y = _mlp(v, _padded_linear(layer.ffn.fc1, v.shape[-1], dtype),
             _padded_linear(layer.ffn.fc2, hidden, dtype))
    return _add(x, y[..., :channels], _drop_path_scale(layer.drop_path, x))


def _mlp(x: Tensor, first: Tuple[Tensor, Tensor], second: Tuple[Tensor, Tensor]) -> Tensor:
    """Two linear layers, given as (weight, bias), with a GELU between them (Eq. 5)."""
    weight, bias = first
    # the gradient of the first bias comes from the operator behind it
    return gelu_linear(F.linear(x, weight, bias.detach()), bias, *second)


def norm_to_conv(norm: nn.LayerNorm, conv: nn.Conv2d, x: Tensor,
                 grid: Tuple[int, int]) -> Tensor:
    """A LayerNorm of tokens, then a convolution: (B, L, C) to (B, C', H', W') in its precision."""
    dtype = _compute_dtype(x)
    x, _ = layer_norm(x, norm.weight, norm.bias, norm.eps, 1, dtype, NO_MEAN)
    padding = x.shape[-1] - conv.in_channels
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, padding)) if padding else conv.weight
    x = x.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, L, Cp) -> (B, Cp, H, W), no copy
    return F.conv2d(x, weight.to(dtype), conv.bias.to(dtype), conv.stride, conv.padding)


def tokens_norm(norm: nn.LayerNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    """LayerNorm of (B, L, C) tokens of any precision, written in ``dtype``."""
    y, _ = layer_norm(x, norm.weight, norm.bias, norm.eps, 1, dtype, NO_MEAN)
    return y[..., :norm.weight.shape[0]]


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The precision of products: autocast's, or that of the input."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _affinity(affinity: nn.Module, mean: Tensor, skip_scale: Optional[Tensor],
              x: Tensor) -> Tensor:
    """What the tokens are multiplied by, (B, C) in fp32."""
    if not isinstance(affinity, ChannelAffinity):
        ones = torch.ones((), dtype=torch.float32, device=x.device)
        return (ones if skip_scale is None else skip_scale).expand(x.shape[0], x.shape[-1])
    return channel_affinity(mean, affinity.fc1.weight, affinity.fc1.bias, affinity.fc2.weight,
                            affinity.fc2.bias, skip_scale)


def _drop_path_scale(drop_path: nn.Module, x: Tensor) -> Optional[Tensor]:
    """Stochastic depth's factor for each sample, (B,): 0 or 1 / (1 - p); None without it."""
    if not drop_path.training or drop_path.p == 0:
        return None
    keep = 1 - drop_path.p
    return torch.empty(x.shape[0], device=x.device).bernoulli_(keep).div_(keep)


def _add(x: Tensor, branch: Tensor, drop_scale: Optional[Tensor]) -> Tensor:
    """The residual connection, in the precision of the stream ``x``."""
    if drop_scale is None:
        return x + branch
    return torch.addcmul(x, branch.to(x.dtype), drop_scale.view(-1, 1, 1).to(x.dtype))


def _padded_rows(weight: Tensor, rows: int) -> Tensor:
    missing = rows - weight.shape[0]
    return F.pad(weight, (0, 0) * (weight.dim() - 1) + (0, missing)) if missing else weight


def _padded_linear(linear: nn.Linear, in_channels: int,
                   dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
    """Weight and bias for padded rows, (Op, in_channels) and (Op,), zero where padded."""
    weight, bias = linear.weight.to(dtype), linear.bias.to(dtype)
    out, missing = round_up(weight.shape[0]), in_channels - weight.shape[1]
    if missing or out != weight.shape[0]:
        weight = F.pad(weight, (0, missing, 0, out - weight.shape[0]))
        bias = F.pad(bias, (0, out - bias.shape[0]))
    return weight, bias


def _block_diagonal(weight: Tensor) -> Tensor:
    """(..., G, O, I) to (..., G, O, G, I), zero off the groups' own blocks.

    One dense product for all groups: four times the arithmetic of a small share of the network,
    for rows that are read and written once, and aligned.
    """
    return torch.diag_embed(weight.movedim(-3, -1), dim1=-4, dim2=-2)


def _packed_in_proj(linear: nn.Module, parts: int, in_channels: int, dtype: torch.dtype) -> Tensor:
    """Weight of a grouped projection to ``parts`` outputs, (parts * G * dp, in_channels)."""
    weight = linear.weight.to(dtype)
    groups, out, width = weight.shape
    weight = _block_diagonal(weight.view(groups, parts, out // parts, width).transpose(0, 1))
    weight = weight.flatten(-2)  # (parts, G, d, G * I)
    out = weight.shape[2]
    weight = F.pad(weight, (0, in_channels - weight.shape[-1], 0, round_up(out) - out))
    return weight.flatten(0, 2)


def _packed_out_proj(linear: nn.Module, stored: int, dtype: torch.dtype) -> Tensor:
    """Weight of a grouped projection from groups padded to ``stored`` channels, (Cp, G * dp)."""
    weight = _block_diagonal(linear.weight.to(dtype))
    weight = F.pad(weight, (0, stored - weight.shape[-1])).flatten(2).flatten(0, 1)
    return _padded_rows(weight, round_up(weight.shape[0]))


def _packed_linear(linear: nn.Module, in_channels: int, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
    """Weight and bias of a grouped linear layer, groups not padded, (Op, in_channels), (Op,)."""
    weight = _block_diagonal(linear.weight.to(dtype)).flatten(2).flatten(0, 1)
    rows = round_up(weight.shape[0])
    weight = F.pad(weight, (0, in_channels - weight.shape[1], 0, rows - weight.shape[0]))
    return weight, _padded_rows(linear.bias.to(dtype).flatten(), rows)
