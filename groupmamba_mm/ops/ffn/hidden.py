"""Triton kernels of an FFN's hidden tensor: the first product with GELU behind it, or both.

With few input channels such a product takes less time than its output takes to be written. GELU in
the same kernel saves a pass over the largest tensors of a network, and with very few channels there
is room for the second product as well. The backward pass makes the hidden tensor again beside the
gradient of GELU's output, so that neither is ever stored. With many channels only the first product
with GELU is left of all this, in a kernel of its own, and GELU's backward pass in another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import has_large_smem
from ..integers import cdiv
from ..kernel_functions import activate, multiply
from ..launch import INTERPRETED, is_abstract, launch
from ..linear import linear
from ..sums import sum_parts
from ..tracing import noted

#: Rows of tokens are held as a whole where they are not longer.
MAX_CHANNELS = 256
#: Up to so many the second product fits into the registers, too, and GELU's output is not stored.
WHOLE_CHANNELS = 192
#: Up to so many the first product with GELU is as fast as a library's without it.
MAX_INPUTS = 512
#: Tokens of a tile, and warps.
_TOKENS, _WARPS = 128, 8
#: Hidden channels of a tile, for rows of up to so many channels: what an H100's shared memory
#: takes.
_HIDDEN = {192: 64, MAX_CHANNELS: 32}
#: Of a thread: two programs then run at once on a multiprocessor. Rows of more channels than this
#: leave no shared memory for a second one where there are two products, and all registers to the
#: first.
_MAX_REGISTERS, _TWO_PROGRAMS = 128, 96
#: Programs wanted at least, two for each of an H100's multiprocessors: fewer are split by channels.
_PROGRAMS = 264
#: Tile of GELU's gradient, and programs wanted: 32 for each multiprocessor.
_GELU_TOKENS, _GELU_CHANNELS, _GELU_PROGRAMS = 32, 64, 4224


@triton.jit
def load_rows(rows, is_row, COUNT: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """(R, COUNT) as (R, HEAD) and (R, TAIL), zero where there is nothing."""
    column = tl.arange(0, HEAD)[None, :]
    head = tl.load(rows + column, mask=is_row & (column < COUNT), other=0.)
    tail = head
    if TAIL:
        column = HEAD + tl.arange(0, TAIL)[None, :]
        tail = tl.load(rows + column, mask=is_row & (column < COUNT), other=0.)
    return head, tail


@triton.jit
def load_columns(weight, channel, exists, CHANNELS: tl.constexpr, COUNT: tl.constexpr,
                 HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Columns of (COUNT, CHANNELS) as (HEAD, BC) and (TAIL, BC), zero where there is nothing."""
    row = tl.arange(0, HEAD)[:, None]
    head = tl.load(weight + row * CHANNELS + channel, mask=(row < COUNT) & exists, other=0.)
    tail = head
    if TAIL:
        row = HEAD + tl.arange(0, TAIL)[:, None]
        tail = tl.load(weight + row * CHANNELS + channel, mask=(row < COUNT) & exists, other=0.)
    return head, tail


@triton.jit
def _store_rows(rows, y, bias, is_row, FIRST: tl.constexpr, COUNT: tl.constexpr,
                WIDTH: tl.constexpr):
    """Store (R, WIDTH) with the bias added, as columns from FIRST on of (R, COUNT)."""
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    exists = column < COUNT
    y += tl.load(bias + column, mask=exists, other=0.).to(tl.float32)
    tl.store(rows + column, y.to(rows.dtype.element_ty), mask=is_row & exists)


