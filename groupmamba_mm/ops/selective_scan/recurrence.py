"""The linear recurrence h_t = a_t * h_{t-1} + b_t by recursive chunks, and its gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: Tokens walked one after the other inside a chunk; all chunks advance together. Measured on two
#: CPU cores: 16 beats 8 and 32 for sequences of 196 to 67,200 tokens.
CHUNK = 16

#: Tokens of a chunk in a recorded graph, where each costs three nodes a level, and the levels of
#: chunks if the length is not known. What is left above them is quadratic: 128 entries for 65,536
#: tokens.
RECORDED_CHUNK = 8
RECORDED_LEVELS = 3


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t * h_{t-1} + b_t along dim 1 of (B, L, M) tensors, h_{-1} = 0.

    Every chunk is first scanned from a zero state, all chunks in one vectorised step per token.
    The chunks' last states then form a shorter recurrence of the same kind, whose solution is what
    enters each chunk from the left: it is added, decayed by the prefix product of ``a``. Nothing is
    divided, so strong decay (products that underflow to zero) stays exact.
    """
    batch, length, width = b.shape
    if length <= CHUNK:
        return _scan_tokens(a, b)
    chunks = length // CHUNK
    body = chunks * CHUNK
    h = torch.empty_like(b)
    prefix = torch.empty(batch, chunks, CHUNK, width, dtype=b.dtype, device=b.device)
    h_body = h[:, :body].view(prefix.shape)
    # views of each token taken once: indexing at every step costs as much as the arithmetic
    a_at, b_at, h_at, prefix_at = (
        t.unbind(2)
        for t in (a[:, :body].view(prefix.shape), b[:, :body].view(prefix.shape), h_body, prefix)
    )
    prefix_at[0].copy_(a_at[0])
    h_at[0].copy_(b_at[0])
    for t in range(1, CHUNK):
        torch.mul(prefix_at[t - 1], a_at[t], out=prefix_at[t])
        torch.addcmul(b_at[t], a_at[t], h_at[t - 1], out=h_at[t])
    ends = _scan(prefix[:, :, -1].contiguous(), h_body[:, :, -1].contiguous())
    h_body[:, 1:].addcmul_(prefix[:, 1:], ends[:, :-1, None])
    if body < length:  # the ragged tail, shorter than a chunk
        tail = b[:, body:].clone()
        tail[:, 0].addcmul_(a[:, body], ends[:, -1])
        h[:, body:] = _scan_tokens(a[:, body:], tail)
    return h


def _scan_tokens(a: Tensor, b: Tensor) -> Tensor:
    """The same recurrence one token after the other."""
    h = torch.empty_like(b)
    a_at, b_at, h_at = a.unbind(1), b.unbind(1), h.unbind(1)
    h_at[0].copy_(b_at[0])
    for t in range(1, len(h_at)):
        torch.addcmul(b_at[t], a_at[t], h_at[t - 1], out=h_at[t])
    return h


def recurrence(a: Tensor, b: Tensor) -> Tensor:
    """Solve h_t = a_t * h_{t-1} + b_t with h_{-1} = 0 (the first line of Eq. 2).

    Args:
        a: Decays, (B, L, ...), contiguous, floating point.
        b: Inputs, same shape and dtype.

    Returns:
        h, (B, L, ...). Not differentiable by autograd: see :func:`recurrence_backward`.
    """
    if torch.compiler.is_dynamo_compiling():
        return _recurrence_operator(a, b)
    return _scan(a.flatten(2), b.flatten(2)).view(b.shape)


# For torch.compile, which would else write out each step of each level of chunks.
@torch.library.custom_op('groupmamba_mm::recurrence_of_decays', mutates_args=())
def _recurrence_operator(a: Tensor, b: Tensor) -> Tensor:
    return _scan(a.flatten(2).contiguous(), b.flatten(2).contiguous()).view(b.shape)


@_recurrence_operator.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty(b.shape, dtype=b.dtype, device=b.device)


