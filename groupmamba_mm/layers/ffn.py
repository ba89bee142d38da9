"""Feed-forward networks."""

import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import GridDepthwiseConv
from .grouped import GroupedLinear


class FFN(nn.Module):
    """GELU(X W1 + b1) W2 + b2, Eq. 5.

    Args:
        channels: Number of channels C.
        ratio: Hidden width over C.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class GroupedFFN(nn.Module):
    """Eq. 5 in each group on its own.

    Args:
        width: Channels d of a group.
        num_groups: Number of groups G.
        ratio: Hidden width over d.
    """

    def __init__(self, width: int, num_groups: int, ratio: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.fc1 = GroupedLinear(width, hidden, num_groups)
        self.fc2 = GroupedLinear(hidden, width, num_groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, G, d) to (B, L, G, d)."""
        return self.fc2(F.gelu(self.fc1(x)))


class ConvFFN(nn.Module):
    """The released model's FFN, with a 3x3 depthwise convolution before the GELU.

    Args:
        channels: Number of channels C.
        ratio: Hidden width over C.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = GridDepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, C) tokens of an H x W grid to (B, L, C)."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), grid)))
