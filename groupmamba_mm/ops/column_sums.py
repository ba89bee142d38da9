"""Sums of columns in Triton: the gradients of biases."""
import torch
import triton
import triton.language as tl
from torch import Tensor

#: Tokens and channels of a tile, and programs wanted: four for each multiprocessor of an H100.
_TOKENS, _CHANNELS, _PROGRAMS = 32, 64, 528


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


def column_sums(x: Tensor) -> Tensor:
    """Sum over the rows of (M, C), rows at any even distance: (C,) in fp32, in a fixed order."""
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, channels = x.shape
    blocks = triton.cdiv(channels, _CHANNELS)
    tiles = max(1, triton.cdiv(tokens * blocks, _PROGRAMS * _TOKENS))
    programs = triton.cdiv(tokens, tiles * _TOKENS)
    partial = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    if tokens:
        with torch.cuda.device_of(x):
            _column_sums[blocks, programs](x, partial, tokens, tiles, x.stride(0), channels,
                                           T=_TOKENS, BC=_CHANNELS, num_warps=4)
    return partial.sum(0)