@triton.jit(do_not_specialize=['tokens', 'span'])
def _hidden_tensor(x, dy, in_weight, in_bias, out_weight, out_bias, out, dh, partial, tokens, span,
                   CHANNELS: tl.constexpr, INPUTS: tl.constexpr, IN_HEAD: tl.constexpr,
                   IN_TAIL: tl.constexpr, OUTPUTS: tl.constexpr, OUT_HEAD: tl.constexpr,
                   OUT_TAIL: tl.constexpr, WHOLE: tl.constexpr, BACKWARD: tl.constexpr,
                   IN_FP32: tl.constexpr, T: tl.constexpr, BC: tl.constexpr):
    """out = GELU(h), h = x in_weight^T + in_bias; WHOLE: out = GELU(h) out_weight^T + out_bias.

    BACKWARD also makes dh, and this program's sum of it. A program keeps its tokens of ``x`` and
    ``dy``, and walks over ``span`` blocks of hidden channels.
    """
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)[:, None]
    is_token = token < tokens
    x_head, x_tail = load_rows(x + token * INPUTS, is_token, INPUTS, IN_HEAD, IN_TAIL)
    if BACKWARD:
        dy_head, dy_tail = load_rows(dy + token * OUTPUTS, is_token, OUTPUTS, OUT_HEAD, OUT_TAIL)
    zeros = tl.zeros([T, BC], tl.float32)
    y_head = tl.zeros([T, OUT_HEAD], tl.float32)
    y_tail = y_head
    if OUT_TAIL:
        y_tail = tl.zeros([T, OUT_TAIL], tl.float32)
    place = token * CHANNELS  # multiples of blocks are known to be aligned
    start = tl.program_id(1) * span
    for block in range(start, tl.minimum(start + span, (CHANNELS + BC - 1) // BC)):
        channel = block * BC + tl.arange(0, BC)
        if CHANNELS % BC == 0:
            exists = tl.full([BC], True, tl.int1)  # known when compiled: masks vanish
        else:
            exists = channel < CHANNELS
        w_head, w_tail = load_rows(in_weight + channel[:, None] * INPUTS, exists[:, None], INPUTS,
                                   IN_HEAD, IN_TAIL)
        h = multiply(x_head, w_head.T, zeros, IN_FP32)
        if IN_TAIL:
            h = multiply(x_tail, w_tail.T, h, IN_FP32)
        bias = tl.load(in_bias + channel, mask=exists, other=0.).to(tl.float32)
        value, slope = activate(h + bias[None, :], 'gelu', out.dtype.element_ty)
        value = value.to(out.dtype.element_ty)
        mask = is_token & exists[None, :]
        if WHOLE or BACKWARD:
            w_head, w_tail = load_columns(out_weight, channel[None, :], exists[None, :], CHANNELS,
                                          OUTPUTS, OUT_HEAD, OUT_TAIL)
        if WHOLE:
            y_head = multiply(value, w_head.T, y_head, IN_FP32)
            if OUT_TAIL:
                y_tail = multiply(value, w_tail.T, y_tail, IN_FP32)
        else:
            tl.store(out + place + channel[None, :], value, mask=mask)
        if BACKWARD:
            gradient = multiply(dy_head, w_head, zeros, IN_FP32)
            if OUT_TAIL:
                gradient = multiply(dy_tail, w_tail, gradient, IN_FP32)
            gradient = gradient * slope  # zero for tokens that do not exist, as dy is
            tl.store(dh + place + channel[None, :], gradient.to(dh.dtype.element_ty), mask=mask)
            tl.store(partial + tl.program_id(0).to(tl.int64) * CHANNELS + channel,
                     tl.sum(gradient, 0), mask=exists)
    if WHOLE:
        rows = out + token * OUTPUTS
        _store_rows(rows, y_head, out_bias, is_token, 0, OUTPUTS, OUT_HEAD)
        if OUT_TAIL:
            _store_rows(rows, y_tail, out_bias, is_token, OUT_HEAD, OUTPUTS, OUT_TAIL)


@triton.jit(do_not_specialize=['tokens'])
def _product_gelu(x, weight, bias, hidden, out, tokens, CHANNELS: tl.constexpr,
                  INPUTS: tl.constexpr, KEEP: tl.constexpr, IN_FP32: tl.constexpr,
                  T: tl.constexpr, BC: tl.constexpr, BI: tl.constexpr):
    """out = GELU(h), h = x weight^T + bias, of any number of input channels; KEEP stores h, too."""
    BLOCKS: tl.constexpr = (CHANNELS + BC - 1) // BC
    token = (tl.program_id(0) // BLOCKS).to(tl.int64) * T + tl.arange(0, T)[:, None]
    is_token = token < tokens
    channel = (tl.program_id(0) % BLOCKS) * BC + tl.arange(0, BC)
    exists = channel < CHANNELS
    h = tl.zeros([T, BC], tl.float32)
    for block in range((INPUTS + BI - 1) // BI):
        column = block * BI + tl.arange(0, BI)[None, :]
        is_input = column < INPUTS
        tile = tl.load(x + token * INPUTS + column, mask=is_token & is_input, other=0.)
        w = tl.load(weight + channel[:, None] * INPUTS + column,
                    mask=exists[:, None] & is_input, other=0.)
        h = multiply(tile, w.T, h, IN_FP32)
    h += tl.load(bias + channel, mask=exists, other=0.).to(tl.float32)[None, :]
    at = token * CHANNELS + channel[None, :]
    mask = is_token & exists[None, :]
    if KEEP:
        tl.store(hidden + at, h.to(hidden.dtype.element_ty), mask=mask)
    value, _ = activate(h, 'gelu', out.dtype.element_ty)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['tokens', 'tiles'])
def _gelu_gradient(h, dy, activation, partial, tokens, tiles, CHANNELS: tl.constexpr,
                   T: tl.constexpr, BC: tl.constexpr):
    """dh over dy, GELU(h), and this program's share of the sum of dh."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    exists = channel < CHANNELS
    first = tl.program_id(1).to(tl.int64) * tiles * T
    total = tl.zeros([T, BC], tl.float32)
    for tile in range(tiles):
        token = first + tile * T + tl.arange(0, T)
        mask = (token < tokens)[:, None] & exists[None, :]
        at = token[:, None] * CHANNELS + channel[None, :]
        value, slope = activate(tl.load(h + at, mask=mask, other=0.).to(tl.float32), 'gelu',
                                h.dtype.element_ty)
        dh = tl.load(dy + at, mask=mask, other=0.).to(tl.float32) * slope
        tl.store(dy + at, dh.to(dy.dtype.element_ty), mask=mask)
        tl.store(activation + at, value.to(activation.dtype.element_ty), mask=mask)
        total += dh
    tl.store(partial + tl.program_id(1).to(tl.int64) * CHANNELS + channel, tl.sum(total, 0),
             mask=exists)


def _are_for(x: Tensor) -> bool:
    """Whether the kernels here are for these tokens: half precision, and a GPU that can hold them.

    Others multiply as fast apart, or exactly.
    """
    return x.dtype != torch.float32 and has_large_smem(x.device)


def fits(x: Tensor, *widths: int) -> bool:
    """Whether :func:`ffn_forward` and :func:`hidden_backward` take these.

    Args:
        x: Tokens.
        widths: Channels before and behind.
    """
    return max(widths) <= MAX_CHANNELS and _are_for(x)


def fits_wide(x: Tensor) -> bool:
    """Whether :func:`wide_forward` takes these tokens."""
    return x.shape[2] <= MAX_INPUTS and _are_for(x)


def parts(count: int) -> tuple[int, int]:
    """Two powers of 2 that hold ``count`` channels, the second 0 if one does: 96 is 64 and 32."""
    head = max(16, 1 << (count.bit_length() - 1))
    return head, 0 if count <= head else max(16, triton.next_power_of_2(count - head))


def _run(x: Tensor, in_weight: Tensor, in_bias: Tensor, dy: Tensor | None = None,
         out_weight: Tensor | None = None, out_bias: Tensor | None = None
         ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """GELU(h), with ``dy`` also its gradient before GELU and the sums of that.

    With ``out_bias`` the whole FFN instead of GELU(h).
    """
    backward, whole = dy is not None, out_bias is not None
    channels, inputs = in_weight.shape
    outputs = inputs if out_weight is None else out_weight.shape[0]
    tokens, widest = x.shape[0] * x.shape[1], max(inputs, outputs)
    out = torch.empty(*x.shape[:2], outputs if whole else channels, dtype=x.dtype, device=x.device)
    dh = torch.empty_like(out) if backward else None
    block = next(size for width, size in _HIDDEN.items() if widest <= width)
    blocks, steps = 0 if is_abstract(x) else cdiv(tokens, _TOKENS), cdiv(channels, block)
    partial = (torch.empty(blocks, channels, dtype=torch.float32, device=x.device) if backward
               else None)
    if blocks:
        span = steps if whole else cdiv(steps, min(steps, cdiv(_PROGRAMS, blocks)))
        (in_head, in_tail), (out_head, out_tail) = parts(inputs), parts(outputs)
        is_alone = (backward or whole) and widest > _TWO_PROGRAMS
        x, dy = x.contiguous(), None if dy is None else dy.contiguous()
        launch(_hidden_tensor, (blocks, cdiv(steps, span)), x, dy, in_weight, in_bias, out_weight,
               out_bias, out, dh, partial, tokens, span, CHANNELS=channels, INPUTS=inputs,
               IN_HEAD=in_head, IN_TAIL=in_tail, OUTPUTS=outputs, OUT_HEAD=out_head,
               OUT_TAIL=out_tail, WHOLE=whole, BACKWARD=backward, IN_FP32=INTERPRETED, T=_TOKENS,
               BC=block, num_warps=_WARPS, num_stages=2,
               maxnreg=None if is_alone else _MAX_REGISTERS)
    return (out, dh, sum_parts(partial)) if backward else (out, None, None)


def ffn_forward(x: Tensor, in_weight: Tensor, in_bias: Tensor, weight: Tensor,
                bias: Tensor) -> Tensor:
    """GELU(x in_weight^T + in_bias) weight^T + bias.

    Args:
        x: (B, L, I), bf16 or fp16.
        in_weight: (C, I), in the same.
        in_bias: (C,), any float dtype.
        weight: (O, C), in the dtype of ``x``.
        bias: (O,), any float dtype.

    Returns:
        (B, L, O).
    """
    # programs that walk over all channels: with few of them the second product is faster apart
    fits = max(x.shape[2], weight.shape[0]) <= WHOLE_CHANNELS
    if fits and noted() is not None:  # images of another size take the other way
        _run(x, in_weight, in_bias)
    if is_abstract(x) or (fits and (x.shape[0] * x.shape[1] >= _TOKENS * _PROGRAMS // 2
                                    or noted() is not None)):
        return _run(x, in_weight, in_bias, None, weight, bias)[0]
    return linear(_run(x, in_weight, in_bias)[0], weight, bias)


def hidden_backward(x: Tensor, in_weight: Tensor, in_bias: Tensor, dy: Tensor,
                    weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of h = x in_weight^T + in_bias, with what else the backward pass needs.

    Args:
        x, in_weight, in_bias, weight: As in :func:`ffn_forward`.
        dy: (B, L, O), gradient of its output.

    Returns:
        dh (B, L, C); GELU(h); the sum of dh over the tokens, (C,) in fp32.
    """
    activation, dh, dh_sum = _run(x, in_weight, in_bias, dy, weight)
    return dh, activation, dh_sum


def wide_forward(x: Tensor, in_weight: Tensor, in_bias: Tensor,
                 keep_hidden: bool) -> tuple[Tensor, Tensor | None]:
    """GELU(h) and on request h = x in_weight^T + in_bias, for what :func:`ffn_forward` is not.

    Args:
        x, in_weight, in_bias: As in :func:`ffn_forward`.
        keep_hidden: Whether h is wanted.

    Returns:
        GELU(h), (B, L, C); h or None.
    """
    channels, inputs = in_weight.shape
    out = torch.empty(*x.shape[:2], channels, dtype=x.dtype, device=x.device)
    hidden = torch.empty_like(out) if keep_hidden else None
    tokens = x.shape[0] * x.shape[1]
    if tokens:
        tile = dict(T=_TOKENS, BC=128, BI=64, num_warps=_WARPS, num_stages=3)
        launch(_product_gelu, (cdiv(tokens, _TOKENS) * cdiv(channels, tile['BC']), ),
               x.contiguous(), in_weight, in_bias, hidden, out, tokens, CHANNELS=channels,
               INPUTS=inputs, KEEP=keep_hidden, IN_FP32=INTERPRETED, **tile)
    return out, hidden


def gelu_backward(h: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of GELU, written over ``dy``, with what else a pass over both can give.

    Args:
        h: (B, L, C), contiguous, fp32, bf16 or fp16.
        dy: Gradient of GELU(h), contiguous, same shape and dtype; its memory is used.

    Returns:
        dh in the memory of ``dy``; GELU(h); the sum of dh over the tokens, (C,) in fp32.
    """
    tokens, channels = h.shape[0] * h.shape[1], h.shape[2]
    activation = torch.empty_like(h)
    blocks = cdiv(channels, _GELU_CHANNELS)
    tiles = programs = 0
    if not is_abstract(h):
        tiles = max(1, cdiv(tokens * blocks, _GELU_PROGRAMS * _GELU_TOKENS))
        programs = cdiv(tokens, tiles * _GELU_TOKENS)
    partial = torch.empty(programs, channels, dtype=torch.float32, device=h.device)
    if programs:
        launch(_gelu_gradient, (blocks, programs), h, dy, activation, partial, tokens, tiles,
               CHANNELS=channels, T=_GELU_TOKENS, BC=_GELU_CHANNELS, num_warps=4)
    return dy, activation, sum_parts(partial)
