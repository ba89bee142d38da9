"""Triton kernels of products of groups of channels: a projection, and a residual FFN with its norm.

A program has the tokens of one group, whose channels are few. That of an FFN adds the residual
branch, norms, and keeps the hidden tensor to itself; in the backward pass it makes a block of
hidden channels again on its way over the tokens, and adds up the gradients of both weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import has_large_smem, shared_memory
from ..integers import cdiv, round_up
from ..kernel_functions import activate, multiply
from ..launch import INTERPRETED, is_abstract, launch
from ..norm.kernels import add_norm_backward, add_norm_forward
from ..sums import sum_parts
from .hidden import load_columns, load_rows, parts

#: Channels of a group that have kernels: more do not fit into shared memory.
WIDEST_GROUP, WIDEST_LINEAR_GROUP = 192, 256

#: Tiles of tokens and hidden channels of the forward pass; of the parameters' gradients; of the
#: input's gradient.
_FORWARD = dict(T=64, BC=64, num_warps=4, maxnreg=168)
_BACKWARD = dict(T=32, BC=64, num_warps=4, num_stages=3)
_PRODUCT = dict(T=128, BC=64, num_warps=8)
#: Of the projection: forward and to the input, and of the weight's gradient.
_PROJECTION = dict(T=64, BC=64, num_warps=4)
_WEIGHT = dict(T=64, BC=64, num_warps=4, num_stages=2)
#: Programs wanted that add up gradients: two for each of an H100's multiprocessors in FFNs, and of
#: the projection's, which take half the registers, four.
_PROGRAMS, _WEIGHT_PROGRAMS = 264, 528


@triton.jit
def _place(GROUPS: tl.constexpr, T: tl.constexpr):
    """Group and tokens (T, 1) of this program. Groups run side by side: where one ends and the next
    begins, both write parts of the same sector of memory, which has to be in the cache still.
    """
    tile = (tl.program_id(0) // GROUPS).to(tl.int64)
    return tl.program_id(0) % GROUPS, tile * T + tl.arange(0, T)[:, None]


@triton.jit
def _columns(FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Numbers of COUNT columns from FIRST on, (1, COUNT)."""
    return FIRST + tl.arange(0, COUNT)[None, :]


@triton.jit
def _load_sum(x, branch, is_token, dtype: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
              WIDTH: tl.constexpr, POLICY: tl.constexpr):
    """x + branch of the columns from FIRST on, rounded as it is stored, in fp32."""
    column = _columns(FIRST, COUNT)
    mask = is_token & (column < WIDTH)
    s = tl.load(x + column, mask=mask, other=0., eviction_policy=POLICY).to(tl.float32)
    s += tl.load(branch + column, mask=mask, other=0., eviction_policy=POLICY).to(tl.float32)
    return s.to(dtype).to(tl.float32)


