"""Grouped 3x3 convolutions of inference in one kernel, for channels-last images.

cuDNN brings images into another layout and back around a grouped convolution in bf16, which takes
several times as long as the convolution. Here a program owns a run of pixels of one group and adds
up nine matrix products, one for each tap.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu import has_large_smem
from .integers import cdiv, next_power_of_2
from .kernel_functions import multiply
from .launch import INTERPRETED, launch

#: Pixels of a program; of the tiles tried on an H100 the fastest for groups of 112 channels.
_PIXELS, _MOST_INPUTS, _MOST_OUTPUTS = 128, 64, 128


@triton.jit(do_not_specialize=['H', 'W', 'out_h', 'out_w', 'pixels', 'stride'])
def _grouped_conv(x, weight, bias, y, H, W, out_h, out_w, pixels, stride, C_IN: tl.constexpr,
                  C_OUT: tl.constexpr, GROUPS: tl.constexpr, RELU: tl.constexpr,
                  IN_FP32: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr,
                  OUTPUTS: tl.constexpr):
    """C_IN, C_OUT: of a group. A tile of ROWS pixels takes INPUTS channels in, OUTPUTS out."""
    group = tl.program_id(1)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image, place = pixel // (out_h * out_w), pixel % (out_h * out_w)
    first_row, first_column = place // out_w * stride - 1, place % out_w * stride - 1
    first_pixel = image.to(tl.int64) * H * W
    out = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    steps: tl.constexpr = (C_IN + INPUTS - 1) // INPUTS
    for step in range(9 * steps):
        tap = step // steps
        row, column = first_row + tap // 3, first_column + tap % 3
        channel = step % steps * INPUTS + tl.arange(0, INPUTS)
        inside = (pixel < pixels) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        start = (first_pixel + row * W + column) * (GROUPS * C_IN) + group * C_IN
        exists = channel < C_IN
        tile = tl.load(x + start[:, None] + channel[None, :],
                       mask=inside[:, None] & exists[None, :], other=0.0)
        at = ((group * 9 + tap) * C_IN + channel) * C_OUT
        factors = tl.load(weight + at[:, None] + out[None, :],
                          mask=exists[:, None] & (out < C_OUT)[None, :], other=0.0)
        total = multiply(tile, factors, total, IN_FP32)
    total += tl.load(bias + group * C_OUT + out, mask=out < C_OUT, other=0.0).to(tl.float32)
    if RELU:
        total = tl.where(total <= 0, 0.0, total)  # NaN stays
    start = pixel.to(tl.int64) * (GROUPS * C_OUT) + group * C_OUT
    tl.store(y + start[:, None] + out[None, :], total.to(y.dtype.element_ty),
             mask=(pixel < pixels)[:, None] & (out < C_OUT)[None, :])


def packed_weight(weight: Tensor, groups: int) -> Tensor:
    """A convolution's weight as :func:`grouped_conv` reads it.

    Args:
        weight: (C_out, C_in / groups, 3, 3).
        groups: Number of groups.

    Returns:
        (groups, 9 * C_in / groups, C_out / groups).
    """
    taps = weight.unflatten(0, (groups, -1)).flatten(3).permute(0, 3, 2, 1)
    return taps.flatten(1, 2).contiguous()


def grouped_conv(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, relu: bool = False
) -> Tensor:
    """Grouped 3x3 convolution with one pixel of zeros around, without gradient.

    Args:
        x: (B, C_in, H, W) in fp16 or bf16.
        weight: From :func:`packed_weight`, in the precision of ``x``.
        bias: (C_out, ).
        stride: Along both axes.
        relu: Whether ReLU follows.

    Returns:
        (B, C_out, H', W'), channels-last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    groups, rows, c_out = weight.shape
    c_in = rows // 9
    batch, _, height, width = x.shape
    out_h, out_w = (height - 1) // stride + 1, (width - 1) // stride + 1
    y = x.new_empty(batch, out_h, out_w, groups * c_out).permute(0, 3, 1, 2)
    pixels = batch * out_h * out_w
    inputs, outputs = (
        min(most, max(16, next_power_of_2(channels)))
        for most, channels in ((_MOST_INPUTS, c_in), (_MOST_OUTPUTS, c_out))
    )
    grid = cdiv(pixels, _PIXELS), groups, cdiv(c_out, outputs)
    launch(_grouped_conv, grid, x, weight, bias, y, height, width, out_h, out_w, pixels, stride,
           C_IN=c_in, C_OUT=c_out, GROUPS=groups, RELU=relu, IN_FP32=INTERPRETED, ROWS=_PIXELS,
           INPUTS=inputs, OUTPUTS=outputs, num_warps=8, num_stages=3 if has_large_smem(x.device) else 2)
    return y
