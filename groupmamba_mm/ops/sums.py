"""Sums in Triton that always run in the same order: partial sums of programs, columns of tokens.

torch.sum takes a kernel and a memset for each, and a cast behind it; a training step has hundreds.
"""
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .integers import cdiv, next_power_of_2

#: Rows and columns of a tile of partial sums: few columns, so that a narrow sum is not left to one
#: program, and more, with as many values in all, where enough programs remain.
_ROWS, _COLUMNS, _MOST_COLUMNS = 256, 16, 128
#: Tokens and channels of a tile, and programs wanted: four for each multiprocessor of an H100.
_TOKENS, _CHANNELS, _PROGRAMS = 32, 64, 528


@triton.jit(do_not_specialize=['count'])
def _sum_parts(parts, out, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(count, width) to (width,) for each of the programs' first index."""
    image = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    exists = column < width
    at = parts + image * count * width + row[:, None].to(tl.int64) * width + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, count, ROWS):
        total += tl.load(at, mask=(first + row < count)[:, None] & exists[None, :], other=0.)
        at += ROWS * width
    tl.store(out + image * width + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=exists)


def sum_parts(parts: Tensor, dim: int = 0, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Add up partial sums.

    Args:
        parts: Contiguous, fp32.
        dim: What is added up; each index of the dimensions before has a sum of its own.
        dtype: Of the result, fp32 by default.

    Returns:
        The shape of ``parts`` without ``dim``.
    """
    batch, width = parts.shape[:dim].numel(), parts.shape[dim + 1:].numel()
    out = torch.empty(parts.shape[:dim] + parts.shape[dim + 1:], dtype=dtype or parts.dtype,
                      device=parts.device)
    columns = _COLUMNS
    while columns < _MOST_COLUMNS and batch * width >= 2 * columns * _PROGRAMS:
        columns *= 2
    rows = min(_ROWS * _COLUMNS // columns, next_power_of_2(max(1, parts.shape[dim])))
    if out.numel():
        with torch.cuda.device_of(parts):
            _sum_parts[batch, cdiv(width, columns)](
                parts, out, parts.shape[dim], width, ROWS=rows, COLUMNS=columns,
                num_warps=8 if rows * columns == _ROWS * _COLUMNS else 1)
    return out


@triton.jit(do_not_specialize=['tokens', 'tiles'])
def _column_sums(x, partial, tokens, tiles, row, CHANNELS: tl.constexpr, T: tl.constexpr,
                 BC: tl.constexpr):
    """This program's share of the sum over the tokens of (tokens, CHANNELS)."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    exists = channel < CHANNELS
    first = tl.program_id(1).to(tl.int64) * tiles * T
    total = tl.zeros([T, BC], tl.float32)
    for tile in range(tiles):
        token = first + tile * T + tl.arange(0, T)
        mask = (token < tokens)[:, None] & exists[None, :]
        total += tl.load(x + token[:, None] * row + channel[None, :], mask=mask, other=0.).to(
            tl.float32)
    tl.store(partial + tl.program_id(1).to(tl.int64) * CHANNELS + channel, tl.sum(total, 0),
             mask=exists)


def column_sums(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum over the rows of (M, C), rows at any even distance: (C,), the gradient of a bias."""
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, channels = x.shape
    blocks = cdiv(channels, _CHANNELS)
    tiles = max(1, cdiv(tokens * blocks, _PROGRAMS * _TOKENS))
    programs = cdiv(tokens, tiles * _TOKENS)
    partial = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    if tokens:
        with torch.cuda.device_of(x):
            _column_sums[blocks, programs](x, partial, tokens, tiles, x.stride(0), channels,
                                           T=_TOKENS, BC=_CHANNELS, num_warps=4)
    return sum_parts(partial, dtype=dtype)
