"""Linear layer and LayerNorm applied to each group of channels on its own."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Of tokens (B, L, G, I) and weights (G, O, I).
GROUPED_LINEAR = 'blgi,goi->blgo'


class GroupedLinear(nn.Module):
    """One linear layer for each group, all groups in one batched product.

    Args:
        in_features: Width of a group's input.
        out_features: Width of a group's output.
        num_groups: Number of groups G.
        bias: Whether there is a bias.

    The weight is (G, out_features, in_features), the bias (G, out_features).
    """

    def __init__(
        self, in_features: int, out_features: int, num_groups: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_groups, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_groups, out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default for ``nn.Linear``, in each group."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, G, in_features) to (B, L, G, out_features)."""
        return grouped_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        groups, out_features, in_features = self.weight.shape
        return (
            f'in_features={in_features}, out_features={out_features}, num_groups={groups}, '
            f'bias={self.bias is not None}'
        )


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor = None) -> Tensor:
    """Apply ``weight[g]`` to group g: (B, L, G, I), (G, O, I) and (G, O) to (B, L, G, O)."""
    y = torch.einsum(GROUPED_LINEAR, x, weight)
    return y if bias is None else y + bias


class GroupedLayerNorm(nn.Module):
    """LayerNorm over the channels of each group, with its own scale and shift.

    Args:
        channels: Number of channels C of all groups together.
        num_groups: Number of groups G.
        eps: Added to the variance.
    """

    def __init__(self, channels: int, num_groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale one, shift zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        width = x.shape[-1] // self.num_groups
        normed = F.layer_norm(x.unflatten(-1, (self.num_groups, width)), (width,), eps=self.eps)
        return torch.addcmul(
            self.bias.to(normed.dtype), normed.flatten(-2), self.weight.to(normed.dtype)
        )

    def extra_repr(self) -> str:
        return f'{self.weight.shape[0]}, num_groups={self.num_groups}, eps={self.eps}'
