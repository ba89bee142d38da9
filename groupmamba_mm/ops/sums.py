"""Sums in Triton that always run in the same order: partial sums of programs, columns of tokens.

torch.sum takes a kernel and a memset for each, and a cast behind it; a training step has hundreds.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .integers import cdiv
from .launch import is_abstract, launch, rows_of
from .tracing import noted

#: Rows and columns of a tile of partial sums: few columns, so that a narrow sum is not left to one
#: program, and more, with as many values in all, where enough programs remain.
_ROWS, _COLUMNS, _MOST_COLUMNS, _FEW_ROWS = 256, 16, 128, 16
#: Tokens and channels of a tile, and programs wanted: four for each multiprocessor of an H100.
_TOKENS, _CHANNELS, _PROGRAMS = 32, 64, 528


@triton.jit(do_not_specialize=['count', 'width'])
def _sum_parts(parts, out, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(count, width) to (width,) for each of the programs' first index."""
    image = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    exists = column < width
    at = parts + image * count * width + row[:, None].to(tl.int64) * width + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, count, ROWS):
        total += tl.load(at, mask=(first + row < count)[:, None] & exists[None, :], other=0.0)
        at += ROWS * width
    tl.store(out + image * width + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=exists)


def sum_parts(
    parts: Tensor, dim: int = 0, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Add up partial sums.

    Args:
        parts: Contiguous, fp32.
        dim: What is added up; each index of the dimensions before has a sum of its own.
        dtype: Of the result, fp32 by default.
        out: Where to write it, contiguous; None for a new tensor.

    Returns:
        The shape of ``parts`` without ``dim``.
    """
    shape = parts.shape
    if out is None:
        out = torch.empty(
            shape[:dim] + shape[dim + 1 :], dtype=dtype or parts.dtype, device=parts.device
        )
    if is_abstract(parts):
        return out
    batch, width = shape[:dim].numel(), shape[dim + 1 :].numel()
    if batch * width:
        grid, constants = _plan_parts(batch, shape[dim], width)
        for one in _ALL_PLANS if noted() is not None else (constants,):
            launch(_sum_parts, grid, parts, out, shape[dim], width, **one)
    return out


@functools.lru_cache(maxsize=4096)
def _plan_parts(batch: int, count: int, width: int) -> tuple[tuple[int, int], dict]:
    columns = _COLUMNS
    while columns < _MOST_COLUMNS and batch * width >= 2 * columns * _PROGRAMS:
        columns *= 2
    return (batch, cdiv(width, columns)), _plan_tile(columns, count <= _FEW_ROWS)


def _plan_tile(columns: int, is_short: bool) -> dict:
    # all rows that there can be, or few: more sizes would compile anew as image sizes change
    rows = _FEW_ROWS if is_short else _ROWS * _COLUMNS // columns
    return dict(ROWS=rows, COLUMNS=columns, num_warps=1 if rows == _FEW_ROWS else 8)


#: For images and batches of any size: what is compiled ahead.
_ALL_PLANS = tuple(
    _plan_tile(columns, is_short)
    for columns in (16, 32, 64, _MOST_COLUMNS)
    for is_short in (True, False)
)


@triton.jit(do_not_specialize=['tokens', 'tiles'])
def _column_sums(
    x,
    partial,
    tokens,
    tiles,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    T: tl.constexpr,
    BC: tl.constexpr,
):
    """This program's share of the sum over the tokens of (tokens, CHANNELS)."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    exists = channel < CHANNELS
    first = tl.program_id(1).to(tl.int64) * tiles * T
    total = tl.zeros([T, BC], tl.float32)
    for tile in range(tiles):
        token = first + tile * T + tl.arange(0, T)
        mask = (token < tokens)[:, None] & exists[None, :]
        total += tl.load(x + token[:, None] * ROW + channel[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(
        partial + tl.program_id(1).to(tl.int64) * CHANNELS + channel, tl.sum(total, 0), mask=exists
    )


def column_sums(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Sum over the tokens of (B, L, C), the gradient of a bias.

    Args:
        x: Rows at an even distance are read as they lie.
        out: Where to write it, fp32; None for a new tensor.

    Returns:
        (C,) in fp32.
    """
    batch, length, channels = x.shape
    if is_abstract(x):
        return torch.empty(channels, dtype=torch.float32, device=x.device) if out is None else out
    x, row = rows_of(x)
    tokens = batch * length
    blocks = cdiv(channels, _CHANNELS)
    tiles = max(1, cdiv(tokens * blocks, _PROGRAMS * _TOKENS))
    programs = cdiv(tokens, tiles * _TOKENS)
    partial = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    if tokens:
        launch(
            _column_sums,
            (blocks, programs),
            x,
            partial,
            tokens,
            tiles,
            ROW=row,
            CHANNELS=channels,
            T=_TOKENS,
            BC=_CHANNELS,
            num_warps=4,
        )
    return sum_parts(partial, out=out)