def recurrence_backward(a: Tensor, h: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`recurrence`.

    Args:
        a: Its decays, (B, L, ...).
        h: Its output.
        grad_h: Gradient of the loss with respect to ``h``.

    Returns:
        The gradients with respect to ``a`` and ``b``, (B, L, ...) each.
    """
    # g_t = grad_t + a_{t+1} g_{t+1}: the same recurrence from the end, the decays one token later
    decay = torch.empty_like(a)
    decay[:, 0] = 0
    decay[:, 1:] = a[:, 1:].flip(1)
    grad_b = recurrence(decay, grad_h.flip(1)).flip(1)
    grad_a = torch.empty_like(a)
    grad_a[:, 0] = 0
    torch.mul(grad_b[:, 1:], h[:, :-1], out=grad_a[:, 1:])
    return grad_a, grad_b


def recorded_recurrence(log_a: Tensor, b: Tensor) -> Tensor:
    """:func:`recurrence` for exporters and tracers, which mistake writes into views.

    With a length that is known the levels of chunks are as many as it needs; else
    :data:`RECORDED_LEVELS`, which are right for any length. Differentiable by autograd, except
    :func:`as_one_node`.

    Args:
        log_a: Logarithms of the decays, (B, L, ...), floating point.
        b: Inputs, same shape and dtype.

    Returns:
        h, (B, L, ...).
    """
    if _as_one_node:
        return _recurrence_node(log_a, b)
    length, levels = b.shape[1], RECORDED_LEVELS
    if isinstance(length, int):
        levels = next(
            n
            for n in range(RECORDED_LEVELS + 1)
            if length <= RECORDED_CHUNK ** (n + 1) or n == RECORDED_LEVELS
        )
    return _record_chunks(log_a.flatten(2), b.flatten(2), levels).view(b.shape)


_as_one_node = False  # a plain global, which torch.compile can read


@contextmanager
def as_one_node() -> Iterator[None]:
    """Record each recurrence as the operator ``groupmamba_mm::recurrence``.

    For exporters that know how to write it; see :mod:`groupmamba_mm.export`.
    """
    global _as_one_node
    before, _as_one_node = _as_one_node, True
    try:
        yield
    finally:
        _as_one_node = before


@torch.library.custom_op('groupmamba_mm::recurrence', mutates_args=())
def _recurrence_node(log_a: Tensor, b: Tensor) -> Tensor:
    return recurrence(log_a.exp(), b)


@_recurrence_node.register_fake
def _(log_a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(b)


def _record_chunks(log_a: Tensor, b: Tensor, levels: int) -> Tensor:
    """The scheme of :func:`_scan` with logarithms of the decays, which add up to the prefixes."""
    if levels == 0:
        return _record_pairs(log_a, b)
    length = b.shape[1]
    if isinstance(length, int):
        chunks = -(-length // RECORDED_CHUNK)
    else:
        chunks = length // RECORDED_CHUNK + 2  # two at least: for exporters, one is a special case
    # a decay of one and an input of zero behind the last token
    padding = b.new_zeros(b.shape[0], chunks * RECORDED_CHUNK - length, b.shape[2])
    log_a, b = (
        torch.cat((t, padding), 1).unflatten(1, (chunks, RECORDED_CHUNK)) for t in (log_a, b)
    )
    log_prefix = log_a.cumsum(2)
    states = []
    for a_at, b_at in zip(log_a.exp().split(1, dim=2), b.split(1, dim=2)):  # (B, chunks, 1, M)
        states.append(a_at * states[-1] + b_at if states else b_at)
    ends = _record_chunks(log_prefix[:, :, -1], states[-1].squeeze(2), levels - 1)
    entering = torch.cat((torch.zeros_like(ends[:, :1]), ends), 1)[:, :chunks]
    h = torch.cat(states, dim=2) + log_prefix.exp() * entering[:, :, None]
    return h.flatten(1, 2).index_select(1, torch.arange(length, device=h.device))


def _record_pairs(log_a: Tensor, b: Tensor) -> Tensor:
    """h_t = sum over s <= t of exp(sum of log_a over (s, t]) b_s, all pairs at once.

    Sums over each interval, not differences of sums from the start, which cancel.
    """
    at = torch.arange(b.shape[1], device=b.device)
    behind = (at[:, None] < at[None, :])[None, :, :, None]  # t behind s, (1, s, t, 1)
    log_decay = (log_a[:, None] * behind).cumsum(2)
    decay = log_decay.exp() * (at[:, None] <= at[None, :])[None, :, :, None]
    return (decay * b[:, :, None]).sum(1)
