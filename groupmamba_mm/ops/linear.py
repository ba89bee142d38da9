"""Linear layers as the operators need them inside: in one precision, whatever autocast says."""
from typing import Optional, Tuple

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight^T + bias of (B, L, I) tokens, (B, L, O), in the dtype of both x and weight."""
    with torch.autocast(x.device.type, enabled=False):
        y = torch.addmm(bias.to(x.dtype), x.flatten(0, 1), weight.t())
    return y.unflatten(0, x.shape[:2])


def linear_gradients(grad_y: Tensor, x: Tensor,
                     wants_bias: bool = True) -> Tuple[Tensor, Optional[Tensor]]:
    """Gradients of the weight, (O, I), and of the bias, (O,) or None, of :func:`linear`.

    Args:
        grad_y: (B, L, O).
        x: (B, L, I).
        wants_bias: Whether the bias needs one.
    """
    from .sums import column_sums
    grad_y = grad_y.flatten(0, 1)
    with torch.autocast(x.device.type, enabled=False):
        grad_weight = grad_y.t() @ x.flatten(0, 1)
    return grad_weight, column_sums(grad_y, grad_y.dtype) if wants_bias else None


def linear_input_gradient(grad_y: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the tokens, a contiguous (B, L, I) of its own."""
    with torch.autocast(grad_y.device.type, enabled=False):
        grad_x = grad_y.flatten(0, 1) @ weight
    return grad_x.unflatten(0, grad_y.shape[:2])
