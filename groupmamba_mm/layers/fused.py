"""The blocks of both families from fused kernels: the same parameters and results, less traffic.

Each function here does what the ``forward`` of the module it takes says, and is called by it where
the backend is 'triton'. What differs is the order of reading and writing memory: norms write the
precision of the product behind them, narrow groups share one product, the tensors between a
convolution and a projection are recomputed in the backward pass instead of kept.

Rows are padded with zeros to multiples of 8 channels inside (``Cp``), because products of unaligned
rows are slow; so are the channels of each group in the scan (``dp``).
"""
from typing import NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupmamba_mm.ops.ffn import (WIDEST_GROUP, WIDEST_LINEAR_GROUP, conv_ffn, group_linear,
                                   plain_ffn, residual_group_ffn)
from groupmamba_mm.ops.grouped_ssm import grouped_ssm
from groupmamba_mm.ops.integers import round_up
from groupmamba_mm.ops.norm import (add_layer_norm, channel_affinity, layer_norm,
                                    scaled_layer_norm, scaled_norm_linear)
from .channel_affinity import ChannelAffinity

#: Hidden channels of an FFN are padded to multiples of this: torch.compile pads wide rows to it by
#: itself, and would copy them back for the operators.
HIDDEN_MULTIPLE = 64

#: From so many times the channels on, the hidden tensor of an FFN is made again in the backward
#: pass: in the first two stages of both families (eight times) those are a quarter of what a
#: training step would keep.
WIDE_EXPANSION = 6

#: Up to so many channels that costs about as much as to keep it, if there is no convolution, and
#: saves the memory.
NARROW = 256

#: From so many channels a group on, its FFN runs by itself, not in products of all groups with
#: zeros between them: on an H100 faster with 48 channels, slower with 24 (docs/speed.md).
NARROWEST_GROUP = 32

#: The same for the input projection in half precision: slower with 48 channels, as fast with 92,
#: then faster; between them nobody has measured. The output projection, which writes few channels,
#: is faster in one product.
NARROWEST_LINEAR_GROUP = 64

#: What ``mean_of`` of the norms stands for.
NO_MEAN, MEAN_OF_INPUT, MEAN_OF_NORMED = range(3)


class Residual(NamedTuple):
    """A block's output before its last residual connection, which the next norm can make itself.

    Attributes:
        tokens: (B, L, C), the stream.
        branch: (B, L, >=C), what is to be added to its first C channels.
        drop_scale: (B,), stochastic depth's factor of the branch, or None.
    """
    tokens: Tensor
    branch: Tensor
    drop_scale: Optional[Tensor]

    def settle(self) -> Tensor:
        """The sum, in the precision of the stream."""
        branch = self.branch[..., :self.tokens.shape[-1]]
        if self.drop_scale is None:
            return self.tokens + branch
        scale = self.drop_scale.view(-1, 1, 1).to(self.tokens.dtype)
        return torch.addcmul(self.tokens, branch.to(self.tokens.dtype), scale)


