"""LayerNorm of tokens by the kernels of the blocks' norms, where no block is around it."""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import add_norm_backward, add_norm_forward


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float,
               out_dtype: torch.dtype) -> Tensor:
    """LayerNorm over the channels, differentiable.

    Args:
        x: Tokens (B, L, C), any float precision.
        weight, bias: (C,).
        eps: Added to the variance.
        out_dtype: Precision of the result.

    Returns:
        (B, L, C).
    """
    return _LayerNorm.apply(x, weight, bias, eps, out_dtype)


class _LayerNorm(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, bias, eps, out_dtype):
        _, y, _, _ = add_norm_forward(x, None, None, weight, bias, eps, 1, x.shape[2], out_dtype, 0)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx, _, sums = add_norm_backward(x, None, weight, None, None, dy, None, ctx.eps, 1, 0,
                                        x.shape[2], 0, None)
        dweight, dbias = sums.to(weight.dtype).unbind()
        return dx, dweight, dbias, None, None
