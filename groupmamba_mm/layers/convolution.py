"""Depthwise convolutions over channels-last tokens: on the grid, and along a sequence."""

from torch import Tensor, nn

from groupmamba_mm.ops import causal_conv1d_silu


class GridDepthwiseConv(nn.Conv2d):
    """3x3 depthwise convolution with bias of (B, L, C) tokens on their H x W grid.

    Args:
        channels: Number of channels C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        if tuple(grid) == (1, 1):  # of one token only the middle tap sees more than zeros
            # cuDNN takes some 3 s to prepare kernels for it when a training starts
            return (x * self.weight[:, 0, 1, 1] + self.bias).to(x.dtype)
        x = x.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, L, C) -> (B, C, H, W), no copy
        x = super().forward(x)
        return x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, C, H, W) -> (B, L, C)


class CausalConv1d(nn.Conv1d):
    """Causal depthwise convolution with bias of (B, L, C) tokens along their sequence, then SiLU.

    Args:
        channels: Number of channels C.
        kernel_size: Number of taps; the last one sees the current token.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels)

    def forward(self, x: Tensor, backend: str = 'torch') -> Tensor:
        """(B, L, C) to (B, L, C), see :func:`groupmamba_mm.ops.causal_conv1d_silu`."""
        return causal_conv1d_silu(x, self.weight, self.bias, backend=backend)
