"""Triton kernels of the depthwise convolutions: on the grid (3x3), and causal along a scan.

All tensors are channels-last tokens, (B, L, C'), read once from memory and written once. A program
owns a block of channels. Arithmetic is in fp32.

On the grid a program owns a strip of columns and walks down the rows of one image or of several, so
that what neighbouring taps share comes out of registers and the L1 cache. A thread owns all columns
of its strip, each a tensor of channels in a tuple: a value is then loaded and converted once for
the three columns that see it, the taps are held once for the whole strip, and sums over tokens stay
within a thread.

Along a scan a thread walks over a segment of it, with the last few tokens in registers, whatever
the direction.

A backward pass is one kernel. It computes the convolution again and turns the gradient ``dy`` of
the activation's output into ``dp``, that of its input, which is never stored: the gradients of the
input follow a row, or a few tokens, behind.

Sums over tokens are partial sums, one of each program, added afterwards in a fixed order: the same
input gives the same bits.

Channels may be padded in groups: C' = G * wp channels hold G groups of d <= wp true ones, and the
weight and bias have the G * d true ones only. What is in the padded lanes of an input does not
matter, those of an output are zeros.

Values are handed from name to name as a loop goes on (``above = here``). The names have to begin
with values of their own: Triton 3.6 takes a name for unchanged in a loop if what it holds after the
first pass is what it began with, be it by way of another name. The interpreter does not.
"""
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..integers import cdiv, round_up
from ..kernel_functions import activate, direction_of, scan_position
from ..launch import is_abstract, launch, rows_of
from ..tracing import noted

#: Programs wanted at least: fewer are split by rows, many more are merged over images. 32 for each
#: of an H100's 132 multiprocessors; a constant, so that sums do not depend on the GPU. On the grid
#: half as many warps are what runs at once, a quarter in the backward pass.
PROGRAMS = 4224
#: Rows that a program keeps when an image is split; the halo rows are read twice.
MIN_ROWS = 8
#: Tokens that a thread walks along a scan at most, forward half of it. At least it is the number
#: above, too.
MAX_STEPS = 64
_WALK_WARPS = 4

# No integer is specialised: a new image size never compiles anew. Distances of tokens in memory,
# which a layer fixes, are constants, so that loads are known to be aligned.
_CAUSAL_INTEGERS = ['batch', 'height', 'width', 'steps', 'directions']
_GRID_INTEGERS = ['batch', 'height', 'width', 'rows', 'images']


