"""The paper's layer, :class:`groupmamba_mm.layers.ModulatedGroupMambaLayer`, in kernels."""
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ffn.groups import (
    fits_ffn,
    fits_projection,
    group_linear_backward,
    group_linear_forward,
    residual_ffn_backward,
    residual_ffn_forward,
)
from ..ffn.plain import plain_ffn_backward, plain_ffn_forward
from ..grouped_ssm.launch import Scan, scan_of, ssm_backward, ssm_forward
from ..integers import round_up
from ..linear import linear, linear_input_gradient, linear_weight_gradient
from ..norm.kernels import (
    add_norm_backward,
    add_norm_forward,
    affinity_backward,
    affinity_forward,
    scaled_norm_backward,
    scaled_norm_forward,
)
from ..sums import column_sums
from .packing import Packing, Rows, block_diagonal, dense, taps, vector

#: The layer's parameters in the order of all lists here. Gradients lie behind each other in one
#: buffer: those whose sizes may be odd come last, so that the others are aligned; one kernel makes
#: those of norm2 and of the bias behind it.
PARAMETERS = (
    'vsss.norm1.weight', 'vsss.norm1.bias', 'vsss.mamba.in_proj.weight',
    'vsss.mamba.conv1d.weight', 'vsss.mamba.conv1d.bias', 'vsss.mamba.ssm.x_proj_weight',
    'vsss.mamba.ssm.dt_proj_weight', 'vsss.mamba.ssm.dt_proj_bias', 'vsss.mamba.ssm.A_log',
    'vsss.mamba.ssm.D', 'vsss.mamba.out_proj.weight', 'vsss.norm2.weight', 'vsss.norm2.bias',
    'vsss.ffn.fc2.bias', 'vsss.ffn.fc1.weight', 'vsss.ffn.fc1.bias', 'vsss.ffn.fc2.weight',
    'norm.weight', 'norm.bias', 'ffn.fc1.weight', 'ffn.fc1.bias', 'ffn.fc2.weight', 'ffn.fc2.bias')
#: Behind them, if there is channel affinity.
AFFINITY_PARAMETERS = ('affinity.fc1.weight', 'affinity.fc2.weight', 'affinity.fc2.bias',
                       'affinity.fc1.bias')

#: Hidden channels of an FFN are padded to multiples of this, see the other family.
HIDDEN_MULTIPLE = 64

#: From so many times the channels on, to save memory, or up to so many channels, where it costs
#: about as much as to keep it, the hidden tensor of an FFN is recomputed in the backward pass.
WIDE_EXPANSION, NARROW = 6, 256

#: From so many channels a group on, its FFN runs by itself, not in products of all groups with
#: zeros between them: on an H100 faster with 48 channels, slower with 24 (docs/speed_record.md).
NARROWEST_GROUP = 32

#: The same for the input projection: slower with 48 channels, as fast with 92, then faster; between
#: them nobody has measured. The output projection, which writes few channels, is faster in one
#: product.
NARROWEST_LINEAR_GROUP = 64


