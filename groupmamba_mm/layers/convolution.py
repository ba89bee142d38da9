"""Depthwise convolutions over channels-last tokens: on the grid, and along a sequence."""
from typing import Tuple

import torch.nn.functional as F
from torch import Tensor, nn


class GridDepthwiseConv(nn.Conv2d):
    """3x3 depthwise convolution with bias of (B, L, C) tokens on their H x W grid.

    Args:
        channels: Number of channels C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor, grid: Tuple[int, int]) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        x = x.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, L, C) -> (B, C, H, W), no copy
        x = super().forward(x)
        return x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, C, H, W) -> (B, L, C)


class CausalConv1d(nn.Conv1d):
    """Causal depthwise convolution with bias of (B, L, C) tokens along their sequence.

    Args:
        channels: Number of channels C.
        kernel_size: Number of taps; the last one sees the current token.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        x = F.pad(x, (0, 0, self.kernel_size[0] - 1, 0))
        # as a 2-D convolution of a grid of one row, because that has a channels-last kernel
        x = x.transpose(1, 2).unsqueeze(2)  # (B, L, C) -> (B, C, 1, L), no copy
        x = F.conv2d(x, self.weight.unsqueeze(2), self.bias, groups=self.groups)
        return x.squeeze(2).transpose(1, 2)  # (B, C, 1, L) -> (B, L, C)
