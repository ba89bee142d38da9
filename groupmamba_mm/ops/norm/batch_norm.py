"""BatchNorm and ReLU of the stem in kernels, forward and backward, and their launchers.

A tensor is rows of channels, (B * H * W, C): an image in the channels-last layout. A program owns a
run of rows. Its statistics go through Welford's recurrence in each element of its tile, so that a
mean far from zero costs no digits, and are merged with those of the other programs in a fixed
order: results are bitwise repeatable. All arithmetic is fp32.

The backward pass reads the input once more and recomputes what it needs from it: nothing else is
kept, and ReLU's mask is the sign of the recomputed value.
"""
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..integers import cdiv, next_power_of_2
from ..launch import launch
from ..sums import sum_parts
from .kernels import vector_of

#: Values of a tile, and programs wanted: eight for each multiprocessor of an H100.
_VALUES, _PROGRAMS = 4096, 1056
#: Programs whose statistics one step of the merging program reads.
_MERGED = 64
_INTEGERS = ['rows', 'tiles']


@functools.cache
def _plan(rows: int, channels: int) -> tuple[int, int, dict]:
    """Tiles of a program, programs, and what kernels must know when they are compiled."""
    block = next_power_of_2(channels)
    height = max(1, _VALUES // block)
    tiles = max(1, cdiv(rows, height * _PROGRAMS))
    return tiles, cdiv(rows, height * tiles), dict(ROWS=height, BLOCK=block, num_warps=4)


@triton.jit
def _place(tiles, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """First row of this program, offsets of a tile, and its channels with which of them exist."""
    first = tl.program_id(0).to(tl.int64) * tiles * ROWS
    row = tl.arange(0, ROWS)
    column = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    return first, row, row[:, None] * C + column[None, :], column, column < C


@triton.jit(do_not_specialize=_INTEGERS)
def _statistics(x, means, squares, rows, tiles, C: tl.constexpr, ROWS: tl.constexpr,
                BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Mean, and sum of squares around it, of this program's rows."""
    first, row, offsets, column, exists = _place(tiles, C, ROWS, BLOCK, VECTOR)
    count = tl.zeros([ROWS, 1], tl.float32)
    mean = tl.zeros([ROWS, BLOCK], tl.float32)
    square = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tiles):
        start = first + tile * ROWS
        inside = (start + row < rows)[:, None]
        value = tl.load(x + start * C + offsets, mask=inside & exists[None, :],
                        other=0.0).to(tl.float32)
        count += tl.where(inside, 1.0, 0.0)
        step = tl.where(inside, value - mean, 0.0)
        mean += step / tl.maximum(count, 1.0)
        square += step * (value - mean)
    total = tl.sum(tl.sum(count, 1), 0)
    merged = tl.sum(count * mean, 0) / total
    apart = mean - merged[None, :]
    of_program = tl.sum(square + count * apart * apart, 0)
    at = tl.program_id(0) * C + column
    tl.store(means + at, merged, mask=exists)
    tl.store(squares + at, of_program, mask=exists)


@triton.jit(do_not_specialize=['rows', 'of_program', 'programs'])
def _merge(means, squares, mean, rstd, running_mean, running_var, rows, of_program, programs, eps,
           momentum, C: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Statistics of all rows from those of the programs, and the running averages."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = column < C
    part = tl.arange(0, PARTS)
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, programs, PARTS):
        at = (start + part)[:, None] * C + column[None, :]
        there = (start + part < programs)[:, None] & exists[None, :]
        count = tl.minimum(rows - (start + part).to(tl.int64) * of_program, of_program)
        total += count[:, None] * tl.load(means + at, mask=there, other=0.0)
    average = tl.sum(total, 0) / rows
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, programs, PARTS):
        at = (start + part)[:, None] * C + column[None, :]
        there = (start + part < programs)[:, None] & exists[None, :]
        count = tl.minimum(rows - (start + part).to(tl.int64) * of_program, of_program)
        apart = tl.load(means + at, mask=there, other=0.0) - average[None, :]
        spread = tl.load(squares + at, mask=there, other=0.0) + count[:, None] * apart * apart
        total += tl.where(there, spread, 0.0)
    square = tl.sum(total, 0)
    tl.store(mean + column, average, mask=exists)
    tl.store(rstd + column, tl.rsqrt(square / rows + eps), mask=exists)
    if running_mean is not None:
        old = tl.load(running_mean + column, mask=exists, other=0.0)
        tl.store(running_mean + column, old + momentum * (average - old), mask=exists)
        old = tl.load(running_var + column, mask=exists, other=0.0)
        unbiased = square / tl.maximum(rows - 1, 1)
        tl.store(running_var + column, old + momentum * (unbiased - old), mask=exists)


@triton.jit
def _of_channels(mean, rstd, weight, bias, column, exists):
    m = tl.load(mean + column, mask=exists, other=0.0)[None, :]
    r = tl.load(rstd + column, mask=exists, other=0.0)[None, :]
    w = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    return m, r, w, b


@triton.jit(do_not_specialize=_INTEGERS)
def _apply(x, mean, rstd, weight, bias, y, rows, tiles, C: tl.constexpr, ROWS: tl.constexpr,
           BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    first, row, offsets, column, exists = _place(tiles, C, ROWS, BLOCK, VECTOR)
    m, r, w, b = _of_channels(mean, rstd, weight, bias, column, exists)
    for tile in range(tiles):
        start = first + tile * ROWS
        mask = (start + row < rows)[:, None] & exists[None, :]
        value = tl.load(x + start * C + offsets, mask=mask, other=0.0).to(tl.float32)
        value = (value - m) * r * w + b
        # what is no number stays none
        value = tl.where(value <= 0, 0.0, value)
        tl.store(y + start * C + offsets, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _unit_and_gradient(x, dy, mask, m, r, w, b):
    """Values with mean 0 and variance 1, and the gradient of the BatchNorm before ReLU."""
    unit = (tl.load(x, mask=mask, other=0.0).to(tl.float32) - m) * r
    grad = tl.load(dy, mask=mask, other=0.0).to(tl.float32)
    return unit, tl.where(unit * w + b <= 0, 0.0, grad)


@triton.jit(do_not_specialize=_INTEGERS)
def _gradient_sums(x, dy, mean, rstd, weight, bias, partial, rows, tiles, C: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """This program's share of the gradients of weight and bias."""
    first, row, offsets, column, exists = _place(tiles, C, ROWS, BLOCK, VECTOR)
    m, r, w, b = _of_channels(mean, rstd, weight, bias, column, exists)
    of_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    of_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tiles):
        start = first + tile * ROWS
        mask = (start + row < rows)[:, None] & exists[None, :]
        unit, grad = _unit_and_gradient(x + start * C + offsets, dy + start * C + offsets, mask,
                                        m, r, w, b)
        of_weight += grad * unit
        of_bias += grad
    at = partial + tl.program_id(0) * (2 * C) + column
    tl.store(at, tl.sum(of_weight, 0), mask=exists)
    tl.store(at + C, tl.sum(of_bias, 0), mask=exists)


@triton.jit(do_not_specialize=_INTEGERS)
def _input_gradient(x, dy, mean, rstd, weight, bias, sums, dx, rows, tiles, C: tl.constexpr,
                    OF_BATCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                    VECTOR: tl.constexpr):
    first, row, offsets, column, exists = _place(tiles, C, ROWS, BLOCK, VECTOR)
    m, r, w, b = _of_channels(mean, rstd, weight, bias, column, exists)
    if OF_BATCH:
        stretch = tl.load(sums + column, mask=exists, other=0.0)[None, :] / rows
        shift = tl.load(sums + C + column, mask=exists, other=0.0)[None, :] / rows
    for tile in range(tiles):
        start = first + tile * ROWS
        mask = (start + row < rows)[:, None] & exists[None, :]
        unit, grad = _unit_and_gradient(x + start * C + offsets, dy + start * C + offsets, mask,
                                        m, r, w, b)
        if OF_BATCH:
            grad = grad - shift - unit * stretch
        tl.store(dx + start * C + offsets, (grad * (r * w)).to(dx.dtype.element_ty), mask=mask)


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor,
                    running_var: Tensor, of_batch: bool, momentum: float, eps: float) -> Tensor:
    """ReLU of the BatchNorm of an image, differentiable.

    Args:
        x: (B, C, H, W), any float precision.
        weight, bias: (C,).
        running_mean, running_var: (C,) in fp32; moved where the batch's statistics are taken.
        of_batch: Whether statistics are the batch's, else they are the running ones.
        momentum: Share of the batch in the running averages.
        eps: Added to the variance.

    Returns:
        (B, C, H, W) in the precision of ``x``, channels-last.
    """
    return _BatchNormReLU.apply(x, weight, bias, running_mean, running_var, of_batch, momentum, eps)


class _BatchNormReLU(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, of_batch, momentum, eps):
        x = x.contiguous(memory_format=torch.channels_last)
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        tiles, programs, constants = _plan(rows, channels)
        if of_batch:
            mean, rstd = torch.empty(2, channels, dtype=torch.float32, device=x.device).unbind()
            parts = torch.empty(2, programs, channels, dtype=torch.float32, device=x.device)
            launch(_statistics, (programs, ), x, *parts.unbind(), rows, tiles, C=channels,
                   VECTOR=vector_of(channels, x), **constants)
            block = min(16, next_power_of_2(channels))
            launch(_merge, (cdiv(channels, block), ), *parts.unbind(), mean, rstd, running_mean,
                   running_var, rows, tiles * constants['ROWS'], programs, eps, momentum,
                   C=channels, PARTS=_MERGED, BLOCK=block, num_warps=4)
        else:
            mean, rstd = running_mean, torch.rsqrt(running_var + eps)
        y = torch.empty_like(x)
        launch(_apply, (programs, ), x, mean, rstd, weight, bias, y, rows, tiles, C=channels,
               VECTOR=vector_of(channels, x), **constants)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.of_batch = of_batch
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        tiles, programs, constants = _plan(rows, channels)
        common = dict(constants, C=channels, VECTOR=vector_of(channels, x, dy))
        partial = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
        launch(_gradient_sums, (programs, ), x, dy, mean, rstd, weight, bias, partial, rows, tiles,
               **common)
        sums = sum_parts(partial)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            launch(_input_gradient, (programs, ), x, dy, mean, rstd, weight, bias, sums, dx, rows,
                   tiles, OF_BATCH=ctx.of_batch, **common)
        dweight, dbias = sums.to(weight.dtype).unbind()
        return (dx, dweight, dbias) + (None, ) * 5
