"""Channel affinity modulation (CAM), Eq. 7-9."""

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelAffinity(nn.Module):
    """Affinity(X) = sigmoid(W2 relu(W1 mean_HW(X))), Eq. 7-8.

    The paper leaves the non-linearities and the squeeze open; they are the released model's.

    Args:
        channels: Number of channels C.
        reduction: Squeeze ratio; the hidden width is C // reduction, at least 1.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to the affinities (B, 1, C) in (0, 1)."""
        return self.fc2(F.relu(self.fc1(x.mean(dim=1, keepdim=True)))).sigmoid()


class NoChannelAffinity(nn.Module):
    """The ablation without CAM: every affinity is 1."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to ones (1, 1, 1)."""
        return x.new_ones(1, 1, 1)
