"""Triton kernels of the fused LayerNorms and of the channel affinity, and their launchers.

A LayerNorm program owns one image, one group of channels and a run of tiles of TOKENS x BLOCK
values; the group's WIDTH channels are padded to the power of two BLOCK. A backward program sums
its share of the parameters' gradients and writes it as one row of partial sums, which are added
up in a fixed order: no atomics, so gradients are bitwise repeatable.

The kernels wait for memory, so a program loads its next tile, asynchronously into shared memory,
while it works on one. All loads of a tile come before all else in the loop: a load behind a sum
over a row would wait for the sum, and what follows for the load.

Statistics and arithmetic are fp32. Backward kernels load the row anyway, so they compute its
statistics again instead of loading them.

Each tensor is rows of a constant distance (its ``_ROW``), of which the first CHANNELS values
count. Outputs that are wider end in zeros.
"""
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..integers import cdiv, next_power_of_2
from ..launch import is_abstract, launch, rows_of
from ..sums import sum_parts

#: Tiles that are on their way from memory or in work: two are always loaded ahead, except of rows
#: so wide that shared memory would not do.
_STAGES, _WIDEST_AHEAD = 3, 2048
#: Programs wanted of backward kernels: ten for each multiprocessor of an H100. All programs of wide
#: rows then run at once (the scaled norm's has registers for twelve), and those of narrow rows have
#: tiles enough to load ahead, and few partial sums. Forward kernels have none or few of those.
_PROGRAMS_BACKWARD = 1320
_PROGRAMS_FORWARD = 4 * _PROGRAMS_BACKWARD


#: None of them decides on a compiled version.
_INTEGERS = ['length', 'chunks', 'tiles']


class Plan(NamedTuple):
    """How a (B, L, C) tensor is cut into programs; see :func:`plan_launch`."""
    tiles: int  # tiles of a program
    chunks: int  # programs for the tokens of one image and group
    constants: dict  # what kernels must know when they are compiled


