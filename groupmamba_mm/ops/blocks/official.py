"""The released model's block, :class:`groupmamba_mm.layers.OfficialBlock`, in kernels."""
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ffn.conv import conv_ffn_backward, conv_ffn_forward
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

#: The block's parameters in the order of all lists here. Gradients lie behind each other in one
#: buffer: those whose sizes may be odd come last, so that the others are aligned.
PARAMETERS = (
    'mixer.norm.weight', 'mixer.norm.bias', 'mixer.ss2d.in_proj.weight',
    'mixer.ss2d.conv2d.weight', 'mixer.ss2d.conv2d.bias', 'mixer.ss2d.ssm.x_proj_weight',
    'mixer.ss2d.ssm.dt_proj_weight', 'mixer.ss2d.ssm.dt_proj_bias', 'mixer.ss2d.ssm.A_log',
    'mixer.ss2d.ssm.D', 'mixer.ss2d.out_norm.weight', 'mixer.ss2d.out_norm.bias',
    'mixer.ss2d.out_proj.weight', 'mixer.proj.weight', 'mixer.proj.bias', 'norm2.weight',
    'norm2.bias', 'ffn.fc1.weight', 'ffn.fc1.bias', 'ffn.dwconv.weight', 'ffn.dwconv.bias',
    'ffn.fc2.weight', 'ffn.fc2.bias', 'mixer.skip_scale')
#: Behind them, if there is channel affinity.
AFFINITY_PARAMETERS = ('mixer.affinity.fc1.weight', 'mixer.affinity.fc2.weight',
                       'mixer.affinity.fc2.bias', 'mixer.affinity.fc1.bias')

#: Hidden channels of an FFN are padded to multiples of this: torch.compile pads wide rows to it by
#: itself, and would copy them back.
HIDDEN_MULTIPLE = 64

#: From so many times the channels on, the hidden tensor of the FFN is recomputed in the backward
#: pass: in the first two stages (eight times) those are a quarter of what a training step would
#: keep.
WIDE_EXPANSION = 6


class OfficialSpec(NamedTuple):
    """What decides on the launches of a block besides the sizes of images and batch.

    Attributes:
        channels, groups, hidden: C, G and the FFN's hidden channels.
        dt_rank, d_state: R and N.
        directions: Of the groups, a :func:`direction_code`.
        affinity: Hidden units of the channel affinity, 0 without it.
        norm_eps, out_norm_eps, norm2_eps: Of the three LayerNorms.
    """
    channels: int
    groups: int
    hidden: int
    dt_rank: int
    d_state: int
    directions: int
    affinity: int
    norm_eps: float
    out_norm_eps: float
    norm2_eps: float

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.channels // self.groups

    @property
    def stored_width(self) -> int:
        """The same in memory."""
        return round_up(self.width)

    @property
    def stored(self) -> int:
        """Channels in memory where a product reads or writes them."""
        return round_up(self.channels)

    @property
    def stored_hidden(self) -> int:
        return round_up(self.hidden, HIDDEN_MULTIPLE)

    def keeps_hidden(self) -> bool:
        """Whether the FFN's hidden tensor is kept for the backward pass."""
        return self.stored_hidden < WIDE_EXPANSION * self.stored

    def scan(self, grid: tuple[int, int]) -> Scan:
        return scan_of(*grid, self.groups, self.width, self.stored_width, self.dt_rank,
                       self.d_state, self.directions, self.out_norm_eps, True)

    @functools.cache
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of all parameters, in their order."""
        C, G, W, N, R, Hd = (self.channels, self.groups, self.width, self.d_state, self.dt_rank,
                             self.hidden)
        shapes = [(C, ), (C, ), (G, 2 * W, W), (C, 1, 3, 3), (C, ), (G, R + 2 * N, W), (G, W, R),
                  (G, W), (G, W, N), (C, ), (C, ), (C, ), (G, W, W), (C, C), (C, ), (C, ), (C, ),
                  (Hd, C), (Hd, ), (Hd, 1, 3, 3), (Hd, ), (C, Hd), (C, ), (1, )]
        if self.affinity:
            shapes += [(self.affinity, C), (C, self.affinity), (C, ), (self.affinity, )]
        return tuple(map(torch.Size, shapes))


@functools.cache
def packing_of(spec: OfficialSpec) -> Packing:
    """How the block's weights are laid out for its kernels, in the order of ``forward``."""
    C, G, W, stored, hidden = (spec.channels, spec.groups, spec.width, spec.stored,
                               spec.stored_hidden)
    sizes = [W * (spec.dt_rank + 2 * spec.d_state), W * spec.dt_rank, W * spec.d_state, W, W, W, W]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    row = sum(sizes)
    in_order = (5, 6, 8, 7, 9, 10, 11)  # of scan_backward's rows
    return Packing(
        (block_diagonal(2, G, 2, W, W, spec.stored_width, W, stored),
         block_diagonal(12, G, 1, W, W, W, spec.stored_width, G * spec.stored_width),
         dense(13, C, C, stored, stored), vector(14, C, stored),
         dense(17, spec.hidden, C, hidden, stored), vector(18, spec.hidden, hidden),
         dense(21, C, spec.hidden, stored, hidden), vector(22, C, stored),
         taps(3, 9, C, C), taps(19, 9, spec.hidden, hidden),
         vector(20, spec.hidden, hidden, in_fp32=True)),
        [Rows(parameter, G, start, 1, size, 0, row)
         for parameter, start, size in zip(in_order, starts, sizes)], G * row,
        [shape.numel() for shape in spec.shapes()])