def official_block(block: nn.Module, x: Union[Tensor, Residual],
                   grid: Tuple[int, int]) -> Residual:
    """:meth:`OfficialBlock.forward`: (B, L, C) to (B, L, C)."""
    mixer, ss2d = block.mixer, block.mixer.ss2d
    norm, groups = mixer.norm, ss2d.ssm.num_groups
    has_affinity = isinstance(mixer.affinity, ChannelAffinity)
    x, u, mean, dtype, _ = _first_norm(x, norm, 1, MEAN_OF_NORMED if has_affinity else NO_MEAN)
    scale = _affinity(mixer.affinity, mean, mixer.skip_scale, x)
    xz = F.linear(u, _packed_in_proj(ss2d.in_proj, 2, u.shape[-1], dtype))
    y = grouped_ssm(
        xz, *ss2d.ssm.parameters_of_scan(), grid=grid, directions=ss2d.plan[0],
        norm_weight=ss2d.out_norm.weight, norm_bias=ss2d.out_norm.bias, eps=ss2d.out_norm.eps,
        conv_weight=_by_tap(ss2d.conv2d.weight), conv_bias=ss2d.conv2d.bias, backend='triton')
    y = F.linear(y, _packed_out_proj(ss2d.out_proj, y.shape[-1] // groups, dtype))
    y = scaled_norm_linear(y, None, u, scale, norm.weight, norm.bias, norm.eps,
                           *_padded_linear(mixer.proj, u.shape[-1], dtype))
    x, v, *_ = add_layer_norm(x, y, _drop_path_scale(block.drop_path, x), block.norm2.weight,
                              block.norm2.bias, block.norm2.eps, 1, dtype, NO_MEAN)
    ffn = block.ffn
    weight, bias = _padded_linear(ffn.fc1, v.shape[-1], dtype, HIDDEN_MULTIPLE)
    hidden = weight.shape[0]
    y, _ = conv_ffn(v, weight, bias, _by_tap(_padded_rows(ffn.dwconv.weight, hidden)),
                    _padded_rows(ffn.dwconv.bias, hidden),
                    *_padded_linear(ffn.fc2, hidden, dtype), *grid,
                    keep_hidden=hidden < WIDE_EXPANSION * v.shape[-1])
    # mixer and FFN are dropped independently of each other
    return Residual(x, y, _drop_path_scale(block.drop_path, x))


def paper_layer(layer: nn.Module, x: Union[Tensor, Residual], grid: Tuple[int, int]) -> Residual:
    """:meth:`ModulatedGroupMambaLayer.forward`: (B, L, C) to (B, L, C)."""
    vsss, mamba = layer.vsss, layer.vsss.mamba
    groups = vsss.num_groups
    has_affinity = isinstance(layer.affinity, ChannelAffinity)
    # Training hands the stream on in the products' precision too: autograd would add the gradients
    # of its two uses in a pass of their own. Inference has none, and would only write more.
    x, v, mean, dtype, rounded = _first_norm(x, vsss.norm1, groups,
                                             MEAN_OF_INPUT if has_affinity else NO_MEAN,
                                             wants_rounded=torch.is_grad_enabled())
    xz = _in_proj(mamba.in_proj, v, dtype)
    y = grouped_ssm(
        xz, *mamba.ssm.parameters_of_scan(), grid=grid, directions=mamba.plan[0],
        conv_weight=_by_tap(mamba.conv1d.weight), conv_bias=mamba.conv1d.bias, backend='triton')
    y = F.linear(y, _packed_out_proj(mamba.out_proj, y.shape[-1] // groups, dtype))
    y, stream = _residual_ffn(rounded, y, vsss, dtype)
    scale = _affinity(layer.affinity, mean, None, x)
    v = scaled_layer_norm(y, stream, None, scale, layer.norm.weight, layer.norm.bias,
                          layer.norm.eps, dtype)
    fc1, fc2 = layer.ffn.fc1, layer.ffn.fc2
    weight, bias = _padded_linear(fc1, v.shape[-1], dtype, HIDDEN_MULTIPLE, casts_bias=False)
    y = _plain_ffn(v, weight, bias,
                   *_padded_linear(fc2, weight.shape[0], dtype, casts_bias=False))
    return Residual(x, y, _drop_path_scale(layer.drop_path, x))


def _in_proj(linear: nn.Module, v: Tensor, dtype: torch.dtype) -> Tensor:
    """x and z of all groups, (B, L, 2 * G * dp)."""
    _, outputs, width = linear.weight.shape
    if dtype != torch.float32 and NARROWEST_LINEAR_GROUP <= width <= WIDEST_LINEAR_GROUP:
        return group_linear(v, _aligned(linear.weight, dtype), width, 2, round_up(outputs // 2))
    return F.linear(v, _packed_in_proj(linear, 2, v.shape[-1], dtype))


def _residual_ffn(x: Tensor, branch: Tensor, vsss: nn.Module,
                  dtype: torch.dtype) -> Tuple[Tensor, Optional[Tensor]]:
    """s + FFN(LN(s)) of each group with s = x + branch: the sum, or its two parts.

    They are a branch of the layer's residual stream, so they have the precision of products.
    """
    norm, fc1, fc2 = vsss.norm2, vsss.ffn.fc1, vsss.ffn.fc2
    if NARROWEST_GROUP <= fc1.weight.shape[-1] <= WIDEST_GROUP:
        y, _, _ = residual_group_ffn(
            x, branch, norm.weight, norm.bias, norm.eps, _aligned(fc1.weight, dtype),
            fc1.bias, fc2.weight.to(dtype), fc2.bias, keep=torch.is_grad_enabled())
        return y, None
    stream, v, *_ = add_layer_norm(x, branch, None, norm.weight, norm.bias, norm.eps,
                                   vsss.num_groups, dtype, NO_MEAN, stream_dtype=dtype)
    weight, bias = _packed_linear(fc1, v.shape[-1], dtype, HIDDEN_MULTIPLE)
    return _plain_ffn(v, weight, bias, *_packed_linear(fc2, weight.shape[0], dtype)), stream


def _plain_ffn(x: Tensor, *parameters: Tensor) -> Tensor:
    """:func:`plain_ffn`, which makes the hidden tensor again where that is cheap or saves much."""
    channels, hidden = x.shape[-1], parameters[0].shape[0]
    is_kept = torch.is_grad_enabled() and NARROW < channels and hidden < WIDE_EXPANSION * channels
    return plain_ffn(x, *parameters, keep_hidden=is_kept)[0]


def _first_norm(x: Union[Tensor, Residual], norm: nn.Module, groups: int, mean_of: int,
                wants_rounded: bool = False) -> Tuple[Tensor, Tensor, Tensor, torch.dtype, Tensor]:
    """The stream, its norm, the mean asked for, the precision of the products behind, and the
    stream for a second use, in that precision if ``wants_rounded``."""
    if isinstance(x, Residual):
        dtype = _compute_dtype(x.tokens)
        wants_rounded = wants_rounded and dtype != x.tokens.dtype
        stream, normed, mean, rounded = add_layer_norm(
            *x, norm.weight, norm.bias, norm.eps, groups, dtype, mean_of,
            wants_rounded=wants_rounded)
        return stream, normed, mean, dtype, rounded if wants_rounded else stream
    dtype = _compute_dtype(x)
    return x, *layer_norm(x, norm.weight, norm.bias, norm.eps, groups, dtype, mean_of), dtype, x


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


def _by_tap(weight: Tensor) -> Tensor:
    """(C, ...) as it is, in memory tap by tap, as the kernels read it."""
    return weight.movedim(0, -1).contiguous().movedim(-1, 0)


def _pad(tensor: Tensor, *amounts: int) -> Tensor:
    """Zeros behind the last dimension, the one before and so on; F.pad copies for none, too."""
    if not any(amounts):
        return tensor
    return F.pad(tensor, [side for amount in amounts for side in (0, amount)])


def _aligned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """In that precision, each row with zeros behind it to a multiple of 8."""
    return _pad(weight.to(dtype), round_up(weight.shape[-1]) - weight.shape[-1])


def _padded_rows(weight: Tensor, rows: int) -> Tensor:
    return _pad(weight, *[0] * (weight.dim() - 1), rows - weight.shape[0])


def _padded_linear(linear: nn.Linear, in_channels: int, dtype: torch.dtype,
                   multiple: int = 8, casts_bias: bool = True) -> Tuple[Tensor, Tensor]:
    """Weight and bias for padded rows, (Op, in_channels) and (Op,), zero where padded.

    Operators that take a bias in any precision spare the cast, which is a kernel, if a small one.
    """
    weight, bias = linear.weight.to(dtype), linear.bias
    if casts_bias:
        bias = bias.to(dtype)
    out, missing = round_up(weight.shape[0], multiple), in_channels - weight.shape[1]
    return _pad(weight, missing, out - weight.shape[0]), _pad(bias, out - bias.shape[0])


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
    return _pad(weight, in_channels - weight.shape[-1], round_up(out) - out).flatten(0, 2)


def _packed_out_proj(linear: nn.Module, stored: int, dtype: torch.dtype) -> Tensor:
    """Weight of a grouped projection from groups padded to ``stored`` channels, (Cp, G * dp)."""
    weight = _block_diagonal(linear.weight.to(dtype))
    weight = _pad(weight, stored - weight.shape[-1]).flatten(2).flatten(0, 1)
    return _padded_rows(weight, round_up(weight.shape[0]))


def _packed_linear(linear: nn.Module, in_channels: int, dtype: torch.dtype,
                   multiple: int = 8) -> Tuple[Tensor, Tensor]:
    """Weight and bias of a grouped linear layer, groups not padded, (Op, in_channels), (Op,)."""
    weight = _block_diagonal(linear.weight.to(dtype)).flatten(2).flatten(0, 1)
    rows = round_up(weight.shape[0], multiple)
    weight = _pad(weight, in_channels - weight.shape[1], rows - weight.shape[0])
    return weight, _padded_rows(linear.bias.flatten(), rows)