@triton.jit
def _center(s, mean, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """s - mean, zero where there is nothing."""
    return tl.where(_columns(FIRST, s.shape[1]) < WIDTH, s - mean[:, None], 0.)


@triton.jit
def _scale(unit, weight, bias, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """unit * weight + bias."""
    COUNT: tl.constexpr = unit.shape[1]
    return (unit * _load_vector(weight, FIRST, COUNT, WIDTH)
            + _load_vector(bias, FIRST, COUNT, WIDTH))


@triton.jit
def _load_vector(vector, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Those of WIDTH values, zero behind them, (1, COUNT) in fp32."""
    column = _columns(FIRST, COUNT)
    return tl.load(vector + column, mask=column < WIDTH, other=0.).to(tl.float32)


@triton.jit
def _store(rows, value, is_row, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Store a tile as columns from FIRST on of rows of WIDTH."""
    column = _columns(FIRST, value.shape[1])
    tl.store(rows + column, value.to(rows.dtype.element_ty), mask=is_row & (column < WIDTH))


@triton.jit(do_not_specialize=['tokens'])
def _residual_forward(x, branch, norm_weight, norm_bias, stream, normed, in_weight, in_bias, weight,
                      bias, out, tokens, eps, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
                      WIDTH: tl.constexpr, W_ROW: tl.constexpr, HEAD: tl.constexpr,
                      TAIL: tl.constexpr, X_ROW: tl.constexpr, BRANCH_ROW: tl.constexpr,
                      NORM: tl.constexpr, IN_FP32: tl.constexpr, T: tl.constexpr,
                      BC: tl.constexpr):
    """out = s + GELU(n in_weight^T + in_bias) weight^T + bias.

    NORM: s = x + branch and n = LN(s) are made here; else ``stream`` and ``normed`` have them.
    """
    group, token = _place(GROUPS, T)
    is_token = token < tokens
    first = group * WIDTH
    rows = token * (GROUPS * WIDTH) + first
    dtype: tl.constexpr = out.dtype.element_ty

    if NORM:
        x += token * X_ROW + first
        branch += token * BRANCH_ROW + first
        s_head = _load_sum(x, branch, is_token, dtype, 0, HEAD, WIDTH, '')
        mean = tl.sum(s_head, 1)
        if TAIL:
            s_tail = _load_sum(x, branch, is_token, dtype, HEAD, TAIL, WIDTH, '')
            mean += tl.sum(s_tail, 1)
        mean = mean / WIDTH
        unit_head = _center(s_head, mean, 0, WIDTH)
        variance = tl.sum(unit_head * unit_head, 1)
        if TAIL:
            unit_tail = _center(s_tail, mean, HEAD, WIDTH)
            variance += tl.sum(unit_tail * unit_tail, 1)
        rstd = tl.rsqrt(variance / WIDTH + eps)[:, None]
        n_head = _scale(unit_head * rstd, norm_weight + first, norm_bias + first, 0, WIDTH)
        n_head = n_head.to(dtype)
        if TAIL:
            n_tail = _scale(unit_tail * rstd, norm_weight + first, norm_bias + first, HEAD, WIDTH)
            n_tail = n_tail.to(dtype)
    else:
        n_head, n_tail = load_rows(normed + rows, is_token, WIDTH, HEAD, TAIL)
    y_head = tl.zeros([T, HEAD], tl.float32)
    if TAIL:
        y_tail = tl.zeros([T, TAIL], tl.float32)

    in_weight += group * CHANNELS * W_ROW
    in_bias += group * CHANNELS
    weight += group * WIDTH * CHANNELS
    bias += first
    for block in range((CHANNELS + BC - 1) // BC):
        channel = block * BC + tl.arange(0, BC)
        exists = channel < CHANNELS
        w_head, w_tail = load_rows(in_weight + channel[:, None] * W_ROW, exists[:, None], W_ROW,
                                   HEAD, TAIL)
        h = multiply(n_head, w_head.T, tl.zeros([T, BC], tl.float32), IN_FP32)
        if TAIL:
            h = multiply(n_tail, w_tail.T, h, IN_FP32)
        h += tl.load(in_bias + channel, mask=exists, other=0.).to(tl.float32)[None, :]
        value, _ = activate(h, 'gelu', dtype)
        value = value.to(dtype)
        v_head, v_tail = load_columns(weight, channel[None, :], exists[None, :], CHANNELS, WIDTH,
                                      HEAD, TAIL)
        y_head = multiply(value, v_head.T, y_head, IN_FP32)
        if TAIL:
            y_tail = multiply(value, v_tail.T, y_tail, IN_FP32)

    if NORM:
        # loaded once more, from a cache, instead of held all the while; the policy tells the loads
        # apart, which the compiler would merge
        s_head = _load_sum(x, branch, is_token, dtype, 0, HEAD, WIDTH, 'evict_first')
        if TAIL:
            s_tail = _load_sum(x, branch, is_token, dtype, HEAD, TAIL, WIDTH, 'evict_first')
    else:
        s_head, s_tail = load_rows(stream + rows, is_token, WIDTH, HEAD, TAIL)
    y_head += s_head.to(tl.float32) + _load_vector(bias, 0, HEAD, WIDTH)
    _store(out + rows, y_head, is_token, 0, WIDTH)
    if TAIL:
        y_tail += s_tail.to(tl.float32) + _load_vector(bias, HEAD, TAIL, WIDTH)
        _store(out + rows, y_tail, is_token, HEAD, WIDTH)


@triton.jit(do_not_specialize=['tokens'])
def _residual_gradients(n, dy, in_weight, in_bias, weight, dh, partial, tokens,
                        GROUPS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
                        W_ROW: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
                        ROW: tl.constexpr, IN_FP32: tl.constexpr, ONES: tl.constexpr,
                        T: tl.constexpr, BC: tl.constexpr):
    """The hidden tensor's gradient dh, and this program's share of the parameters' gradients.

    A program has a block of hidden channels of one group and walks over every n-th tile of tokens.
    Its share: in_weight (C, W_ROW), in_bias (C,), weight (W, C). A sum over the tokens is a product
    with ONES columns of ones: other warps have the tokens, and would have to be waited for.
    """
    BLOCKS: tl.constexpr = (CHANNELS + BC - 1) // BC
    group, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    channel = block * BC + tl.arange(0, BC)
    exists = channel < CHANNELS
    w_head, w_tail = load_rows(in_weight + (group * CHANNELS + channel[:, None]) * W_ROW,
                               exists[:, None], W_ROW, HEAD, TAIL)
    v_head, v_tail = load_columns(weight + group * WIDTH * CHANNELS, channel[None, :],
                                  exists[None, :], CHANNELS, WIDTH, HEAD, TAIL)
    b = tl.load(in_bias + group * CHANNELS + channel, mask=exists, other=0.).to(tl.float32)
    ones = tl.full([T, ONES], 1., tl.float32).to(dh.dtype.element_ty)
    dw_head, dv_head = tl.zeros([BC, HEAD], tl.float32), tl.zeros([BC, HEAD], tl.float32)
    db = tl.zeros([BC, ONES], tl.float32)
    if TAIL:
        dw_tail, dv_tail = tl.zeros([BC, TAIL], tl.float32), tl.zeros([BC, TAIL], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(tokens, T), tl.num_programs(1)):
        token = (tile * T + tl.arange(0, T)[:, None]).to(tl.int64)
        is_token = token < tokens
        rows = token * (GROUPS * WIDTH) + group * WIDTH
        n_head, n_tail = load_rows(n + rows, is_token, WIDTH, HEAD, TAIL)
        dy_head, dy_tail = load_rows(dy + rows, is_token, WIDTH, HEAD, TAIL)
        h = multiply(n_head, w_head.T, tl.zeros([T, BC], tl.float32), IN_FP32)
        gradient = multiply(dy_head, v_head, tl.zeros([T, BC], tl.float32), IN_FP32)
        if TAIL:
            h = multiply(n_tail, w_tail.T, h, IN_FP32)
            gradient = multiply(dy_tail, v_tail, gradient, IN_FP32)
        value, slope = activate(h + b[None, :], 'gelu', dh.dtype.element_ty)
        gradient = gradient * slope  # zero for tokens that do not exist, as dy is
        value, gradient = value.to(dh.dtype.element_ty), gradient.to(dh.dtype.element_ty)
        tl.store(dh + (token * GROUPS + group) * CHANNELS + channel[None, :], gradient,
                 mask=is_token & exists[None, :])
        dw_head = multiply(gradient.T, n_head, dw_head, IN_FP32)
        db = multiply(gradient.T, ones, db, IN_FP32)
        dv_head = multiply(value.T, dy_head, dv_head, IN_FP32)
        if TAIL:
            dw_tail = multiply(gradient.T, n_tail, dw_tail, IN_FP32)
            dv_tail = multiply(value.T, dy_tail, dv_tail, IN_FP32)

    share = partial + (tl.program_id(1) * GROUPS + group).to(tl.int64) * ROW
    dw, dv = share + channel[:, None] * W_ROW, share + CHANNELS * (W_ROW + 1) + channel[:, None]
    head = _columns(0, HEAD)
    _store(dw, dw_head, exists[:, None], 0, W_ROW)
    tl.store(dv + head * CHANNELS, dv_head, mask=exists[:, None] & (head < WIDTH))
    if TAIL:
        tail = _columns(HEAD, TAIL)
        _store(dw, dw_tail, exists[:, None], HEAD, W_ROW)
        tl.store(dv + tail * CHANNELS, dv_tail, mask=exists[:, None] & (tail < WIDTH))
    tl.store(share + CHANNELS * W_ROW + channel, tl.sum(db, 1) / ONES, mask=exists)


@triton.jit(do_not_specialize=['tokens'])
def _input_gradient(dh, in_weight, dn, tokens, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
                    WIDTH: tl.constexpr, W_ROW: tl.constexpr, HEAD: tl.constexpr,
                    TAIL: tl.constexpr, IN_FP32: tl.constexpr, T: tl.constexpr, BC: tl.constexpr):
    """dn = dh in_weight of each group."""
    group, token = _place(GROUPS, T)
    is_token = token < tokens
    dn_head = tl.zeros([T, HEAD], tl.float32)
    if TAIL:
        dn_tail = tl.zeros([T, TAIL], tl.float32)
    for block in range((CHANNELS + BC - 1) // BC):
        channel = block * BC + tl.arange(0, BC)
        exists = channel < CHANNELS
        tile = tl.load(dh + (token * GROUPS + group) * CHANNELS + channel[None, :],
                       mask=is_token & exists[None, :], other=0.)
        w_head, w_tail = load_rows(in_weight + (group * CHANNELS + channel[:, None]) * W_ROW,
                                   exists[:, None], W_ROW, HEAD, TAIL)
        dn_head = multiply(tile, w_head, dn_head, IN_FP32)
        if TAIL:
            dn_tail = multiply(tile, w_tail, dn_tail, IN_FP32)
    rows = dn + (token * GROUPS + group) * WIDTH
    _store(rows, dn_head, is_token, 0, WIDTH)
    if TAIL:
        _store(rows, dn_tail, is_token, HEAD, WIDTH)


@triton.jit
def _block(index, group, GROUPS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
           STORED: tl.constexpr, BC: tl.constexpr):
    """Of a block of a group's output channels: which rows of its weight, and whether they exist;
    where in a row of all outputs, and whether there is room.

    Rows are PARTS times the groups, each with its channels padded to STORED.
    """
    BLOCKS: tl.constexpr = (STORED + BC - 1) // BC
    part = index // BLOCKS
    channel = (index % BLOCKS) * BC + tl.arange(0, BC)
    return ((group * PARTS + part) * CHANNELS + channel, channel < CHANNELS,
            (part * GROUPS + group) * STORED + channel, channel < STORED)


@triton.jit(do_not_specialize=['tokens'])
def _project_forward(x, weight, out, tokens, GROUPS: tl.constexpr, PARTS: tl.constexpr,
                     CHANNELS: tl.constexpr, STORED: tl.constexpr, WIDTH: tl.constexpr,
                     W_ROW: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
                     X_ROW: tl.constexpr, IN_FP32: tl.constexpr, T: tl.constexpr,
                     BC: tl.constexpr):
    """out = x weight^T of one group, zero in the padding of its channels."""
    group, token = _place(GROUPS, T)
    is_token = token < tokens
    x_head, x_tail = load_rows(x + token * X_ROW + group * WIDTH, is_token, WIDTH, HEAD, TAIL)
    rows = out + token * (PARTS * GROUPS * STORED)
    for index in range(PARTS * ((STORED + BC - 1) // BC)):
        row, exists, column, is_stored = _block(index, group, GROUPS, PARTS, CHANNELS, STORED, BC)
        w_head, w_tail = load_rows(weight + row[:, None] * W_ROW, exists[:, None], W_ROW, HEAD,
                                   TAIL)
        y = multiply(x_head, w_head.T, tl.zeros([T, BC], tl.float32), IN_FP32)
        if TAIL:
            y = multiply(x_tail, w_tail.T, y, IN_FP32)
        tl.store(rows + column[None, :], y.to(out.dtype.element_ty),
                 mask=is_token & is_stored[None, :])


@triton.jit(do_not_specialize=['tokens'])
def _project_input(dy, weight, dx, tokens, GROUPS: tl.constexpr, PARTS: tl.constexpr,
                   CHANNELS: tl.constexpr, STORED: tl.constexpr, WIDTH: tl.constexpr,
                   W_ROW: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, X_ROW: tl.constexpr,
                   IN_FP32: tl.constexpr, T: tl.constexpr, BC: tl.constexpr):
    """dx = dy weight of one group."""
    group, token = _place(GROUPS, T)
    is_token = token < tokens
    rows = dy + token * (PARTS * GROUPS * STORED)
    dx_head = tl.zeros([T, HEAD], tl.float32)
    if TAIL:
        dx_tail = tl.zeros([T, TAIL], tl.float32)
    for index in range(PARTS * ((STORED + BC - 1) // BC)):
        row, exists, column, _ = _block(index, group, GROUPS, PARTS, CHANNELS, STORED, BC)
        tile = tl.load(rows + column[None, :], mask=is_token & exists[None, :], other=0.)
        w_head, w_tail = load_rows(weight + row[:, None] * W_ROW, exists[:, None], W_ROW, HEAD,
                                   TAIL)
        dx_head = multiply(tile, w_head, dx_head, IN_FP32)
        if TAIL:
            dx_tail = multiply(tile, w_tail, dx_tail, IN_FP32)
    rows = dx + token * X_ROW + group * WIDTH
    _store(rows, dx_head, is_token, 0, WIDTH)
    if TAIL:
        _store(rows, dx_tail, is_token, HEAD, WIDTH)


@triton.jit(do_not_specialize=['tokens'])
def _project_weight(x, dy, partial, tokens, GROUPS: tl.constexpr, PARTS: tl.constexpr,
                    CHANNELS: tl.constexpr, STORED: tl.constexpr, WIDTH: tl.constexpr,
                    W_ROW: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
                    X_ROW: tl.constexpr, IN_FP32: tl.constexpr, T: tl.constexpr,
                    BC: tl.constexpr):
    """This program's share of the gradient of a block of weight's rows: every n-th tile's."""
    BLOCKS: tl.constexpr = PARTS * ((STORED + BC - 1) // BC)
    group, index = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    row, exists, column, _ = _block(index, group, GROUPS, PARTS, CHANNELS, STORED, BC)
    dw_head = tl.zeros([BC, HEAD], tl.float32)
    if TAIL:
        dw_tail = tl.zeros([BC, TAIL], tl.float32)
    for number in range(tl.program_id(1), tl.cdiv(tokens, T), tl.num_programs(1)):
        token = (number * T + tl.arange(0, T)[:, None]).to(tl.int64)
        is_token = token < tokens
        x_head, x_tail = load_rows(x + token * X_ROW + group * WIDTH, is_token, WIDTH, HEAD, TAIL)
        tile = tl.load(dy + token * (PARTS * GROUPS * STORED) + column[None, :],
                       mask=is_token & exists[None, :], other=0.)
        dw_head = multiply(tile.T, x_head, dw_head, IN_FP32)
        if TAIL:
            dw_tail = multiply(tile.T, x_tail, dw_tail, IN_FP32)
    share = partial + tl.program_id(1).to(tl.int64) * (GROUPS * PARTS * CHANNELS * W_ROW)
    rows = share + row[:, None] * W_ROW
    _store(rows, dw_head, exists[:, None], 0, W_ROW)
    if TAIL:
        _store(rows, dw_tail, exists[:, None], HEAD, W_ROW)


def fits_ffn(dtype: torch.dtype, width: int, device: torch.device) -> bool:
    """Whether FFNs of groups have kernels: half precision, and a GPU that can hold the weights."""
    return dtype != torch.float32 and width <= WIDEST_GROUP and has_large_smem(device)


def fits_projection(dtype: torch.dtype, width: int, device: torch.device) -> bool:
    """Whether projections of groups have kernels.

    A tile of tokens, three blocks of the weight and one of the output are in shared memory: those
    of 160 channels fit on any GPU from capability 8.0 on, those of 256 on an A100.
    """
    if dtype == torch.float32 or width > WIDEST_LINEAR_GROUP:
        return False
    tile, block = _PROJECTION['T'], _PROJECTION['BC']
    needed = 2 * ((tile + 3 * block) * sum(parts(round_up(width))) + tile * block)
    return shared_memory(device) >= needed


def _of_ffn(in_weight: Tensor, weight: Tensor) -> dict:
    """Constants of an FFN's kernels."""
    groups, channels, row = in_weight.shape
    head, tail = parts(row)
    return dict(GROUPS=groups, CHANNELS=channels, WIDTH=weight.shape[1], W_ROW=row, HEAD=head,
                TAIL=tail, IN_FP32=INTERPRETED)


def residual_ffn_forward(x: Tensor, branch: Tensor, norm_weight: Tensor, norm_bias: Tensor,
                         eps: float, in_weight: Tensor, in_bias: Tensor, weight: Tensor,
                         bias: Tensor, keep: bool
                         ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """s + FFN(LN(s)) with s = x + branch, norm and FFN in each group of W channels on its own.

    All of it is one kernel, or two in training: the backward pass needs s and its norm. The hidden
    tensor it recomputes.

    Args:
        x: (B, L, C) tokens, C = G * W, any float dtype.
        branch: (B, L, >=C), any float dtype.
        norm_weight, norm_bias: (C,) of the LayerNorm of s, any float dtype.
        eps: Added to its variance.
        in_weight: (G, H, Wp), zero from column W on; its dtype, bf16 or fp16, is that of s, of the
            products and of the output.
        in_bias: (G, H), any float dtype.
        weight: (G, W, H), in the dtype of in_weight.
        bias: (G, W), any float dtype.
        keep: Whether what the backward pass needs is returned.

    Returns:
        (B, L, C); s and LN(s), both (B, L, C), or None.
    """
    groups, tokens = in_weight.shape[0], x.shape[0] * x.shape[1]
    out = torch.empty(x.shape, dtype=in_weight.dtype, device=x.device)
    x, branch = x.contiguous(), branch.contiguous()
    stream = normed = None
    if keep:  # a kernel of its own for these two is faster than one that also writes them
        stream, normed, _, _ = add_norm_forward(x, branch, None, norm_weight, norm_bias, eps,
                                                groups, x.shape[2], in_weight.dtype, 0,
                                                in_weight.dtype)
    if tokens:
        made = (stream, normed) if keep else (out, out)
        launch(_residual_forward, (cdiv(tokens, _FORWARD['T']) * groups, ), x, branch, norm_weight,
               norm_bias, *made, in_weight, in_bias, weight, bias, out, tokens, eps,
               X_ROW=x.shape[2], BRANCH_ROW=branch.shape[2], NORM=not keep, num_stages=1,
               **_of_ffn(in_weight, weight), **_FORWARD)
    return out, stream, normed


def residual_ffn_backward(dy: Tensor, stream: Tensor, n: Tensor, norm_weight: Tensor, eps: float,
                          in_weight: Tensor, in_bias: Tensor, weight: Tensor, vectors: Tensor,
                          rows: Tensor) -> Tensor:
    """Gradients of :func:`residual_ffn_forward`.

    Args:
        dy: (B, L, C).
        stream, n: What it returned behind its first result.
        norm_weight, eps, in_weight, in_bias, weight: As there.
        vectors: Where to write those of norm_weight, norm_bias and bias, (3, C).
        rows: Where to write, of each group in a row, those of in_weight, in_bias and weight,
            (G, H * Wp + H + W * H) in fp32.

    Returns:
        The gradient of s.
    """
    n, dy = n.contiguous(), dy.contiguous()
    dn = _ffn_backward(n, dy, in_weight, in_bias, weight, rows)
    ds, _, _ = add_norm_backward(stream, None, norm_weight, dy, None, dn, None, eps,
                                 in_weight.shape[0], 0, n.shape[2], 0, n.dtype, wants_sum=True,
                                 sums=vectors)
    return ds


def _ffn_backward(n: Tensor, dy: Tensor, in_weight: Tensor, in_bias: Tensor, weight: Tensor,
                  rows: Tensor) -> Tensor:
    """The gradient of n in y = GELU(n in_weight^T + in_bias) weight^T, the others into ``rows``."""
    constants = _of_ffn(in_weight, weight)
    groups, channels, width = constants['GROUPS'], constants['CHANNELS'], constants['WIDTH']
    dn = torch.empty_like(n)
    if is_abstract(n):
        return dn
    tokens, row = n.shape[0] * n.shape[1], channels * (in_weight.shape[2] + 1 + width)
    walks = groups * cdiv(channels, _BACKWARD['BC'])
    programs = max(1, min(cdiv(tokens, _BACKWARD['T']), _PROGRAMS // walks))
    partial = torch.empty(programs, groups, row, dtype=torch.float32, device=n.device)
    dh = torch.empty(tokens, groups * channels, dtype=n.dtype, device=n.device)
    launch(_residual_gradients, (walks, programs), n, dy, in_weight, in_bias, weight, dh, partial,
           tokens, ROW=row, ONES=16, **constants, **_BACKWARD)
    if tokens:
        launch(_input_gradient, (cdiv(tokens, _PRODUCT['T']) * groups, ), dh, in_weight, dn, tokens,
               **constants, **_PRODUCT)
    sum_parts(partial, out=rows)
    return dn


def _of_projection(x: Tensor, weight: Tensor, width: int, parts_of_output: int,
                   stored: int) -> dict:
    """Constants of a projection's kernels."""
    groups, outputs, row = weight.shape
    head, tail = parts(row)
    return dict(GROUPS=groups, PARTS=parts_of_output, CHANNELS=outputs // parts_of_output,
                STORED=stored, WIDTH=width, W_ROW=row, HEAD=head, TAIL=tail, X_ROW=x.shape[2],
                IN_FP32=INTERPRETED)


def group_linear_forward(x: Tensor, weight: Tensor, width: int, parts_of_output: int,
                         stored: int) -> Tensor:
    """A linear layer of each group without bias: x weight^T, in parts of all groups.

    Args:
        x: (B, L, >=G * width) tokens, what is behind the groups is ignored; bf16 or fp16.
        weight: (G, parts * d, Wp) in the dtype of ``x``, zero from column ``width`` on.
        width: Channels of a group of ``x``.
        parts_of_output: What each group's outputs are split into.
        stored: Channels of a group in memory, at least d.

    Returns:
        (B, L, parts * G * stored) in the dtype of ``x``: all groups of the first part, then those
        of the next; zero in the padding of each group's channels.
    """
    x = x.contiguous()
    groups, tokens = weight.shape[0], x.shape[0] * x.shape[1]
    y = torch.empty(*x.shape[:2], parts_of_output * groups * stored, dtype=x.dtype, device=x.device)
    if tokens:
        launch(_project_forward, (cdiv(tokens, _PROJECTION['T']) * groups, ), x, weight, y, tokens,
               **_of_projection(x, weight, width, parts_of_output, stored), **_PROJECTION)
    return y


def group_linear_backward(dy: Tensor, x: Tensor, weight: Tensor, width: int, parts_of_output: int,
                          stored: int, dweight: Tensor) -> Tensor:
    """The gradient of x in :func:`group_linear_forward`; that of the weight goes to ``dweight``."""
    dy, x = dy.contiguous(), x.contiguous()
    groups, tokens = weight.shape[0], x.shape[0] * x.shape[1]
    dx = torch.empty_like(x)
    if is_abstract(x):
        return dx
    if x.shape[2] > groups * width:
        dx[..., groups * width:] = 0
    constants = _of_projection(x, weight, width, parts_of_output, stored)
    walks = groups * parts_of_output * cdiv(stored, _WEIGHT['BC'])
    programs = max(1, min(cdiv(tokens, _WEIGHT['T']), _WEIGHT_PROGRAMS // walks))
    partial = torch.empty(programs, *weight.shape, dtype=torch.float32, device=x.device)
    if tokens:
        launch(_project_input, (cdiv(tokens, _PROJECTION['T']) * groups, ), dy, weight, dx, tokens,
               **constants, **_PROJECTION)
    launch(_project_weight, (walks, programs), x, dy, partial, tokens, **constants, **_WEIGHT)
    sum_parts(partial, out=dweight)
    return dx
