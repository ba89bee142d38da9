"""Stems and down-sampling: from an image to tokens, and from one stage to the next."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import ConvNormReLU, TokenNorm


class ImageConv(nn.Conv2d):
    """The first convolution, 7x7 of stride 2 without bias, in a form that suits GPUs.

    Tensor cores want 8 or 16 input channels, an image has three. On a GPU the convolution is
    therefore one of stride 1 with 4x4 taps over blocks of 2x2 pixels: the same products and sums,
    with the kernel padded to 8x8 taps by zeros.

    Args:
        in_channels: Channels of the image.
        out_channels: Output channels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 7, stride=2, padding=3, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W'), halved and rounded up."""
        if not image.is_cuda:
            return super().forward(image)
        return self.over_blocks(image)

    def over_blocks(self, image: Tensor) -> Tensor:
        """:meth:`forward` over blocks of 2x2 pixels."""
        bottom, right = (2 + size % 2 for size in image.shape[2:])
        blocks = F.pixel_unshuffle(F.pad(image, (4, right, 4, bottom)), 2)
        weight = F.pixel_unshuffle(F.pad(self.weight, (1, 0, 1, 0)), 2)
        channels = (0, 0, 0, 0, 0, -blocks.shape[1] % 8)
        blocks = F.pad(blocks, channels).contiguous(memory_format=torch.channels_last)
        return F.conv2d(blocks, F.pad(weight, channels))


class _ConvEmbedding(nn.Module):
    """Convolutions, then LayerNorm over the channels; tokens out."""

    def __init__(self, convs: nn.Module, out_channels: int, scan_backend: str) -> None:
        super().__init__()
        self.convs = convs
        self.norm = TokenNorm(out_channels, 1e-5, scan_backend)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C_in, H, W) to tokens (B, L, C_out) and their grid (H', W')."""
        x = self.convs(image.contiguous(memory_format=torch.channels_last))
        grid = (x.shape[2], x.shape[3])
        return self.norm(x.permute(0, 2, 3, 1).flatten(1, 2)), grid  # (B, C, H, W) -> (B, L, C)


class PaperStem(_ConvEmbedding):
    """Table 6: two 3x3 convolutions of stride 2; BN and ReLU between, LN after, as released.

    Args:
        in_channels: Channels of the image.
        stem_channels: Channels after the first convolution.
        out_channels: Channels C1 of the first stage.
        scan_backend: See :func:`groupmamba_mm.ops.backend.choose_backend`; the norms run where the
            scans do.
    """

    def __init__(
        self, in_channels: int, stem_channels: int, out_channels: int, scan_backend: str
    ) -> None:
        super().__init__(
            ConvNormReLU(
                nn.Conv2d(in_channels, stem_channels, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(stem_channels),
                nn.ReLU(),
                nn.Conv2d(stem_channels, out_channels, 3, stride=2, padding=1),
                scan_backend=scan_backend,
            ),
            out_channels,
            scan_backend,
        )


class OfficialStem(_ConvEmbedding):
    """The released stem: a 7x7 convolution of stride 2, two 3x3, a 3x3 of stride 2, LN.

    Args:
        in_channels: Channels of the image.
        stem_channels: Channels of the first three convolutions.
        out_channels: Channels C1 of the first stage.
        scan_backend: See :func:`groupmamba_mm.ops.backend.choose_backend`; the norms run where the
            scans do.
    """

    def __init__(
        self, in_channels: int, stem_channels: int, out_channels: int, scan_backend: str
    ) -> None:
        super().__init__(
            ConvNormReLU(
                ImageConv(in_channels, stem_channels),
                nn.BatchNorm2d(stem_channels),
                nn.ReLU(),
                nn.Conv2d(stem_channels, stem_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(stem_channels),
                nn.ReLU(),
                nn.Conv2d(stem_channels, stem_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(stem_channels),
                nn.ReLU(),
                nn.Conv2d(stem_channels, out_channels, 3, stride=2, padding=1),
                scan_backend=scan_backend,
            ),
            out_channels,
            scan_backend,
        )


class Downsample(_ConvEmbedding):
    """A 3x3 convolution of stride 2 with bias, then LN (Table 6 and the released model alike).

    Args:
        in_channels: Channels of the stage before.
        out_channels: Channels of the next stage.
        scan_backend: See :class:`PaperStem`.
    """

    def __init__(self, in_channels: int, out_channels: int, scan_backend: str) -> None:
        conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        super().__init__(conv, out_channels, scan_backend)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, L, C_in) of ``grid`` to (B, L', C_out) and their grid, rounded up."""
        return super().forward(x.unflatten(1, grid).permute(0, 3, 1, 2))  # -> (B, C, H, W)


class NormedDownsample(Downsample):
    """The released order: a LayerNorm (norm1 to norm3, eps 1e-6) precedes the convolution."""

    def __init__(self, in_channels: int, out_channels: int, scan_backend: str) -> None:
        super().__init__(in_channels, out_channels, scan_backend)
        self.pre_norm = TokenNorm(in_channels, 1e-6, scan_backend, before_product=True)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """As :meth:`Downsample.forward`."""
        return super().forward(self.pre_norm(x), grid)