@triton.jit
def _place(batch, height, width, rows, images, BLOCKS: tl.constexpr, TW: tl.constexpr):
    """What this program owns: channel block, columns, rows and images; and its place among those
    of the same channel block.
    """
    program = tl.program_id(0)
    place = program // BLOCKS
    strips = tl.cdiv(width, TW)
    row_blocks = tl.cdiv(height, rows)
    rest = place // strips
    first_row = (rest % row_blocks) * rows
    first_image = (rest // row_blocks) * images
    return (program % BLOCKS, place, (place % strips) * TW, first_row,
            tl.minimum(first_row + rows, height), first_image,
            tl.minimum(first_image + images, batch))


@triton.jit
def _channels(block, LANES: tl.constexpr, TRUE: tl.constexpr, BC: tl.constexpr):
    """Group, channel of the tokens, whether it exists, true channel, whether that exists."""
    BLOCKS: tl.constexpr = (LANES + BC - 1) // BC  # of a group
    group = block // BLOCKS
    lane = (block % BLOCKS) * BC + tl.arange(0, BC)
    return group, group * LANES + lane, lane < LANES, group * TRUE + lane, lane < TRUE


@triton.jit
def _load_tap(weight, k, COUNT: tl.constexpr, channel, exists):
    """Row ``k`` of a (K, COUNT) weight, (1, BC) in fp32."""
    return tl.load(weight + k * COUNT + channel, mask=exists, other=0.).to(tl.float32)[None, :]


@triton.jit
def _grid_channels(block, GROUPS: tl.constexpr, LANES: tl.constexpr, TRUE: tl.constexpr,
                   BC: tl.constexpr):
    """Channel of the tokens, whether it exists, true channel, whether that exists.

    Blocks run across groups: the taps are the only thing that a group's place decides.
    """
    channel = block * BC + tl.arange(0, BC)
    if GROUPS * LANES % BC == 0:
        exists = tl.full([BC], True, tl.int1)  # known when compiled: masks of columns vanish
    else:
        exists = channel < GROUPS * LANES
    lane = channel % LANES
    return channel, exists, channel // LANES * TRUE + lane, exists & (lane < TRUE)


@triton.jit
def _load_taps9(weight, COUNT: tl.constexpr, channel, exists):
    """The rows of a (9, COUNT) weight, each (BC, ) in fp32."""
    taps = ()
    for k in tl.static_range(9):
        tap = tl.load(weight + k * COUNT + channel, mask=exists, other=0.)
        taps = taps + (tap.to(tl.float32), )
    return taps


@triton.jit
def _is_inside(column, width, exists, EVEN: tl.constexpr):
    """Whether an own column lies on the map; no question if strips divide it evenly."""
    return exists if EVEN else exists & (column < width)


@triton.jit
def _load_columns(row, first, width, exists, TOKEN: tl.constexpr, COLUMNS: tl.constexpr,
                  EVEN: tl.constexpr):
    """The strip's own columns of a row, as they are; zeros off the map."""
    values = ()
    for j in tl.static_range(COLUMNS):
        values = values + (tl.load(row + j * TOKEN, mask=_is_inside(first + j, width, exists, EVEN),
                                   other=0.), )
    return values


@triton.jit
def _load_row(row, first, width, exists, TOKEN: tl.constexpr, COLUMNS: tl.constexpr,
              EVEN: tl.constexpr, HALO: tl.constexpr):
    """The same with HALO columns on either side."""
    values = ()
    for j in tl.static_range(-HALO, 0):
        values = values + (tl.load(row + j * TOKEN, mask=exists & (first + j >= 0), other=0.), )
    values = values + _load_columns(row, first, width, exists, TOKEN, COLUMNS, EVEN)
    for j in tl.static_range(COLUMNS, COLUMNS + HALO):
        values = values + (tl.load(row + j * TOKEN, mask=exists & (first + j < width), other=0.), )
    return values


@triton.jit
def _to_fp32(row, COUNT: tl.constexpr):
    """A tuple of columns in fp32."""
    values = ()
    for j in tl.static_range(COUNT):
        values = values + (row[j].to(tl.float32), )
    return values


@triton.jit
def _add_taps(value, row, j: tl.constexpr, left, middle, right):
    """``value`` and what column ``j`` and its neighbours in ``row`` add to it."""
    return value + row[j] * left + row[j + 1] * middle + row[j + 2] * right


@triton.jit(do_not_specialize=_GRID_INTEGERS)
def _grid_forward(x, out, weight, bias, batch, height, width, rows, images,
                  X_TOKEN: tl.constexpr, OUT_TOKEN: tl.constexpr, GROUPS: tl.constexpr,
                  LANES: tl.constexpr, TRUE: tl.constexpr, ACT: tl.constexpr,
                  EVEN: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr):
    """out = act(conv(x) + bias).

    A row of the input is loaded and converted once and added to the three rows of the output that
    see it, of which two are kept for the next rows. Loads run a row ahead.
    """
    COUNT: tl.constexpr = GROUPS * TRUE
    CHANNELS: tl.constexpr = GROUPS * LANES
    block, place, first, first_row, end_row, first_image, end_image = _place(
        batch, height, width, rows, images, (CHANNELS + BC - 1) // BC, TW)
    channel, exists, true_channel, is_true = _grid_channels(block, GROUPS, LANES, TRUE, BC)
    w = _load_taps9(weight, COUNT, true_channel, is_true)
    b = tl.load(bias + true_channel, mask=is_true, other=0.).to(tl.float32)
    token = width.to(tl.int64)  # of a row, so that products with a stride are in 64 bits
    pixels = token * height
    start = first_row * token + first
    end = tl.minimum(end_row + 1, height)

    for image in range(first_image, end_image):
        x_row = x + (image * pixels + start) * X_TOKEN + channel
        out_row = out + (image * pixels + start) * OUT_TOKEN + channel
        over = _to_fp32(_load_row(x_row - token * X_TOKEN, first, width, exists & (first_row > 0),
                                  X_TOKEN, TW, EVEN, 1), TW + 2)
        row = _to_fp32(_load_row(x_row, first, width, exists, X_TOKEN, TW, EVEN, 1), TW + 2)
        x_row += token * X_TOKEN
        above = ()  # the output row at hand, and the next: what the rows so far have added
        here = ()
        for j in tl.static_range(TW):
            above = above + (_add_taps(_add_taps(b, over, j, w[0], w[1], w[2]), row, j, w[3], w[4],
                                       w[5]), )
            here = here + (_add_taps(b, row, j, w[0], w[1], w[2]), )
        row = _to_fp32(_load_row(x_row, first, width, exists & (first_row + 1 < end), X_TOKEN, TW,
                                 EVEN, 1), TW + 2)
        for r in range(first_row, end_row):  # ``row`` is row r + 1 of the input
            x_row += token * X_TOKEN
            far = _load_row(x_row, first, width, exists & (r + 2 < end), X_TOKEN, TW, EVEN, 1)
            next_above = ()
            next_here = ()
            for j in tl.static_range(TW):
                value, _ = activate(_add_taps(above[j], row, j, w[6], w[7], w[8]), ACT,
                                    x.dtype.element_ty)
                next_above = next_above + (_add_taps(here[j], row, j, w[3], w[4], w[5]), )
                next_here = next_here + (_add_taps(b, row, j, w[0], w[1], w[2]), )
                if LANES != TRUE:
                    value = tl.where(is_true, value, 0.)
                tl.store(out_row + j * OUT_TOKEN, value.to(out.dtype.element_ty),
                         mask=_is_inside(first + j, width, exists, EVEN))
            out_row += token * OUT_TOKEN
            above = next_above
            here = next_here
            row = _to_fp32(far, TW + 2)


@triton.jit(do_not_specialize=_GRID_INTEGERS)
def _grid_backward(x, dy, dx, activation, weight, bias, partial, batch, height, width, rows, images,
                   X_TOKEN: tl.constexpr, DY_TOKEN: tl.constexpr,
                   DX_TOKEN: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
                   TRUE: tl.constexpr, ACT: tl.constexpr, WANT_ACTIVATION: tl.constexpr,
                   EVEN: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr):
    """dx, on request act(p), and this program's share of the sums: for weight and bias, and of dx.

    Two convolutions in one walk. Row q of p = conv(x) + bias is finished as in
    :func:`_grid_forward`, and with it row q of dp = dy * act'(p), both with a column more on
    either side; then row q - 1 of dx, from the three rows of dp at hand. The halo of dp is what
    neighbours compute too: with strips of seven a quarter more arithmetic, for a tensor that is
    never written.

    Each own token of ``x`` meets the nine of dp that it contributes to. Above the first own row
    there are two rows in which ``x`` counts as zero, and nothing else is counted or stored.
    """
    COUNT: tl.constexpr = GROUPS * TRUE
    CHANNELS: tl.constexpr = GROUPS * LANES
    block, place, first, first_row, end_row, first_image, end_image = _place(
        batch, height, width, rows, images, (CHANNELS + BC - 1) // BC, TW)
    channel, exists, true_channel, is_true = _grid_channels(block, GROUPS, LANES, TRUE, BC)
    w = _load_taps9(weight, COUNT, true_channel, is_true)
    b = tl.load(bias + true_channel, mask=is_true, other=0.).to(tl.float32)
    token = width.to(tl.int64)
    pixels = token * height
    start = first_row * token + first
    end = tl.minimum(end_row + 2, height)  # of the rows of x that are needed

    zeros = tl.zeros([BC], tl.float32)
    g = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    dp_sum = zeros
    dx_sum = zeros
    for image in range(first_image, end_image):
        x_row = x + (image * pixels + start) * X_TOKEN + channel
        dy_row = dy + (image * pixels + start - token) * DY_TOKEN + channel
        dx_row = dx + (image * pixels + start - 2 * token) * DX_TOKEN + channel
        activation_row = activation + (image * pixels + start - token) * CHANNELS + channel
        over = _to_fp32(_load_row(x_row - 2 * token * X_TOKEN, first, width,
                                  exists & (first_row > 1), X_TOKEN, TW, EVEN, 2), TW + 4)
        row = _to_fp32(_load_row(x_row - token * X_TOKEN, first, width, exists & (first_row > 0),
                                 X_TOKEN, TW, EVEN, 2), TW + 4)
        above = ()  # row q of p, and the next: what the rows of x so far have added
        here = ()
        dp_above = ()  # rows q - 2 and q - 1 of dp
        dp_here = ()
        for j in tl.static_range(TW + 2):
            above = above + (_add_taps(_add_taps(b, over, j, w[0], w[1], w[2]), row, j, w[3], w[4],
                                       w[5]), )
            here = here + (_add_taps(b, row, j, w[0], w[1], w[2]), )
            dp_above = dp_above + (tl.zeros([BC], tl.float32), )  # own zeros: see the top
            dp_here = dp_here + (tl.zeros([BC], tl.float32), )
        nearest = _load_row(x_row, first, width, exists, X_TOKEN, TW, EVEN, 2)
        x_above = ()  # rows q - 1 and q of x
        x_here = ()
        for j in tl.static_range(TW):
            x_above = x_above + (tl.zeros([BC], x.dtype.element_ty), )
            x_here = x_here + (tl.zeros([BC], x.dtype.element_ty), )
        for q in range(first_row - 1, end_row + 1):  # ``nearest`` is row q + 1 of x
            x_row += token * X_TOKEN
            far = _load_row(x_row, first, width, exists & (q + 2 < end), X_TOKEN, TW, EVEN, 2)
            gradient = _load_row(dy_row, first, width, exists & (q >= 0) & (q < height), DY_TOKEN,
                                 TW, EVEN, 1)
            row = _to_fp32(nearest, TW + 4)
            is_row = (q >= first_row) & (q < end_row)
            dp_below = ()
            next_above = ()
            next_here = ()
            for j in tl.static_range(TW + 2):
                value, slope = activate(_add_taps(above[j], row, j, w[6], w[7], w[8]), ACT,
                                        x.dtype.element_ty)
                dp = gradient[j].to(tl.float32) * slope
                if LANES != TRUE:
                    dp = tl.where(is_true, dp, 0.)
                    value = tl.where(is_true, value, 0.)
                dp_below = dp_below + (dp, )
                next_above = next_above + (_add_taps(here[j], row, j, w[3], w[4], w[5]), )
                next_here = next_here + (_add_taps(b, row, j, w[0], w[1], w[2]), )
                if WANT_ACTIVATION and 0 < j and j <= TW:
                    tl.store(activation_row + (j - 1) * CHANNELS,
                             value.to(activation.dtype.element_ty),
                             mask=_is_inside(first + j - 1, width, exists, EVEN) & is_row)
            is_own = q > first_row
            row_of_dp = zeros
            row_of_dx = zeros
            for j in tl.static_range(TW):
                done = _add_taps(zeros, dp_above, j, w[8], w[7], w[6])
                done = _add_taps(done, dp_here, j, w[5], w[4], w[3])
                done = _add_taps(done, dp_below, j, w[2], w[1], w[0])
                v = x_above[j].to(tl.float32)
                g = (g[0] + v * dp_below[j + 2], g[1] + v * dp_below[j + 1],
                     g[2] + v * dp_below[j], g[3] + v * dp_here[j + 2], g[4] + v * dp_here[j + 1],
                     g[5] + v * dp_here[j], g[6] + v * dp_above[j + 2],
                     g[7] + v * dp_above[j + 1], g[8] + v * dp_above[j])
                mask = _is_inside(first + j, width, exists, EVEN)
                row_of_dp += dp_here[j + 1]
                row_of_dx += done if EVEN else tl.where(mask, done, 0.)
                tl.store(dx_row + j * DX_TOKEN, done.to(dx.dtype.element_ty), mask=mask & is_own)
            dp_sum += tl.where(is_own, row_of_dp, 0.)
            dx_sum += tl.where(is_own, row_of_dx, 0.)
            dy_row += token * DY_TOKEN
            dx_row += token * DX_TOKEN
            activation_row += token * CHANNELS
            above = next_above
            here = next_here
            dp_above = dp_here
            dp_here = dp_below
            x_above = x_here
            x_here = ()
            for j in tl.static_range(TW):
                x_here = x_here + (nearest[j + 2], )
            nearest = far

    share = partial + place.to(tl.int64) * (11 * CHANNELS) + channel
    for k in tl.static_range(9):
        tl.store(share + k * CHANNELS, g[k], mask=exists)
    tl.store(share + 9 * CHANNELS, dp_sum, mask=exists)
    tl.store(share + 10 * CHANNELS, dx_sum, mask=exists)


@triton.jit
def _load_taps(weight, TAPS: tl.constexpr, COUNT: tl.constexpr, channel, exists):
    """The taps from the last, which sees the current token, to the fourth-last."""
    w0 = _load_tap(weight, TAPS - 1, COUNT, channel, exists)
    w1 = w0
    w2 = w0
    w3 = w0
    if TAPS > 1:
        w1 = _load_tap(weight, TAPS - 2, COUNT, channel, exists)
    if TAPS > 2:
        w2 = _load_tap(weight, TAPS - 3, COUNT, channel, exists)
    if TAPS > 3:
        w3 = _load_tap(weight, TAPS - 4, COUNT, channel, exists)
    return w0, w1, w2, w3


@triton.jit
def _walk(block, batch, height, width, steps, directions, group,
          SEGMENTS: tl.constexpr):
    """The segments of this program: image, first step, steps in the scan, and how to go on.

    Segments of all images are counted through, and a program has SEGMENTS of them side by side.
    A step leads from a token to the next of the scan, the last of a line to the next line's first.
    """
    length = height * width
    parts = tl.cdiv(length, steps)  # of an image
    segment = block * SEGMENTS + tl.arange(0, SEGMENTS)[:, None]
    image = (segment // parts).to(tl.int64)
    column, reverse, mirrored = direction_of(directions, group)
    across = tl.where(mirrored, -1, 1)  # to the next column
    # the end of a row is a step like any other, unless the grid is mirrored
    line = tl.where(column, height, tl.where(mirrored, width, length))
    to_next_line = tl.where(column, across - length, tl.where(mirrored, 2 * width, 0))
    sign = tl.where(reverse, -1, 1)
    step = sign * tl.where(column, width, across)
    return (image, (segment % parts) * steps, tl.where(image < batch, length, 0), column, reverse,
            mirrored, step, line, sign * to_next_line)


@triton.jit
def _scan_place(t, height, width, column, reverse, mirrored):
    """Position of step ``t`` of a scan in row-major order, and how many steps its line has had."""
    position = scan_position(t, height * width, height, width, column, reverse, mirrored)
    return position, tl.where(column, t % height, tl.where(mirrored, t % width, t))


@triton.jit
def _take_step(position, done, step, line, to_next_line):
    """Position and steps of the line after one step more."""
    done += 1
    ends = done == line
    return position + step + tl.where(ends, to_next_line, 0), tl.where(ends, 0, done)


@triton.jit
def _load_step(tensor, position, TOKEN: tl.constexpr, mask):
    """What a walk finds at its place, (SEGMENTS, BC)."""
    return tl.load(tensor + position.to(tl.int64) * TOKEN, mask=mask, other=0.)


@triton.jit
def _earlier_steps(x, start, length, height, width, column, reverse, mirrored, exists,
                   X_TOKEN: tl.constexpr, TAPS: tl.constexpr, zeros):
    """x one, two and three steps before the first, in fp32, as far as there are taps for them."""
    earlier = ()
    for back in tl.static_range(1, 4):
        value = zeros
        if back < TAPS:
            position, _ = _scan_place(start - back, height, width, column, reverse, mirrored)
            value = _load_step(x, position, X_TOKEN, exists & (start >= back)
                               & (start - back < length)).to(tl.float32)
        earlier = earlier + (value, )
    return earlier


@triton.jit
def _convolve(bias, w, now, earlier, TAPS: tl.constexpr):
    """The convolution at one step from x there and at the three before."""
    p = bias + w[0] * now
    if TAPS > 1:
        p += w[1] * earlier[0]
    if TAPS > 2:
        p += w[2] * earlier[1]
    if TAPS > 3:
        p += w[3] * earlier[2]
    return p


@triton.jit(do_not_specialize=_CAUSAL_INTEGERS)
def _causal_forward(x, out, weight, bias, batch, height, width, steps, directions,
                    X_TOKEN: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
                    TRUE: tl.constexpr, TAPS: tl.constexpr, SEGMENTS: tl.constexpr,
                    BC: tl.constexpr):
    """out = silu(conv(x) + bias), each group in its direction.

    Threads walk along the scan, ``steps`` tokens each: a token is loaded once, two steps ahead.
    ``directions`` is a :func:`direction_code` of the groups.
    """
    COUNT: tl.constexpr = GROUPS * TRUE
    BLOCKS: tl.constexpr = GROUPS * ((LANES + BC - 1) // BC)
    group, channel, exists, true_channel, is_true = _channels(tl.program_id(0) % BLOCKS, LANES,
                                                              TRUE, BC)
    image, start, length, column, reverse, mirrored, step, line, to_next_line = _walk(
        tl.program_id(0) // BLOCKS, batch, height, width, steps, directions, group,
        SEGMENTS)
    w = _load_taps(weight, TAPS, COUNT, true_channel, is_true)
    b = _load_tap(bias, 0, COUNT, true_channel, is_true)
    exists = exists[None, :]
    pixels = height.to(tl.int64) * width
    x += image * pixels * X_TOKEN + channel[None, :]
    out += image * pixels * (GROUPS * LANES) + channel[None, :]

    earlier = _earlier_steps(x, start, length, height, width, column, reverse, mirrored,
                             exists, X_TOKEN, TAPS, tl.zeros([SEGMENTS, BC], tl.float32))
    position, done = _scan_place(start, height, width, column, reverse, mirrored)
    now = _load_step(x, position, X_TOKEN, exists & (start < length))
    next_position, done = _take_step(position, done, step, line, to_next_line)
    then = _load_step(x, next_position, X_TOKEN, exists & (start + 1 < length))
    for t in range(steps):
        far_position, done = _take_step(next_position, done, step, line, to_next_line)
        far = _load_step(x, far_position, X_TOKEN,
                         exists & (start + t + 2 < length) & (t + 2 < steps))
        value = now.to(tl.float32)
        y, _ = activate(_convolve(b, w, value, earlier, TAPS), 'silu', x.dtype.element_ty)
        if LANES != TRUE:
            y = tl.where(is_true[None, :], y, 0.)
        tl.store(out + position.to(tl.int64) * (GROUPS * LANES),
                 y.to(out.dtype.element_ty), mask=exists & (start + t < length))
        earlier = (value, earlier[0], earlier[1])
        now = then
        then = far
        position = next_position
        next_position = far_position


@triton.jit
def _causal_slope(now, dy, earlier, bias, w, is_true, PADDED: tl.constexpr, TAPS: tl.constexpr):
    """x of a step in fp32, and dp = dy * silu'(p) there."""
    value = now.to(tl.float32)
    _, slope = activate(_convolve(bias, w, value, earlier, TAPS), 'silu', now.dtype)
    dp = dy.to(tl.float32) * slope
    if PADDED:
        dp = tl.where(is_true, dp, 0.)
        value = tl.where(is_true, value, 0.)
    return value, dp


@triton.jit
def _causal_dx(dp, later, w, TAPS: tl.constexpr):
    """dx of the step that is TAPS - 1 before the one of ``dp``; ``later`` are the dp in between."""
    if TAPS == 1:
        return w[0] * dp
    elif TAPS == 2:
        return w[1] * dp + w[0] * later[0]
    elif TAPS == 3:
        return w[2] * dp + w[1] * later[0] + w[0] * later[1]
    else:
        return w[3] * dp + w[2] * later[0] + w[1] * later[1] + w[0] * later[2]


@triton.jit(do_not_specialize=_CAUSAL_INTEGERS)
def _causal_backward(x, dy, dx, weight, bias, partial, batch, height, width, steps, directions,
                     X_TOKEN: tl.constexpr, DY_TOKEN: tl.constexpr,
                     DX_TOKEN: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
                     TRUE: tl.constexpr, TAPS: tl.constexpr, SEGMENTS: tl.constexpr,
                     BC: tl.constexpr):
    """dx, and this program's share of the gradients of the taps and, in the last row, the bias.

    One walk for both halves: ``dp``, the gradient before the activation, is never stored, and dx
    follows TAPS - 1 steps behind it. A segment's last dx take that many steps into the next one.
    """
    COUNT: tl.constexpr = GROUPS * TRUE
    CHANNELS: tl.constexpr = GROUPS * LANES
    BLOCKS: tl.constexpr = GROUPS * ((LANES + BC - 1) // BC)
    place = tl.program_id(0) // BLOCKS
    group, channel, lane_exists, true_channel, is_true = _channels(tl.program_id(0) % BLOCKS,
                                                                   LANES, TRUE, BC)
    image, start, length, column, reverse, mirrored, step, line, to_next_line = _walk(
        place, batch, height, width, steps, directions, group, SEGMENTS)
    w = _load_taps(weight, TAPS, COUNT, true_channel, is_true)
    b = _load_tap(bias, 0, COUNT, true_channel, is_true)
    exists = lane_exists[None, :]
    is_true = is_true[None, :]
    pixels = height.to(tl.int64) * width
    x += image * pixels * X_TOKEN + channel[None, :]
    dy += image * pixels * DY_TOKEN + channel[None, :]
    dx += image * pixels * DX_TOKEN + channel[None, :]

    zeros = tl.zeros([SEGMENTS, BC], tl.float32)
    earlier = _earlier_steps(x, start, length, height, width, column, reverse, mirrored,
                             exists, X_TOKEN, TAPS, zeros)
    if LANES != TRUE:  # what is in padded lanes must not reach the sums
        earlier = (tl.where(is_true, earlier[0], 0.), tl.where(is_true, earlier[1], 0.),
                   tl.where(is_true, earlier[2], 0.))
    later = (zeros, zeros, zeros)
    g = (zeros, zeros, zeros, zeros, zeros)  # of the taps from the last, and of the bias
    position, done = _scan_place(start, height, width, column, reverse, mirrored)
    mask = exists & (start < length)
    now = _load_step(x, position, X_TOKEN, mask)
    dy_now = _load_step(dy, position, DY_TOKEN, mask)
    next_position, done = _take_step(position, done, step, line, to_next_line)
    mask = exists & (start + 1 < length)
    then = _load_step(x, next_position, X_TOKEN, mask)
    dy_then = _load_step(dy, next_position, DY_TOKEN, mask)
    behind = (position - 1, position - 2, position - 3)  # not used, but different: see the top
    for t in range(steps + TAPS - 1):
        far_position, done = _take_step(next_position, done, step, line, to_next_line)
        mask = exists & (start + t + 2 < length) & (t + 3 < steps + TAPS)
        far = _load_step(x, far_position, X_TOKEN, mask)
        dy_far = _load_step(dy, far_position, DY_TOKEN, mask)
        value, dp = _causal_slope(now, dy_now, earlier, b, w, is_true, LANES != TRUE, TAPS)
        own = tl.where(t < steps, dp, 0.)
        g = (g[0] + own * value, g[1] + own * earlier[0], g[2] + own * earlier[1],
             g[3] + own * earlier[2], g[4] + own)
        target = position
        if TAPS > 1:
            target = behind[TAPS - 2]
        s = t - (TAPS - 1)
        tl.store(dx + target.to(tl.int64) * DX_TOKEN,
                 _causal_dx(dp, later, w, TAPS).to(dx.dtype.element_ty),
                 mask=exists & (s >= 0) & (start + s < length))
        earlier = (value, earlier[0], earlier[1])
        later = (dp, later[0], later[1])
        behind = (position, behind[0], behind[1])
        position = next_position
        next_position = far_position
        now = then
        dy_now = dy_then
        then = far
        dy_then = dy_far

    share = partial + place.to(tl.int64) * ((TAPS + 1) * CHANNELS) + channel
    for k in tl.static_range(TAPS):
        tl.store(share + (TAPS - 1 - k) * CHANNELS, tl.sum(g[k], 0), mask=lane_exists)
    tl.store(share + TAPS * CHANNELS, tl.sum(g[4], 0), mask=lane_exists)


@triton.jit(do_not_specialize=['programs'])
def _add_shares(partial, dweight, dbias, dx_sum, programs, TAPS: tl.constexpr, SUMS: tl.constexpr,
                GROUPS: tl.constexpr, LANES: tl.constexpr, TRUE: tl.constexpr, P: tl.constexpr,
                BC: tl.constexpr):
    """The sums of (programs, SUMS, C') shares: one program for each sum and block of channels."""
    row = tl.program_id(1)
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    exists = channel < GROUPS * LANES
    lane = channel % LANES
    true_channel = channel // LANES * TRUE + lane
    total = tl.zeros([P, BC], tl.float32)
    for first in range(0, programs, P):
        place = first + tl.arange(0, P)
        at = (place.to(tl.int64) * SUMS + row)[:, None] * (GROUPS * LANES) + channel[None, :]
        total += tl.load(partial + at, mask=(place < programs)[:, None] & exists[None, :], other=0.)
    value = tl.sum(total, 0)
    mask = exists & (lane < TRUE)
    if row < TAPS:
        tl.store(dweight + true_channel * TAPS + row, value, mask=mask)
    elif row == TAPS:
        tl.store(dbias + true_channel, value, mask=mask)
    else:
        tl.store(dx_sum + true_channel, value, mask=mask)


#: Channels of a tile of :func:`_add_shares`.
_SUM_CHANNELS = 32
#: Of a thread of the grid's kernels, as few as need (almost) no spilling: 20 and 8 warps then run
#: on a multiprocessor.
_MAX_REGISTERS = dict(forward=96, backward=255)


class _Tiles(NamedTuple):
    """How a kernel of the grid is cut up; the numbers to tune."""
    width: int  # columns of a strip
    channels: int  # channels of a tile
    warps: int
    rows: int  # rows of an image that a program walks down
    images: int  # images that it walks
    programs: int  # for each channel block


@functools.cache
def _choose_tiles(is_backward: bool, batch: int, height: int, width: int,
                  channels: int) -> _Tiles:
    """For the kernels of the grid, whose threads own two channels of a strip (of 32, one).

    Fixed rules in place of an autotuner: nothing to time at the start, the same sums each run.
    """
    # Strips of seven columns suit the maps of 224 pixels and the registers. One other width serves
    # all maps that they do not divide, so that new image sizes compile nothing.
    strip = 7 if width % 7 == 0 else 4
    # The widest channel block that wastes at most a tenth.
    padded = {size: round_up(channels, size) for size in (128, 64, 32)}
    block = next((size for size in padded if padded[size] * 10 <= channels * 11), 32)
    warps = max(1, block // 64)
    # Of the warps that run at once sums want no more, since the share of each program costs memory
    # traffic; the others want up to four times as many, to wait less for the last to finish, and
    # twice as many where that takes halo rows.
    at_once = max(1, PROGRAMS // ((4 if is_backward else 2) * warps))
    strips = cdiv(width, strip)
    programs = max(1, batch * strips * cdiv(channels, block))
    images, rows = 1, height
    if is_backward and programs > at_once:
        images = min(batch, cdiv(programs, at_once))
    elif programs > 4 * at_once:
        images = min(batch, programs // (4 * at_once))
    else:
        parts = max(1, (1 if is_backward else 2) * at_once // programs)
        rows = cdiv(height, min(parts, cdiv(height, MIN_ROWS)))
    return _Tiles(strip, block, warps, rows, images,
                  cdiv(batch, images) * cdiv(height, rows) * strips)


class _CausalPlan(NamedTuple):
    """The same for the kernels along the scan."""
    channels: int  # channels of a tile
    segments: int  # segments of a tile
    steps: int  # tokens of a segment
    programs: int  # for each channel block


@functools.cache
def _choose_causal_plan(is_backward: bool, batch: int, length: int, groups: int,
                        lanes: int) -> _CausalPlan:
    """A thread walks along one segment with eight channels, what a load of half precision takes.

    In the backward pass with four: eight take so many registers that too few threads run at once.
    """
    of_thread = 4 if is_backward else 8
    # The widest channel block that wastes at most a seventh of its lanes, else the least waste.
    padded = {size: round_up(lanes, size) for size in (64, 32, 16)}
    channels = next((size for size in padded if padded[size] * 7 <= lanes * 8),
                    min(padded, key=lambda size: (padded[size], -size)))
    walks = max(1, batch * groups * padded[channels] // of_thread)  # of whole images
    # Long segments, since each costs a few tokens more, but threads enough to fill the GPU twice:
    # 24 for each of PROGRAMS. Forward more of them, which wait less for the last to finish.
    more = 1 if is_backward else 2
    steps = min(max(MIN_ROWS, cdiv(length * walks, more * 24 * PROGRAMS)), MAX_STEPS // more)
    parts = cdiv(length, steps)
    segments = _WALK_WARPS * 32 * of_thread // channels
    return _CausalPlan(channels, segments, cdiv(length, parts), cdiv(batch * parts, segments))


def by_tap(weight: Tensor) -> Tensor:
    """(C, 1, ...) to (K, C), whose rows the kernels load in one go."""
    return weight.flatten(1).t().contiguous()


def _true_groups(channels: int, groups: int, count: int) -> tuple[int, int, int]:
    """Groups, channels of each with padding, and true ones; one group if nothing is padded."""
    return (1, channels, channels) if channels == count else (groups, channels // groups,
                                                              count // groups)


@functools.lru_cache(maxsize=4096)
def _plan_grid(batch: int, height: int, width: int, channels: int, groups: int, count: int,
               is_backward: bool) -> tuple[_Tiles, tuple[int], dict]:
    """Tiles, the number of programs and the constants of a launch on the grid."""
    groups, lanes, true = _true_groups(channels, groups, count)
    tiles = _choose_tiles(is_backward, batch, height, width, channels)
    constants = dict(GROUPS=groups, LANES=lanes, TRUE=true, TW=tiles.width, BC=tiles.channels,
                     EVEN=tiles.width == 7, num_warps=tiles.warps,
                     maxnreg=_MAX_REGISTERS['backward' if is_backward else 'forward'])
    return tiles, (tiles.programs * cdiv(channels, tiles.channels), ), constants


@functools.lru_cache(maxsize=4096)
def _plan_causal(batch: int, length: int, channels: int, groups: int, count: int,
                 is_backward: bool) -> tuple[_CausalPlan, tuple[int], dict]:
    """Walks, the number of programs and the constants of a launch along the scan."""
    lanes = channels // groups
    walks = _choose_causal_plan(is_backward, batch, length, groups, lanes)
    constants = dict(GROUPS=groups, LANES=lanes, TRUE=count // groups, SEGMENTS=walks.segments,
                     BC=walks.channels, num_warps=_WALK_WARPS)
    return walks, (walks.programs * groups * cdiv(lanes, walks.channels), ), constants


#: Shares of a tile, for few and for many: many come with few channels, hence with few programs.
_SHARES = (dict(P=64, num_warps=4), dict(P=512, num_warps=8))


def _add_up(partial: Tensor, taps: int, groups: int, count: int, dweight: Tensor | None,
            *sums: Tensor | None) -> tuple[Tensor, ...]:
    """The gradient of the weight, and the sums behind it, from all programs' shares.

    Given tensors may have fewer channels than the convolution: what is behind theirs is padding.
    """
    programs, rows, channels = partial.shape
    count = count if sums[0] is None else sums[0].shape[0]
    new = functools.partial(torch.empty, dtype=torch.float32, device=partial.device)
    dweight = new(count, taps) if dweight is None else dweight
    sums = tuple(new(count) if total is None else total for total in sums)
    plan = _SHARES[programs > 512]
    for one in _SHARES if noted() is not None else (plan, ):
        launch(_add_shares, (cdiv(channels, _SUM_CHANNELS), rows), partial, dweight, sums[0],
               sums[-1], programs, TAPS=taps, SUMS=rows, GROUPS=groups, LANES=channels // groups,
               TRUE=count // groups, BC=_SUM_CHANNELS, **one)
    return (dweight, *sums)


def grid_conv_forward(x: Tensor, taps: Tensor, bias: Tensor, grid: tuple[int, int], act: str,
                      groups: int = 1) -> Tensor:
    """act(3x3 depthwise convolution + bias) of tokens on their grid, zeros outside.

    Args:
        x: (B, L, C') tokens, row-major, L = H * W; fp32, bf16 or fp16; rows at an even distance
            are read as they lie.
        taps: (9, C), contiguous, any float dtype; see :func:`by_tap`.
        bias: (C,).
        grid: (H, W).
        act: ``'none'``, ``'silu'`` or ``'gelu'`` (the one with erf).
        groups: Groups G of the channels, if they are padded: C' = G * wp and C = G * d with
            d <= wp, channel g * wp + i belonging to entry g * d + i.

    Returns:
        (B, L, C') in the dtype of ``x``, zeros in padded lanes.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if is_abstract(x):
        return y
    x, x_token = rows_of(x)
    batch, _, channels = x.shape
    tiles, programs, constants = _plan_grid(batch, *grid, channels, groups, bias.shape[0], False)
    if programs[0]:
        launch(_grid_forward, programs, x, y, taps, bias, batch, *grid, tiles.rows, tiles.images,
               X_TOKEN=x_token, OUT_TOKEN=channels, ACT=act, **constants)
    return y


def grid_conv_backward(
        x: Tensor, dy: Tensor, taps: Tensor, bias: Tensor, grid: tuple[int, int], act: str,
        groups: int = 1, dx: Tensor | None = None, activation: Tensor | None = None,
        dweight: Tensor | None = None, dbias: Tensor | None = None,
        dx_sum: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`grid_conv_forward`, from its inputs only.

    Args:
        x, taps, bias, grid, act, groups: As in the forward pass.
        dy: Gradient of the output, (B, L, C'), dtype of ``x``.
        dx: Where to write the gradient of ``x``, rows at an even distance, sharing no memory with
            ``x`` or ``dy``; None for a new tensor.
        activation: Where to write the output of the forward pass, contiguous; None if it is not
            wanted.
        dweight, dbias, dx_sum: Where to write these, contiguous; None for new tensors in fp32.

    Returns:
        dx (B, L, C') with zeros in padded lanes, dweight (C, 9) and dbias (C,) in fp32, and the sum
        of dx over the tokens, (C,) in fp32: the gradient of a bias that was added to ``x``, which
        would cost another pass over dx.
    """
    count = bias.shape[0]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    if is_abstract(x):
        tiles, groups = _Tiles(0, 0, 0, 0, 0, 0), 1
    else:
        (x, x_token), (dy, dy_token) = rows_of(x), rows_of(dy)
        tiles, programs, constants = _plan_grid(x.shape[0], *grid, x.shape[2], groups, count, True)
        groups = constants['GROUPS']
    partial = torch.empty(tiles.programs, 11, x.shape[2], dtype=torch.float32, device=x.device)
    if tiles.programs and x.numel():
        launch(_grid_backward, programs, x, dy, dx, dx if activation is None else activation, taps,
               bias, partial, x.shape[0], *grid, tiles.rows, tiles.images, X_TOKEN=x_token,
               DY_TOKEN=dy_token, DX_TOKEN=rows_of(dx)[1], ACT=act,
               WANT_ACTIVATION=activation is not None, **constants)
    return (dx, *_add_up(partial, 9, groups, count, dweight, dbias, dx_sum))


def causal_conv_forward(x: Tensor, taps: Tensor, bias: Tensor, grid: tuple[int, int],
                        directions: int, groups: int) -> Tensor:
    """silu(causal depthwise convolution + bias) along the scan of each group.

    With t counting along the direction of a channel's group,
    y_t = silu(bias + sum_k taps[k] * x_{t-(K-1)+k}), and x_t = 0 for t < 0.

    Args:
        x: (B, L, C') as in :func:`grid_conv_forward`, with groups of channels, padded or not.
        taps: (K, C), K from 1 to 4; the last tap sees the current token.
        bias: (C,).
        grid: (H, W).
        directions: Of the groups, as
            :func:`groupmamba_mm.ops.selective_scan.directions.direction_code` gives them.
        groups: Number of groups G.

    Returns:
        (B, L, C'), row-major, in the dtype of ``x``, zeros in padded lanes.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if is_abstract(x):
        return y
    x, x_token = rows_of(x)
    walks, programs, constants = _plan_causal(*x.shape, groups, bias.shape[0], False)
    if programs[0]:
        launch(_causal_forward, programs, x, y, taps, bias, x.shape[0], *grid, walks.steps,
               directions, X_TOKEN=x_token, TAPS=taps.shape[0], **constants)
    return y


def causal_conv_backward(
        x: Tensor, dy: Tensor, taps: Tensor, bias: Tensor, grid: tuple[int, int],
        directions: int, groups: int, dx: Tensor | None = None,
        dweight: Tensor | None = None, dbias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`causal_conv_forward`, from its inputs only.

    Args:
        x, taps, bias, grid, directions, groups: As in the forward pass.
        dy, dx, dweight, dbias: As in :func:`grid_conv_backward`.

    Returns:
        dx (B, L, C') with zeros in padded lanes, dweight (C, K) and dbias (C,) in fp32.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    count, rows = bias.shape[0], taps.shape[0] + 1
    number = 0
    if not is_abstract(x):
        (x, x_token), (dy, dy_token) = rows_of(x), rows_of(dy)
        walks, programs, constants = _plan_causal(*x.shape, groups, count, True)
        number = walks.programs
    partial = torch.empty(number, rows, x.shape[2], dtype=torch.float32, device=x.device)
    if number and x.numel():
        launch(_causal_backward, programs, x, dy, dx, taps, bias, partial, x.shape[0], *grid,
               walks.steps, directions, X_TOKEN=x_token, DY_TOKEN=dy_token,
               DX_TOKEN=rows_of(dx)[1], TAPS=rows - 1, **constants)
    return (dx, *_add_up(partial, rows - 1, groups, count, dweight, dbias))
