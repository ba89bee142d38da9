"""An FFN without a convolution, Eq. 5: GELU(x W1^T + b1) W2^T + b2.

In half precision, on a GPU with the shared memory of an H100, GELU is in the kernel of the first
product if that has up to 512 inputs. With up to 256 channels before and behind, unless the hidden
tensor is to be kept, so is its gradient (:mod:`.hidden`).
"""

import torch.nn.functional as F
from torch import Tensor

from ..linear import linear, linear_input_gradient, linear_weight_gradient
from .hidden import ffn_forward, fits, fits_wide, gelu_backward, hidden_backward, wide_forward


def plain_ffn_forward(x: Tensor, in_weight: Tensor, in_bias: Tensor, weight: Tensor, bias: Tensor,
                      keep_hidden: bool) -> tuple[Tensor, Tensor | None]:
    """The FFN.

    Args:
        x: (B, L, I) tokens; fp32, bf16 or fp16.
        in_weight: (C, I) in the dtype of ``x``.
        in_bias: (C,) in any float dtype.
        weight: (O, C) in the dtype of ``x``.
        bias: (O,) in any float dtype.
        keep_hidden: Whether the hidden tensor is kept for the backward pass, or recomputed there.

    Returns:
        (B, L, O) in the dtype of ``x``; and what is kept, (B, L, C) or None.
    """
    if not keep_hidden and fits(x, x.shape[2], weight.shape[0]):
        return ffn_forward(x, in_weight, in_bias, weight, bias), None
    if fits_wide(x):
        activation, hidden = wide_forward(x, in_weight, in_bias, keep_hidden)
    else:
        hidden = linear(x, in_weight, in_bias)
        activation = F.gelu(hidden)
    return linear(activation, weight, bias), hidden if keep_hidden else None


def plain_ffn_backward(dy: Tensor, hidden: Tensor | None, x: Tensor, in_weight: Tensor,
                       in_bias: Tensor, weight: Tensor, din_weight: Tensor,
                       dweight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`plain_ffn_forward`, but for that of ``bias``.

    Args:
        dy: (B, L, O), contiguous.
        hidden: What was kept, or None.
        x, in_weight, in_bias, weight: As there.
        din_weight, dweight: Where to write those of in_weight and weight.

    Returns:
        The gradients of x, and of in_bias in fp32.
    """
    if hidden is None and fits(x, x.shape[2], weight.shape[0]):
        dhidden, activation, din_bias = hidden_backward(x, in_weight, in_bias, dy, weight)
    else:
        hidden = linear(x, in_weight, in_bias) if hidden is None else hidden
        dhidden, activation, din_bias = gelu_backward(hidden, linear_input_gradient(dy, weight))
    del hidden
    linear_weight_gradient(dy, activation, out=dweight)
    del activation
    linear_weight_gradient(dhidden, x, out=din_weight)
    return linear_input_gradient(dhidden, in_weight), din_bias
