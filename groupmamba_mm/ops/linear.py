"""Linear layers as the blocks need them inside: cuBLAS without autocast and autograd in between.

The forms with ``out`` are ones that autocast leaves alone.
"""

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias of (B, L, I) tokens, (B, L, O), in the dtype of x and weight."""
    batch, length, inputs = x.shape
    y = torch.empty(batch, length, weight.shape[0], dtype=x.dtype, device=x.device)
    rows, out = x.reshape(-1, inputs), y.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias if bias.dtype == x.dtype else bias.to(x.dtype), rows, weight.t(), out=out)
    return y


def linear_weight_gradient(grad_y: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of the weight, (O, I), from (B, L, O) and (B, L, I); into ``out`` if given."""
    if out is None:
        out = torch.empty(grad_y.shape[2], x.shape[2], dtype=x.dtype, device=x.device)
    return torch.mm(grad_y.flatten(0, 1).t(), x.flatten(0, 1), out=out)


def linear_input_gradient(grad_y: Tensor, weight: Tensor, add_to: Tensor | None = None) -> Tensor:
    """Gradient of the tokens, (B, L, I).

    Args:
        grad_y: (B, L, O).
        weight: (O, I).
        add_to: Contiguous (B, L, I) to which it is added in place, or None for new memory.
    """
    batch, length, _ = grad_y.shape
    rows = grad_y.flatten(0, 1)
    if add_to is not None:
        flat = add_to.view(-1, weight.shape[1])
        torch.addmm(flat, rows, weight, out=flat)
        return add_to
    grad_x = torch.empty(batch, length, weight.shape[1], dtype=grad_y.dtype, device=grad_y.device)
    torch.mm(rows, weight, out=grad_x.view(-1, weight.shape[1]))
    return grad_x
