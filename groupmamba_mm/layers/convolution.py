"""Depthwise convolutions over channels-last tokens: on the grid, and along a scan."""
from typing import Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupmamba_mm.ops.selective_scan import from_scan_order, to_scan_order
from groupmamba_mm.ops.selective_scan.directions import is_column_major, is_reversed


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


class DirectionalConv1d(nn.Module):
    """Causal depthwise convolution along the sequence that each group's scan visits.

    Args:
        channels: Number of channels C of all groups together.
        kernel_size: Number of taps; the last one sees the current token.

    The weight is (C, 1, kernel_size) as in ``nn.Conv1d``, the bias (C,).
    """

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default for a depthwise ``nn.Conv1d``."""
        bound = self.kernel_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, grid: Tuple[int, int], directions: Sequence[str]) -> Tensor:
        """(B, L, C) row-major tokens to the same, group g convolved along ``directions[g]``."""
        groups = len(directions)
        return torch.cat([
            self._convolve(tokens, weight, bias, grid, direction)
            for tokens, weight, bias, direction in zip(
                x.chunk(groups, -1), self.weight.chunk(groups), self.bias.chunk(groups), directions)
        ], dim=-1)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor, grid: Tuple[int, int],
                  direction: str) -> Tensor:
        column_major = is_column_major(direction)
        if column_major:
            x = to_scan_order(x, grid, 'top-bottom')
        # a reversed sequence is not flipped: its past lies behind the token instead of before it
        past = self.kernel_size - 1
        if is_reversed(direction):
            x, weight = F.pad(x, (0, 0, 0, past)), weight.flip(-1)
        else:
            x = F.pad(x, (0, 0, past, 0))
        # as a 2-D convolution of a grid of one row, because that has a channels-last kernel
        x = x.transpose(1, 2).unsqueeze(2)  # (B, L, C) -> (B, C, 1, L), no copy
        y = F.conv2d(x, weight.unsqueeze(2), bias, groups=weight.shape[0])
        y = y.squeeze(2).transpose(1, 2)  # (B, C, 1, L) -> (B, L, C)
        return from_scan_order(y, grid, 'top-bottom') if column_major else y

    def extra_repr(self) -> str:
        return f'{self.weight.shape[0]}, kernel_size={self.kernel_size}'