class PaperSpec(NamedTuple):
    """What decides on the launches of a layer besides the sizes of images and batch.

    Attributes:
        channels, groups: C and G.
        inner: Channels of a group in the scan.
        taps: Of the causal convolution.
        group_hidden, hidden: Hidden channels of a group's FFN and of the outer one.
        dt_rank, d_state: R and N.
        directions: Of the groups, a :func:`direction_code`.
        affinity: Hidden units of the channel affinity, 0 without it.
        norm1_eps, norm2_eps, norm_eps: Of the three LayerNorms.
    """
    channels: int
    groups: int
    inner: int
    taps: int
    group_hidden: int
    hidden: int
    dt_rank: int
    d_state: int
    directions: int
    affinity: int
    norm1_eps: float
    norm2_eps: float
    norm_eps: float

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.channels // self.groups

    @property
    def stored(self) -> int:
        """Channels in memory where a product reads or writes them."""
        return round_up(self.channels)

    @property
    def stored_hidden(self) -> int:
        return round_up(self.hidden, HIDDEN_MULTIPLE)

    @property
    def stored_group_hidden(self) -> int:
        """Hidden channels of all groups' FFNs in memory, where one product makes them."""
        return round_up(self.groups * self.group_hidden, HIDDEN_MULTIPLE)

    def scan(self, grid: tuple[int, int]) -> Scan:
        return scan_of(*grid, self.groups, self.inner, round_up(self.inner), self.dt_rank,
                       self.d_state, self.directions, 1e-5, False)

    @functools.cache
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of all parameters, in their order."""
        C, G, W, I, N, R = (self.channels, self.groups, self.width, self.inner, self.d_state,
                            self.dt_rank)
        Hg, Hd = self.group_hidden, self.hidden
        shapes = [(C, ), (C, ), (G, 2 * I, W), (G * I, 1, self.taps), (G * I, ), (G, R + 2 * N, I),
                  (G, I, R), (G, I), (G, I, N), (G * I, ), (G, W, I), (C, ), (C, ), (G, W),
                  (G, Hg, W), (G, Hg), (G, W, Hg), (C, ), (C, ), (Hd, C), (Hd, ), (C, Hd), (C, )]
        if self.affinity:
            shapes += [(self.affinity, C), (C, self.affinity), (C, ), (self.affinity, )]
        return tuple(map(torch.Size, shapes))


class Kernels(NamedTuple):
    """Which of a layer's parts run group by group.

    Attributes:
        projection: The input projection.
        ffn: The groups' FFNs, with the residual addition and the norm before them.
    """
    projection: bool
    ffn: bool


def choose_kernels(spec: PaperSpec, dtype: torch.dtype, device: torch.device) -> Kernels:
    """What a GPU takes, and what is faster there than one product with zeros between groups."""
    return Kernels(
        spec.width >= NARROWEST_LINEAR_GROUP and fits_projection(dtype, spec.width, device),
        spec.width >= NARROWEST_GROUP and fits_ffn(dtype, spec.width, device))


@functools.cache
def packing_of(spec: PaperSpec, kernels: Kernels) -> Packing:
    """How the layer's weights are laid out for its kernels, in the order of ``forward``."""
    C, G, W, I, Hg = spec.channels, spec.groups, spec.width, spec.inner, spec.group_hidden
    stored, stored_inner, aligned = spec.stored, round_up(I), round_up(W)
    sizes = [I * (spec.dt_rank + 2 * spec.d_state), I * spec.dt_rank, I * spec.d_state, I, I]
    row = I * (spec.dt_rank * 2 + 3 * spec.d_state + 4)
    rows = [Rows(parameter, G, sum(sizes[:i]), 1, size, 0, row)
            for i, (parameter, size) in enumerate(zip((5, 6, 8, 7, 9), sizes))]
    rows_size = G * row
    if kernels.projection:
        in_proj = dense(2, G * 2 * I, W, G * 2 * I, aligned)
    else:
        in_proj = block_diagonal(2, G, 2, I, W, stored_inner, W, stored)
    if kernels.ffn:
        ffn = (dense(14, G * Hg, W, G * Hg, aligned)._replace(has_gradient=False),
               dense(16, G * W, Hg, G * W, Hg)._replace(has_gradient=False))
        first, row = round_up(G * row, 64), Hg * aligned + Hg + W * Hg
        rows += [Rows(14, G, first, Hg, W, aligned, row),
                 Rows(15, G, first + Hg * aligned, 1, Hg, 0, row),
                 Rows(16, G, first + Hg * aligned + Hg, 1, W * Hg, 0, row)]
        rows_size = first + G * row
    else:
        hidden = spec.stored_group_hidden
        ffn = (block_diagonal(14, G, 1, Hg, W, Hg, W, stored, HIDDEN_MULTIPLE),
               block_diagonal(16, G, 1, W, Hg, W, Hg, hidden), vector(15, G * Hg, hidden),
               vector(13, C, stored))
    return Packing(
        (in_proj, block_diagonal(10, G, 1, W, I, W, stored_inner, G * stored_inner),
         taps(3, spec.taps, G * I, G * I), dense(19, spec.hidden, C, spec.stored_hidden, stored),
         vector(20, spec.hidden, spec.stored_hidden, in_fp32=True),
         dense(21, C, spec.hidden, stored, spec.stored_hidden),
         vector(22, C, stored, in_fp32=True), *ffn),
        rows, rows_size, [shape.numel() for shape in spec.shapes()])


