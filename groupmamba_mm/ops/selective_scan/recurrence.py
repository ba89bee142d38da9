"""The linear recurrence h_t = a_t * h_{t-1} + b_t by recursive chunks, and its gradients."""
from typing import Tuple

import torch
from torch import Tensor

#: Tokens walked one after the other inside a chunk; all chunks advance together. Measured on two
#: CPU cores: 16 beats 8 and 32 for sequences of 196 to 67,200 tokens.
CHUNK = 16


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
        t.unbind(2) for t in (a[:, :body].view(prefix.shape), b[:, :body].view(prefix.shape),
                              h_body, prefix))
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
    return _scan(a.flatten(2), b.flatten(2)).view(b.shape)


def recurrence_backward(a: Tensor, h: Tensor, grad_h: Tensor) -> Tuple[Tensor, Tensor]:
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