@functools.cache
def plan_launch(batch: int, length: int, width: int, groups: int, backward: bool) -> Plan:
    """Choose tile and grid by rules, without timing anything: equal shapes, equal results.

    Args:
        batch: Number of images B.
        length: Number of tokens L.
        width: Number of channels of a group.
        groups: Number of groups G.
        backward: Whether it is for a backward kernel.
    """
    block = next_power_of_2(width)
    # Warps own whole rows, up to 512 channels wide, so that sums over a row need no other warp. A
    # program has one warp for such rows, and four for narrow ones, of which a warp owns several.
    # Columns past the last multiple of 128 in WIDTH cost next to nothing: the compiler sees that
    # they are not needed.
    warps = 4 if block <= 128 else max(1, min(8, block // 512))
    # Eight values for each thread (sixteen in rows of 512), fewer warps for a tile that is small
    # because the whole image is.
    tokens = max(1, min(256 * warps // block, next_power_of_2(length)))
    warps = max(1, min(warps, tokens * block // 256))
    per_image = cdiv(length, tokens)
    # Eight tokens at least, so that the partial sums of weight and bias (8 bytes for each channel
    # of a program) stay small beside the tokens' own traffic.
    wanted = _PROGRAMS_BACKWARD if backward else _PROGRAMS_FORWARD
    tiles = max(batch * groups * per_image // wanted, cdiv(8, tokens))
    chunks = cdiv(per_image, min(tiles, per_image))
    constants = dict(TOKENS=tokens, BLOCK=block, num_warps=warps,
                     STAGES=_STAGES if block <= _WIDEST_AHEAD else 1)
    return Plan(cdiv(per_image, chunks), chunks, constants)


# --- parts of kernels -----------------------------------------------------------------------------


@triton.jit
def _locate(length, chunks, tiles, GROUPS: tl.constexpr, TOKENS: tl.constexpr):
    """Group, image, partial sum, first token and first row (int64) of this program.

    Groups run fastest: programs that share cache lines of a row run at the same time.
    """
    program = tl.program_id(0)
    group = program % GROUPS
    part = program // GROUPS
    image = part // chunks
    token = (part % chunks) * tiles * TOKENS
    return group, image, part, token, image.to(tl.int64) * length + token


@triton.jit
def _load(base, row, tokens, columns, mask, ROW: tl.constexpr):
    """The fp32 tile of ``tokens`` x ``columns`` behind row number ``row``, 0 where masked."""
    offsets = tokens[:, None] * ROW + columns[None, :]
    return tl.load(base + row * ROW + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(base, row, tokens, columns, mask, value, ROW: tl.constexpr):
    """Store a tile in the precision of ``base``."""
    offsets = tokens[:, None] * ROW + columns[None, :]
    tl.store(base + row * ROW + offsets, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _store_padded(base, row, tokens, columns, inside, exists, value, CHANNELS: tl.constexpr,
                  ROW: tl.constexpr, GROUPS: tl.constexpr = 1):
    """:func:`_store` into rows that may be wider than CHANNELS, with zeros behind the channels.

    The last group's tile writes them with its own values, as far as it reaches.
    """
    REACH: tl.constexpr = CHANNELS - CHANNELS // GROUPS + columns.shape[0]
    if ROW == CHANNELS:
        _store(base, row, tokens, columns, inside[:, None] & exists[None, :], value, ROW)
    else:
        stored = exists | ((columns >= CHANNELS) & (columns < ROW))
        _store(base, row, tokens, columns, inside[:, None] & stored[None, :],
               tl.where(exists[None, :], value, 0.0), ROW)
        for start in tl.static_range(REACH, ROW, 8):
            tail = start + tl.arange(0, 8)
            offsets = tokens[:, None] * ROW + tail[None, :]
            tl.store(base + row * ROW + offsets, tl.zeros(offsets.shape, base.dtype.element_ty),
                     mask=inside[:, None] & (tail < ROW)[None, :])


@triton.jit
def _normalize(x, exists, eps, WIDTH: tl.constexpr):
    """Rows of zero mean and unit variance; ``x`` is 0, and stays so, where not ``exists``."""
    mean = tl.sum(x, axis=1) / WIDTH
    centred = tl.where(exists, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
    return centred * rstd[:, None]


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _normalize_backward(x, grad, exists, eps, WIDTH: tl.constexpr):
    """Normalized rows as :func:`_normalize`, and the gradient of ``x``, given that of theirs.

    The sums of both directions go through the lanes and warps together, two times instead of four.
    """
    mean, shift = tl.reduce((x, grad), 1, _add_pairs)
    centred = tl.where(exists, x - mean[:, None] / WIDTH, 0.0)
    square, stretch = tl.reduce((centred * centred, grad * centred), 1, _add_pairs)
    rstd = tl.rsqrt(square / WIDTH + eps)[:, None]
    unit = centred * rstd
    return unit, (grad - shift[:, None] / WIDTH - unit * (stretch[:, None] * rstd / WIDTH)) * rstd


# --- LayerNorm of x or of x + branch --------------------------------------------------------------


@triton.jit(do_not_specialize=_INTEGERS)
def _add_norm_forward(x, branch, branch_scale, weight, bias, stream, rounded, normed, means,
                      length, chunks, tiles, eps, X_ROW: tl.constexpr, BRANCH_ROW: tl.constexpr,
                      NORMED_ROW: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
                      MEAN_OF: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
                      STAGES: tl.constexpr, VECTOR: tl.constexpr):
    WIDTH: tl.constexpr = CHANNELS // GROUPS
    group, image, part, token, row = _locate(length, chunks, tiles, GROUPS, TOKENS)
    tokens = tl.arange(0, TOKENS)
    column = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    exists = column < WIDTH
    columns = group * WIDTH + column
    w = tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    if branch_scale is not None:
        factor = tl.load(branch_scale + image).to(tl.float32)
    if MEAN_OF:
        total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for _ in tl.range(tiles, num_stages=STAGES):
        inside = token + tokens < length
        mask = inside[:, None] & exists[None, :]
        s = _load(x, row, tokens, columns, mask, X_ROW)
        if branch is not None:
            added = _load(branch, row, tokens, columns, mask, BRANCH_ROW)
            if branch_scale is not None:
                added *= factor
            # rounded as stored: backward normalizes the stored stream again
            s = (s + added).to(stream.dtype.element_ty).to(tl.float32)
            _store(stream, row, tokens, columns, mask, s, CHANNELS)
            if rounded is not None:
                _store(rounded, row, tokens, columns, mask, s, CHANNELS)
        unit = _normalize(s, exists[None, :], eps, WIDTH)
        n = unit * w + b
        _store_padded(normed, row, tokens, columns, inside, exists, n, CHANNELS, NORMED_ROW,
                      GROUPS)
        if MEAN_OF == 1:
            total += s
        if MEAN_OF == 2:
            total += tl.where(mask, n, 0.0)
        token += TOKENS
        row += TOKENS
    if MEAN_OF:
        tl.store(means + part.to(tl.int64) * CHANNELS + columns, tl.sum(total, axis=0) / length,
                 mask=exists)


@triton.jit(do_not_specialize=_INTEGERS)
def _add_norm_backward(stream, branch_scale, weight, grad_stream, grad_rounded, grad_normed,
                       grad_mean, grad_x, grad_branch, partial, length, chunks, tiles, eps,
                       STREAM_ROW: tl.constexpr, GRAD_STREAM_ROW: tl.constexpr,
                       GRAD_ROUNDED_ROW: tl.constexpr, GRAD_NORMED_ROW: tl.constexpr,
                       X_ROW: tl.constexpr, BRANCH_ROW: tl.constexpr, CHANNELS: tl.constexpr,
                       GROUPS: tl.constexpr, MEAN_OF: tl.constexpr, SUM: tl.constexpr,
                       TOKENS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
                       VECTOR: tl.constexpr):
    ROWS: tl.constexpr = 3 if SUM else 2
    WIDTH: tl.constexpr = CHANNELS // GROUPS
    NORMED_USED: tl.constexpr = grad_normed is not None or (grad_mean is not None and MEAN_OF == 2)
    group, image, part, token, row = _locate(length, chunks, tiles, GROUPS, TOKENS)
    tokens = tl.arange(0, TOKENS)
    column = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    exists = column < WIDTH
    columns = group * WIDTH + column
    w = tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    if branch_scale is not None:
        factor = tl.load(branch_scale + image).to(tl.float32)
    if grad_mean is not None:
        from_mean = tl.load(grad_mean + image.to(tl.int64) * CHANNELS + columns, mask=exists,
                            other=0.0)[None, :] / length
    grad_weight = tl.zeros((TOKENS, BLOCK), tl.float32)
    grad_bias = tl.zeros((TOKENS, BLOCK), tl.float32)
    if SUM:
        total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for _ in tl.range(tiles, num_stages=STAGES):
        inside = token + tokens < length
        mask = inside[:, None] & exists[None, :]
        if NORMED_USED:
            s = _load(stream, row, tokens, columns, mask, STREAM_ROW)
            n = tl.zeros((TOKENS, BLOCK), tl.float32)
            if grad_normed is not None:
                n = _load(grad_normed, row, tokens, columns, mask, GRAD_NORMED_ROW)
        g = tl.zeros((TOKENS, BLOCK), tl.float32)
        if grad_stream is not None:
            g = _load(grad_stream, row, tokens, columns, mask, GRAD_STREAM_ROW)
        if grad_rounded is not None:
            g += _load(grad_rounded, row, tokens, columns, mask, GRAD_ROUNDED_ROW)
        if SUM:
            total += g
        if NORMED_USED:
            if grad_mean is not None and MEAN_OF == 2:
                n = tl.where(mask, n + from_mean, 0.0)
            unit, grad_s = _normalize_backward(s, n * w, exists[None, :], eps, WIDTH)
            grad_weight += n * unit
            grad_bias += n
            g += grad_s
        if grad_mean is not None and MEAN_OF == 1:
            g += from_mean
        _store_padded(grad_x, row, tokens, columns, inside, exists, g, CHANNELS, X_ROW, GROUPS)
        if grad_branch is not None:
            if branch_scale is not None:
                g *= factor
            _store_padded(grad_branch, row, tokens, columns, inside, exists, g, CHANNELS,
                          BRANCH_ROW, GROUPS)
        token += TOKENS
        row += TOKENS
    sums = partial + part.to(tl.int64) * (ROWS * CHANNELS) + columns
    tl.store(sums, tl.sum(grad_weight, axis=0), mask=exists)
    tl.store(sums + CHANNELS, tl.sum(grad_bias, axis=0), mask=exists)
    if SUM:
        tl.store(sums + 2 * CHANNELS, tl.sum(total, axis=0), mask=exists)


def _plan(x: Tensor, width: int, groups: int, backward: bool) -> Plan:
    """:func:`plan_launch` for tokens; where they have no data, as few programs as there can be."""
    if is_abstract(x):
        return Plan(1, 1, {})
    return plan_launch(x.shape[0], x.shape[1], width, groups, backward)


def add_norm_forward(x: Tensor, branch: Tensor | None, branch_scale: Tensor | None,
                     weight: Tensor, bias: Tensor, eps: float, groups: int, normed_width: int,
                     out_dtype: torch.dtype, mean_of: int,
                     stream_dtype: torch.dtype | None = None,
                     wants_rounded: bool = False) -> tuple[Tensor | None, ...]:
    """Residual stream x + branch * branch_scale, its LayerNorm, and a mean over the tokens.

    Args:
        x: Tokens (B, L, >=C).
        branch: Tokens (B, L, >=C) of any float precision, or None.
        branch_scale: Factor of each image's branch, (B,) in fp32, or None.
        weight, bias: (C,).
        eps: Added to the variance.
        groups: Number of groups of C / groups channels with statistics of their own.
        normed_width: Channels Cp >= C of the normed tokens, zero behind C.
        out_dtype: Precision of the normed tokens, that of the product behind.
        mean_of: 0 for no mean, 1 for that of the stream, 2 for that of the normed tokens.
        stream_dtype: Precision of the stream, that of ``x`` if not given.
        wants_rounded: Whether to return the stream once more, for a second use that needs no more
            than the precision of products.

    Returns:
        The stream (B, L, C), None without a branch; normed tokens (B, L, Cp); the mean (B, C) in
        fp32, or None; the stream in ``out_dtype``, or None.
    """
    batch, length, _ = x.shape
    channels = weight.shape[0]
    plan = _plan(x, channels // groups, groups, backward=False)
    stream = rounded = mean = parts = None
    if branch is not None:
        stream = torch.empty(batch, length, channels, dtype=stream_dtype or x.dtype,
                             device=x.device)
    if wants_rounded:
        rounded = torch.empty(batch, length, channels, dtype=out_dtype, device=x.device)
    normed = torch.empty(batch, length, normed_width, dtype=out_dtype, device=x.device)
    if mean_of:
        parts = mean = torch.empty(batch, channels, device=x.device, dtype=torch.float32)
        if plan.chunks > 1:
            parts = torch.empty(batch, plan.chunks, channels, device=x.device, dtype=torch.float32)
    x, x_row = rows_of(x)
    branch, branch_row = rows_of(branch)
    launch(_add_norm_forward, (batch * plan.chunks * groups, ), x, branch, branch_scale, weight,
           bias, stream, rounded, normed, parts, length, plan.chunks, plan.tiles, eps, X_ROW=x_row,
           BRANCH_ROW=branch_row, NORMED_ROW=normed_width, CHANNELS=channels, GROUPS=groups,
           MEAN_OF=mean_of, VECTOR=vector_of(channels, x, branch, normed), **plan.constants)
    if parts is not mean:
        sum_parts(parts, 1, out=mean)
    return stream, normed, mean, rounded


def add_norm_backward(stream: Tensor, branch_scale: Tensor | None, weight: Tensor,
                      grad_stream: Tensor | None, grad_rounded: Tensor | None,
                      grad_normed: Tensor | None, grad_mean: Tensor | None, eps: float,
                      groups: int, mean_of: int, x_width: int, branch_width: int,
                      branch_dtype: torch.dtype, wants_sum: bool = False,
                      sums: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Gradients of x, of the branch (None for ``branch_width`` 0), and (2, C) of weight, bias.

    Args:
        stream: x + branch as the forward pass returned it, or x.
        wants_sum: Whether for a third row, the sum of ``grad_stream`` over all tokens, which is the
            gradient of a bias that was added to the stream.
        sums: Where to write the rows, contiguous fp32; None for a new tensor.
    """
    batch, length, _ = stream.shape
    channels = weight.shape[0]
    plan = _plan(stream, channels // groups, groups, backward=True)
    grad_x = torch.empty(batch, length, x_width, dtype=stream.dtype, device=stream.device)
    grad_branch = None
    if branch_width:
        grad_branch = torch.empty(batch, length, branch_width, dtype=branch_dtype,
                                  device=stream.device)
    partial = torch.empty(batch * plan.chunks, 3 if wants_sum else 2, channels,
                          dtype=torch.float32, device=stream.device)
    stream, stream_row = rows_of(stream)
    grad_stream, grad_stream_row = rows_of(grad_stream)
    grad_rounded, grad_rounded_row = rows_of(grad_rounded)
    grad_normed, grad_normed_row = rows_of(grad_normed)
    launch(_add_norm_backward, (batch * plan.chunks * groups, ), stream, branch_scale, weight,
           grad_stream, grad_rounded, grad_normed, grad_mean, grad_x, grad_branch, partial, length,
           plan.chunks, plan.tiles, eps, STREAM_ROW=stream_row, GRAD_STREAM_ROW=grad_stream_row,
           GRAD_ROUNDED_ROW=grad_rounded_row, GRAD_NORMED_ROW=grad_normed_row, X_ROW=x_width,
           BRANCH_ROW=branch_width, CHANNELS=channels, GROUPS=groups, MEAN_OF=mean_of,
           SUM=wants_sum, VECTOR=vector_of(channels, stream, grad_normed, grad_branch),
           **plan.constants)
    return grad_x, grad_branch, sum_parts(partial, out=sums)


# --- LayerNorm of (y + residual) * multiplier * scale ---------------------------------------------


@triton.jit(do_not_specialize=_INTEGERS)
def _scaled_norm_forward(y, residual, multiplier, scale, weight, bias, normed, length, chunks,
                         tiles, eps, Y_ROW: tl.constexpr, RESIDUAL_ROW: tl.constexpr,
                         MULTIPLIER_ROW: tl.constexpr, NORMED_ROW: tl.constexpr,
                         CHANNELS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
                         STAGES: tl.constexpr, VECTOR: tl.constexpr):
    _, image, _, token, row = _locate(length, chunks, tiles, 1, TOKENS)
    tokens = tl.arange(0, TOKENS)
    columns = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    exists = columns < CHANNELS
    w = tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    c = tl.load(scale + image.to(tl.int64) * CHANNELS + columns, mask=exists,
                other=0.0).to(tl.float32)[None, :]
    for _ in tl.range(tiles, num_stages=STAGES):
        inside = token + tokens < length
        mask = inside[:, None] & exists[None, :]
        s = _load(y, row, tokens, columns, mask, Y_ROW)
        if residual is not None:
            s += _load(residual, row, tokens, columns, mask, RESIDUAL_ROW)
        if multiplier is not None:
            s *= _load(multiplier, row, tokens, columns, mask, MULTIPLIER_ROW)
        unit = _normalize(s * c, exists[None, :], eps, CHANNELS)
        _store_padded(normed, row, tokens, columns, inside, exists, unit * w + b, CHANNELS,
                      NORMED_ROW)
        token += TOKENS
        row += TOKENS


@triton.jit(do_not_specialize=_INTEGERS)
def _scaled_norm_backward(y, residual, multiplier, scale, weight, grad_normed, grad_y,
                          grad_residual, grad_multiplier, partial, partial_scale, length, chunks,
                          tiles, eps, Y_ROW: tl.constexpr, RESIDUAL_ROW: tl.constexpr,
                          MULTIPLIER_ROW: tl.constexpr, GRAD_NORMED_ROW: tl.constexpr,
                          GRAD_Y_ROW: tl.constexpr, GRAD_RESIDUAL_ROW: tl.constexpr,
                          GRAD_MULTIPLIER_ROW: tl.constexpr, CHANNELS: tl.constexpr,
                          TOKENS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
                          VECTOR: tl.constexpr):
    _, image, part, token, row = _locate(length, chunks, tiles, 1, TOKENS)
    tokens = tl.arange(0, TOKENS)
    columns = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    exists = columns < CHANNELS
    w = tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    c = tl.load(scale + image.to(tl.int64) * CHANNELS + columns, mask=exists,
                other=0.0).to(tl.float32)[None, :]
    grad_weight = tl.zeros((TOKENS, BLOCK), tl.float32)
    grad_bias = tl.zeros((TOKENS, BLOCK), tl.float32)
    grad_scale = tl.zeros((TOKENS, BLOCK), tl.float32)
    for _ in tl.range(tiles, num_stages=STAGES):
        inside = token + tokens < length
        mask = inside[:, None] & exists[None, :]
        s = _load(y, row, tokens, columns, mask, Y_ROW)
        n = _load(grad_normed, row, tokens, columns, mask, GRAD_NORMED_ROW)
        if residual is not None:
            s += _load(residual, row, tokens, columns, mask, RESIDUAL_ROW)
        product = s
        if multiplier is not None:
            m = _load(multiplier, row, tokens, columns, mask, MULTIPLIER_ROW)
            product = s * m
        unit, g = _normalize_backward(product * c, n * w, exists[None, :], eps, CHANNELS)
        grad_weight += n * unit
        grad_bias += n
        grad_scale += g * product
        g *= c
        if multiplier is not None:
            _store_padded(grad_multiplier, row, tokens, columns, inside, exists, g * s, CHANNELS,
                          GRAD_MULTIPLIER_ROW)
            g *= m
        _store_padded(grad_y, row, tokens, columns, inside, exists, g, CHANNELS, GRAD_Y_ROW)
        if residual is not None:
            _store_padded(grad_residual, row, tokens, columns, inside, exists, g, CHANNELS,
                          GRAD_RESIDUAL_ROW)
        token += TOKENS
        row += TOKENS
    sums = partial + part.to(tl.int64) * (2 * CHANNELS) + columns
    tl.store(sums, tl.sum(grad_weight, axis=0), mask=exists)
    tl.store(sums + CHANNELS, tl.sum(grad_bias, axis=0), mask=exists)
    tl.store(partial_scale + part.to(tl.int64) * CHANNELS + columns, tl.sum(grad_scale, axis=0),
             mask=exists)


def scaled_norm_forward(y: Tensor, residual: Tensor | None, multiplier: Tensor | None,
                        scale: Tensor, weight: Tensor, bias: Tensor, eps: float,
                        normed_width: int, out_dtype: torch.dtype) -> Tensor:
    """LayerNorm of (y + residual) * multiplier * scale.

    Args:
        y: Tokens (B, L, >=C).
        residual, multiplier: Tokens (B, L, >=C), or None.
        scale: A factor for each image and channel, (B, C) in fp32, contiguous.
        weight, bias: (C,).
        eps: Added to the variance.
        normed_width: Channels Cp of the output.
        out_dtype: Its precision.

    Returns:
        (B, L, Cp), zero behind C.
    """
    batch, length, _ = y.shape
    channels = weight.shape[0]
    plan = _plan(y, channels, 1, backward=False)
    normed = torch.empty(batch, length, normed_width, dtype=out_dtype, device=y.device)
    y, y_row = rows_of(y)
    residual, residual_row = rows_of(residual)
    multiplier, multiplier_row = rows_of(multiplier)
    launch(_scaled_norm_forward, (batch * plan.chunks, ), y, residual, multiplier, scale, weight,
           bias, normed, length, plan.chunks, plan.tiles, eps, Y_ROW=y_row,
           RESIDUAL_ROW=residual_row, MULTIPLIER_ROW=multiplier_row, NORMED_ROW=normed_width,
           CHANNELS=channels, VECTOR=vector_of(channels, y, residual, multiplier, normed),
           **plan.constants)
    return normed


def scaled_norm_backward(y: Tensor, residual: Tensor | None, multiplier: Tensor | None,
                         scale: Tensor, weight: Tensor, grad_normed: Tensor, eps: float,
                         sums: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Gradients of y, residual, multiplier (None where absent), scale; (2, C) of weight, bias.

    Args:
        sums: Where to write the last, contiguous fp32; None for a new tensor.
    """
    batch, length, _ = y.shape
    channels = weight.shape[0]
    plan = _plan(y, channels, 1, backward=True)
    grads = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
             for t in (y, residual, multiplier)]
    grad_rows = [0 if g is None else g.shape[2] for g in grads]
    partial = torch.empty(batch * plan.chunks, 2, channels, dtype=torch.float32, device=y.device)
    partial_scale = torch.empty(batch, plan.chunks, channels, dtype=torch.float32,
                                device=y.device)
    y, y_row = rows_of(y)
    residual, residual_row = rows_of(residual)
    multiplier, multiplier_row = rows_of(multiplier)
    grad_normed, grad_normed_row = rows_of(grad_normed)
    launch(_scaled_norm_backward, (batch * plan.chunks, ), y, residual, multiplier, scale, weight,
           grad_normed, *grads, partial, partial_scale, length, plan.chunks, plan.tiles, eps,
           Y_ROW=y_row, RESIDUAL_ROW=residual_row, MULTIPLIER_ROW=multiplier_row,
           GRAD_NORMED_ROW=grad_normed_row, GRAD_Y_ROW=grad_rows[0],
           GRAD_RESIDUAL_ROW=grad_rows[1], GRAD_MULTIPLIER_ROW=grad_rows[2], CHANNELS=channels,
           VECTOR=vector_of(channels, y, residual, multiplier, grad_normed), **plan.constants)
    grad_scale = partial_scale[:, 0] if plan.chunks == 1 else sum_parts(partial_scale, 1)
    return (*grads, grad_scale, sum_parts(partial, out=sums))


# --- channel affinity -----------------------------------------------------------------------------


@triton.jit
def _affinity_hidden(mean, fc1_weight, fc1_bias, start, columns, exists, CHANNELS: tl.constexpr,
                     HIDDEN: tl.constexpr, ROWS: tl.constexpr):
    """Hidden units from ``start`` on after their ReLU, their weights, their numbers, a mask."""
    rows = start + tl.arange(0, ROWS)
    real = rows < HIDDEN
    weights = tl.load(fc1_weight + rows[:, None] * CHANNELS + columns[None, :],
                      mask=real[:, None] & exists[None, :], other=0.0).to(tl.float32)
    hidden = tl.sum(weights * mean[None, :], axis=1)
    hidden += tl.load(fc1_bias + rows, mask=real, other=0.0).to(tl.float32)
    return tl.maximum(hidden, 0.0), weights, rows, real


@triton.jit
def _affinity_columns(fc2_weight, rows, real, columns, exists, HIDDEN: tl.constexpr):
    """The second layer's weights of these channels and hidden units."""
    return tl.load(fc2_weight + columns[:, None] * HIDDEN + rows[None, :],
                   mask=exists[:, None] & real[None, :], other=0.0).to(tl.float32)


@triton.jit
def _affinity_forward(mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias, skip_scale, out,
                      CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
                      ROWS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * CHANNELS
    columns = tl.arange(0, BLOCK)
    exists = columns < CHANNELS
    x = tl.load(mean + first + columns, mask=exists, other=0.0)
    logit = tl.load(fc2_bias + columns, mask=exists, other=0.0).to(tl.float32)
    for start in range(0, HIDDEN, ROWS):
        hidden, _, rows, real = _affinity_hidden(x, fc1_weight, fc1_bias, start, columns, exists,
                                                 CHANNELS, HIDDEN, ROWS)
        weights = _affinity_columns(fc2_weight, rows, real, columns, exists, HIDDEN)
        logit += tl.sum(weights * hidden[None, :], axis=1)
    gate = tl.sigmoid(logit)
    if skip_scale is not None:
        gate *= tl.load(skip_scale).to(tl.float32)
    tl.store(out + first + columns, gate, mask=exists)


@triton.jit
def _affinity_backward(mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias, skip_scale, grad, units,
                       grad_units, grad_logits, grad_mean, grad_skip, CHANNELS: tl.constexpr,
                       HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    first = image * CHANNELS
    columns = tl.arange(0, BLOCK)
    exists = columns < CHANNELS
    x = tl.load(mean + first + columns, mask=exists, other=0.0)
    logit = tl.load(fc2_bias + columns, mask=exists, other=0.0).to(tl.float32)
    for start in range(0, HIDDEN, ROWS):
        hidden, _, rows, real = _affinity_hidden(x, fc1_weight, fc1_bias, start, columns, exists,
                                                 CHANNELS, HIDDEN, ROWS)
        weights = _affinity_columns(fc2_weight, rows, real, columns, exists, HIDDEN)
        logit += tl.sum(weights * hidden[None, :], axis=1)
        tl.store(units + image * HIDDEN + rows, hidden, mask=real)
    gate = tl.sigmoid(logit)
    g = tl.load(grad + first + columns, mask=exists, other=0.0)
    if skip_scale is not None:
        tl.store(grad_skip + image, tl.sum(g * gate))
        g *= tl.load(skip_scale).to(tl.float32)
    g *= gate * (1 - gate)
    tl.store(grad_logits + first + columns, g, mask=exists)
    grad_x = tl.zeros((BLOCK, ), tl.float32)
    for start in range(0, HIDDEN, ROWS):
        # the same sums again, because the tile of weights is needed anyway
        hidden, weights, rows, real = _affinity_hidden(x, fc1_weight, fc1_bias, start, columns,
                                                       exists, CHANNELS, HIDDEN, ROWS)
        back = _affinity_columns(fc2_weight, rows, real, columns, exists, HIDDEN)
        u = tl.where(hidden > 0, tl.sum(back * g[:, None], axis=0), 0.0)
        tl.store(grad_units + image * HIDDEN + rows, u, mask=real)
        grad_x += tl.sum(weights * u[:, None], axis=0)
    tl.store(grad_mean + first + columns, grad_x, mask=exists)


@triton.jit(do_not_specialize=['batch'])
def _affinity_weights(mean, units, grad_units, grad_logits, grad_skip, fc1_weight, fc1_bias,
                      fc2_weight, fc2_bias, skip_scale, batch, CHANNELS: tl.constexpr,
                      HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
                      IMAGES: tl.constexpr):
    """The parameters' gradients, sums over the images: of these channels and hidden units."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns < CHANNELS
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = rows < HIDDEN
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    first_bias = tl.zeros((IMAGES, ROWS), tl.float32)
    second_bias = tl.zeros((IMAGES, COLUMNS), tl.float32)
    skip = tl.zeros((IMAGES, ), tl.float32)
    for start in range(0, batch, IMAGES):
        images = start + tl.arange(0, IMAGES)
        inside = images < batch
        if skip_scale is not None:
            skip += tl.load(grad_skip + images, mask=inside, other=0.0)
        at_columns = images[:, None] * CHANNELS + columns[None, :]
        column_mask = inside[:, None] & exists[None, :]
        x = tl.load(mean + at_columns, mask=column_mask, other=0.0)
        grad = tl.load(grad_logits + at_columns, mask=column_mask, other=0.0)
        at_rows = images[:, None] * HIDDEN + rows[None, :]
        row_mask = inside[:, None] & real[None, :]
        hidden = tl.load(units + at_rows, mask=row_mask, other=0.0)
        grad_hidden = tl.load(grad_units + at_rows, mask=row_mask, other=0.0)
        first = tl.dot(tl.trans(grad_hidden), x, first, input_precision='ieee')
        second = tl.dot(tl.trans(hidden), grad, second, input_precision='ieee')
        first_bias += grad_hidden
        second_bias += grad
    mask = real[:, None] & exists[None, :]
    tl.store(fc1_weight + rows[:, None] * CHANNELS + columns[None, :], first, mask=mask)
    tl.store(fc2_weight + columns[None, :] * HIDDEN + rows[:, None], second, mask=mask)
    # what does not depend on the channels, or on the hidden units, is one program's to write
    tl.store(fc1_bias + rows, tl.sum(first_bias, axis=0), mask=real & (tl.program_id(0) == 0))
    tl.store(fc2_bias + columns, tl.sum(second_bias, axis=0),
             mask=exists & (tl.program_id(1) == 0))
    if skip_scale is not None:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(skip_scale, tl.sum(skip, axis=0))


def affinity_forward(mean: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor,
                     fc2_bias: Tensor, skip_scale: Tensor | None) -> Tensor:
    """sigmoid(fc2(relu(fc1(mean)))) * skip_scale: Eq. 7-8, and the released model's skip.

    Args:
        mean: Mean over the tokens, (B, C) in fp32.
        fc1_weight, fc1_bias: The squeeze, (Hd, C) and (Hd,).
        fc2_weight, fc2_bias: The excitation, (C, Hd) and (C,).
        skip_scale: One factor for all, (1,), or None.

    Returns:
        (B, C) in fp32; one program makes an image's.
    """
    hidden, channels = fc1_weight.shape
    out = torch.empty(mean.shape, dtype=torch.float32, device=mean.device)
    launch(_affinity_forward, (mean.shape[0], ), mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
           skip_scale, out, CHANNELS=channels, HIDDEN=hidden, **_affinity_tile(hidden, channels))
    return out


def affinity_backward(mean: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor,
                      fc2_bias: Tensor, skip_scale: Tensor | None, grad: Tensor,
                      grads: Sequence[Tensor | None]) -> Tensor:
    """Gradients of :func:`affinity_forward`.

    Args:
        mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias, skip_scale: Its arguments.
        grad: Gradient of its output, (B, C) in fp32, contiguous.
        grads: Where to write the parameters' gradients, in their order and shapes.

    Returns:
        The gradient of ``mean``.
    """
    hidden, channels = fc1_weight.shape
    batch = mean.shape[0]

    def empty(*shape):
        return torch.empty(*shape, dtype=torch.float32, device=mean.device)

    units, grad_units = empty(2, batch, hidden).unbind(0)
    grad_logits, grad_mean = empty(2, batch, channels).unbind(0)
    grad_skip = None if skip_scale is None else empty(batch)
    launch(_affinity_backward, (batch, ), mean, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
           skip_scale, grad, units, grad_units, grad_logits, grad_mean, grad_skip,
           CHANNELS=channels, HIDDEN=hidden, **_affinity_tile(hidden, channels))
    launch(_affinity_weights, (cdiv(channels, 32), cdiv(hidden, 16)), mean, units, grad_units,
           grad_logits, grad_skip, *grads, batch, CHANNELS=channels, HIDDEN=hidden, COLUMNS=32,
           ROWS=16, IMAGES=32, num_warps=4)
    return grad_mean


def _affinity_tile(hidden: int, channels: int) -> dict:
    # At most 64 weights for each thread; 16 hidden units fill the sectors of fc2's rows.
    block = next_power_of_2(channels)
    return dict(BLOCK=block, ROWS=min(16, next_power_of_2(hidden)),
                num_warps=8 if block > 256 else 4)


# --- layouts --------------------------------------------------------------------------------------


def vector_of(channels: int, *tensors: Tensor | None) -> int:
    """Neighbouring channels of a thread in all tensors: 16 bytes of the widest precision, or 8.

    Left to itself, Triton gives a thread eight channels of a 16-bit tensor and four of an fp32
    one, or of any where eight do not divide the channels, and exchanges the values of every tile
    through shared memory between the two.
    """
    widest = max(tensor.element_size() for tensor in tensors if tensor is not None)
    return 4 if widest > 2 or channels % 8 else 8