def forward(spec: OfficialSpec, grid: tuple[int, int], dtype: torch.dtype, keep: bool,
            tokens: Tensor, branch: Tensor | None, branch_drop: Tensor | None,
            drop: Tensor | None, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """x = tokens + branch, x = x + mixer(x), and the FFN's branch.

    Args:
        spec: The block.
        grid: (H, W).
        dtype: Precision of the products.
        keep: Whether for a backward pass.
        tokens: (B, L, C).
        branch: (B, L, >=C), what the block before left to add, or None.
        branch_drop: Stochastic depth's factor of it for each image, (B,), or None.
        drop: The same of the mixer.
        parameters: In the order of PARAMETERS and AFFINITY_PARAMETERS.

    Returns:
        x (B, L, C), the branch (B, L, Cp); and what :func:`backward` needs.
    """
    packing = packing_of(spec)
    p, stored = parameters, spec.stored
    low, full = packing.pack(p, dtype)
    (in_proj, out_proj, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias, conv, dwconv,
     dwconv_bias) = packing.views(low, full)
    x0, u, mean, _ = add_norm_forward(tokens, branch, branch_drop, p[0], p[1], spec.norm_eps, 1,
                                      stored, dtype, 2 if spec.affinity else 0)
    stream = tokens if x0 is None else x0
    if spec.affinity:
        scale = affinity_forward(mean, p[24], p[27], p[25], p[26], p[23])
    else:
        scale = p[23].to(torch.float32).expand(tokens.shape[0], spec.channels).contiguous()
    xz = linear(u, in_proj)
    y, kept, _ = ssm_forward(spec.scan(grid), xz, True, (*p[5:8], p[8], *p[9:12]), conv, p[4],
                             False, keep)
    mixed = linear(y, out_proj)
    n = scaled_norm_forward(mixed, None, u, scale, p[0], p[1], spec.norm_eps, stored, dtype)
    x1, v, _, _ = add_norm_forward(stream, linear(n, proj, proj_bias), drop, p[15], p[16],
                                   spec.norm2_eps, 1, stored, dtype, 0)
    out, hidden = conv_ffn_forward(v, fc1, fc1_bias, dwconv, dwconv_bias, fc2, fc2_bias, grid)
    if not keep:
        return [x1, out]
    return [x1, out, low, full, x0, u, mean, scale, xz, kept, y, mixed, v,
            hidden if spec.keeps_hidden() else None]


def saves(spec: OfficialSpec, has_branch: bool, dtype: torch.dtype,
          device: torch.device) -> list[bool]:
    """Which of the tensors of :func:`forward` there are."""
    return [True, True, True, True, has_branch, True, bool(spec.affinity), *[True] * 6,
            spec.keeps_hidden()]


def backward(spec: OfficialSpec, grid: tuple[int, int], dtype: torch.dtype, dx: Tensor | None,
             dout: Tensor | None, tokens: Tensor, branch_width: int,
             branch_drop: Tensor | None, drop: Tensor | None, parameters: Sequence[Tensor],
             x1: Tensor, saved: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of :func:`forward`.

    Args:
        spec, grid, dtype, tokens, branch_drop, drop, parameters: As there.
        dx, dout: Gradients of its first two results.
        branch_width: Channels of ``branch`` in memory, 0 without it.
        x1: Its first result.
        saved: What it returned behind the second.

    Returns:
        Gradients of tokens and branch (or None), and of all parameters in one buffer.
    """
    low, full, x0, u, mean, scale, xz, kept, y, mixed, v, hidden = saved
    packing = packing_of(spec)
    p, C, stored = parameters, spec.channels, spec.stored
    (in_proj, out_proj, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias, conv, dwconv,
     dwconv_bias) = packing.views(low, full)
    grads = torch.empty(packing.total, dtype=p[0].dtype, device=v.device)
    g, starts = grads.split_with_sizes(packing.numels), packing.starts
    of_first_norm = grads[:starts[2]]
    dlow = torch.empty(packing.sizes[0], dtype=dtype, device=v.device)
    din_proj, dout_proj, dproj, _, dfc1, _, dfc2, *_ = packing.views(dlow, full)
    rows = torch.empty(packing.rows_size, dtype=torch.float32, device=v.device)
    if dout is None:
        dout = torch.zeros(*v.shape[:2], stored, dtype=dtype, device=v.device)
    dout = dout.contiguous()

    dv = conv_ffn_backward(dout, hidden, v, fc1, fc1_bias, dwconv, dwconv_bias, fc2, grid, dfc1,
                           dfc2, g[18], g[19], g[20])
    column_sums(dout[..., :C], out=g[22])
    dx1, dr, _ = add_norm_backward(x1, drop, p[15], dx, None, dv, None, spec.norm2_eps, 1, 0, C,
                                   stored, dtype, sums=grads[starts[15]:starts[17]])
    del dv
    n = scaled_norm_forward(mixed, None, u, scale, p[0], p[1], spec.norm_eps, stored, dtype)
    linear_weight_gradient(dr, n, out=dproj)
    del n  # before its gradient is made
    column_sums(dr[..., :C], out=g[14])
    dmixed, _, du, dscale, of_norm = scaled_norm_backward(
        mixed, None, u, scale, p[0], linear_input_gradient(dr, proj), spec.norm_eps)
    del dr
    linear_weight_gradient(dmixed, y, out=dout_proj)
    dxz, *_ = ssm_backward(spec.scan(grid), linear_input_gradient(dmixed, out_proj), kept, None, xz,
                           True, (*p[5:8], p[8], *p[9:12]), conv, p[4], False, rows=rows,
                           dweight=g[3], dbias=g[4])
    del dmixed
    linear_weight_gradient(dxz, u, out=din_proj)
    linear_input_gradient(dxz, in_proj, add_to=du)
    del dxz
    dmean = None
    if spec.affinity:
        dmean = affinity_backward(mean, p[24], p[27], p[25], p[26], p[23], dscale,
                                  (g[24], g[27], g[25], g[26], g[23]))
    else:
        torch.sum(dscale, dim=(0, 1), keepdim=True, out=g[23].view(1, 1))
    dtokens, dbranch, _ = add_norm_backward(
        tokens if x0 is None else x0, branch_drop, p[0], dx1, None, du, dmean, spec.norm_eps, 1,
        2 if spec.affinity else 0, C, branch_width, dtype, sums=of_first_norm)
    of_first_norm.add_(of_norm.view(-1))  # the norm is applied twice
    packing.unpack(dlow, rows, grads)
    return [dtokens, dbranch, grads]


#: What :func:`groupmamba_mm.ops.blocks.run_block` is given of a block.
SPEC = OfficialSpec