def _keeps_hidden(channels: int, hidden: int) -> bool:
    return NARROW < channels and hidden < WIDE_EXPANSION * channels


def forward(spec: PaperSpec, grid: tuple[int, int], dtype: torch.dtype, keep: bool, tokens: Tensor,
            branch: Tensor | None, branch_drop: Tensor | None, drop: Tensor | None,
            parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """x = tokens + branch, and what Eq. 3 adds to it.

    Args: as the other family's.

    Returns:
        x (B, L, C), or None if it is ``tokens``; the branch (B, L, Cp); and what :func:`backward`
        needs.
    """
    kernels = choose_kernels(spec, dtype, tokens.device)
    packing, p = packing_of(spec, kernels), parameters
    low, full = packing.pack(p, dtype)
    in_proj, out_proj, conv, fc1, fc1_bias, fc2, fc2_bias, *group_ffn = packing.views(low, full)
    # Training hands the stream on in the products' precision too, for its use inside the layer: its
    # gradient is then added on the way, not in a pass of its own.
    rounds = keep and branch is not None and dtype != tokens.dtype
    x, v, mean, rounded = add_norm_forward(
        tokens, branch, branch_drop, p[0], p[1], spec.norm1_eps, spec.groups, spec.stored, dtype,
        1 if spec.affinity else 0, wants_rounded=rounds)
    stream = tokens if x is None else x
    if kernels.projection:
        xz = group_linear_forward(v, in_proj.view(spec.groups, -1, in_proj.shape[1]), spec.width, 2,
                                  round_up(spec.inner))
    else:
        xz = linear(v, in_proj)
    y, kept, u = ssm_forward(spec.scan(grid), xz, True, (*p[5:8], p[8], p[9], None, None), conv,
                             p[4], True, keep)
    mixed = linear(y, out_proj)
    # what is inside a layer is part of a branch: it has the products' precision
    inside = stream if rounded is None else rounded
    group_hidden = summed = None
    if kernels.ffn:
        z, s, n = residual_ffn_forward(inside, mixed, p[11], p[12], spec.norm2_eps,
                                       *_of_groups(spec, group_ffn, p), keep)
    else:
        s, n, _, _ = add_norm_forward(inside, mixed, None, p[11], p[12], spec.norm2_eps,
                                      spec.groups, spec.stored, dtype, 0, dtype)
        z, group_hidden = plain_ffn_forward(
            n, group_ffn[0], group_ffn[2], group_ffn[1], group_ffn[3],
            keep and _keeps_hidden(spec.stored, spec.stored_group_hidden))
        summed = s
    if spec.affinity:
        scale = affinity_forward(mean, p[23], p[26], p[24], p[25], None)
    else:
        scale = torch.ones(tokens.shape[0], spec.channels, device=tokens.device)
    w = scaled_norm_forward(z, summed, None, scale, p[17], p[18], spec.norm_eps, spec.stored, dtype)
    out, hidden = plain_ffn_forward(w, fc1, fc1_bias, fc2, fc2_bias,
                                    keep and _keeps_hidden(spec.stored, spec.stored_hidden))
    if not keep:
        return [x, out]
    return [x, out, low, full, v, mean, xz, kept, y, u, mixed, z, s, n, group_hidden, scale, w,
            hidden]


def saves(spec: PaperSpec, has_branch: bool, dtype: torch.dtype,
          device: torch.device) -> list[bool]:
    """Which of the tensors of :func:`forward` there are."""
    by_groups = choose_kernels(spec, dtype, device).ffn
    return [has_branch, True, True, True, True, bool(spec.affinity), *[True] * 8,
            not by_groups and _keeps_hidden(spec.stored, spec.stored_group_hidden), True, True,
            _keeps_hidden(spec.stored, spec.stored_hidden)]


def _of_groups(spec: PaperSpec, packed: Sequence[Tensor],
               p: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and biases of the groups' FFNs, one behind the other for each group."""
    return (packed[0].view(spec.groups, spec.group_hidden, -1), p[15],
            packed[1].view(spec.groups, spec.width, spec.group_hidden), p[13])


def backward(spec: PaperSpec, grid: tuple[int, int], dtype: torch.dtype, dx: Tensor | None,
             dout: Tensor | None, tokens: Tensor, branch_width: int,
             branch_drop: Tensor | None, drop: Tensor | None, parameters: Sequence[Tensor],
             x: Tensor | None, saved: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of :func:`forward`.

    Args, Returns: as the other family's.
    """
    (low, full, v, mean, xz, kept, y, u, mixed, z, s, n, group_hidden, scale, w, hidden) = saved
    kernels = choose_kernels(spec, dtype, tokens.device)
    packing, p, C, G = packing_of(spec, kernels), parameters, spec.channels, spec.groups
    in_proj, out_proj, conv, fc1, fc1_bias, fc2, fc2_bias, *group_ffn = packing.views(low, full)
    grads = torch.empty(packing.total, dtype=p[0].dtype, device=v.device)
    g = grads.split_with_sizes(packing.numels)
    starts = packing.starts
    dlow = torch.empty(packing.sizes[0], dtype=dtype, device=v.device)
    din_proj, dout_proj, _, dfc1, _, dfc2, _, *dgroup_ffn = packing.views(dlow, full)
    rows = torch.empty(packing.rows_size, dtype=torch.float32, device=v.device)
    if dout is None:
        dout = torch.zeros(*v.shape[:2], spec.stored, dtype=dtype, device=v.device)
    dout = dout.contiguous()

    dw, dfc1_bias = plain_ffn_backward(dout, hidden, w, fc1, fc1_bias, fc2, dfc1, dfc2)
    g[20].copy_(dfc1_bias[:spec.hidden])
    column_sums(dout[..., :C], out=g[22])
    dz, ds, _, dscale, _ = scaled_norm_backward(
        z, None if kernels.ffn else s, None, scale, p[17], dw, spec.norm_eps,
        sums=grads[starts[17]:starts[19]])
    del dw
    if kernels.ffn:
        first = round_up(G * spec.scan(grid).row, 64)
        dinside = residual_ffn_backward(dz, s, n, p[11], spec.norm2_eps,
                                        *_of_groups(spec, group_ffn, p)[:3],
                                        grads[starts[11]:starts[14]], rows[first:])
    else:
        dn, dgroup_bias = plain_ffn_backward(dz, group_hidden, n, group_ffn[0], group_ffn[2],
                                             group_ffn[1], dgroup_ffn[0], dgroup_ffn[1])
        g[15].copy_(dgroup_bias[:G * spec.group_hidden])
        column_sums(dz[..., :C], out=g[13])
        dinside, _, _ = add_norm_backward(s, None, p[11], ds, None, dn, None, spec.norm2_eps, G, 0,
                                          C, 0, dtype, sums=grads[starts[11]:starts[13]])
    del dz, ds
    # one gradient for both summands of what is inside
    dmixed = dinside
    if mixed.shape[2] > C:
        dmixed = torch.nn.functional.pad(dinside, (0, mixed.shape[2] - C))
    linear_weight_gradient(dmixed, y, out=dout_proj)
    dxz, *_ = ssm_backward(spec.scan(grid), linear_input_gradient(dmixed, out_proj), kept, u, xz,
                           True, (*p[5:8], p[8], p[9], None, None), conv, p[4], True, rows=rows,
                           dweight=g[3], dbias=g[4])
    if kernels.projection:
        dv = group_linear_backward(dxz, v, in_proj.view(G, -1, in_proj.shape[1]), spec.width, 2,
                                   round_up(spec.inner), din_proj)
    else:
        linear_weight_gradient(dxz, v, out=din_proj)
        dv = linear_input_gradient(dxz, in_proj)
    del dxz
    dmean = None
    if spec.affinity:
        dmean = affinity_backward(mean, p[23], p[26], p[24], p[25], None, dscale,
                                  (g[23], g[26], g[24], g[25], None))
    dtokens, dbranch, _ = add_norm_backward(
        tokens if x is None else x, branch_drop, p[0], dx, dinside, dv, dmean, spec.norm1_eps, G,
        1 if spec.affinity else 0, C, branch_width, dtype, sums=grads[:starts[2]])
    packing.unpack(dlow, rows, grads)
    return [dtokens, dbranch, grads]


#: What :func:`groupmamba_mm.ops.blocks.run_block` is given of a layer.
SPEC = PaperSpec
