"""Norms outside the blocks, in kernels where the scans are: on a GPU they wait for memory alone."""

import torch
from torch import Tensor, nn

from groupmamba_mm.ops import resolve_backend

from .fused import compute_dtype, is_watched


class TokenNorm(nn.LayerNorm):
    """LayerNorm of tokens.

    Args:
        channels: Number of channels C.
        eps: Added to the variance.
        scan_backend: See :func:`groupmamba_mm.ops.backend.choose_backend`.
        before_product: Whether the result goes into a product alone. In kernels it is then made in
            autocast's precision, to which the product would round it.
    """

    def __init__(
        self, channels: int, eps: float, scan_backend: str, before_product: bool = False
    ) -> None:
        super().__init__(channels, eps=eps)
        self.scan_backend = scan_backend
        self.before_product = before_product

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        if not _runs_kernels(self.scan_backend, x):
            return super().forward(x)
        from groupmamba_mm.ops.norm.layer_norm import layer_norm

        dtype = compute_dtype(x)
        if not self.before_product and torch.is_autocast_enabled(x.device.type):
            dtype = torch.float32  # autocast's of a norm on a GPU
        return layer_norm(x, self.weight, self.bias, self.eps, dtype)


class ConvNormReLU(nn.Sequential):
    """Convolutions with BatchNorm and ReLU between them.

    Args:
        layers: Conv2d, BatchNorm2d and ReLU, in their order.
        scan_backend: See :func:`groupmamba_mm.ops.backend.choose_backend`.
    """

    def __init__(self, *layers: nn.Module, scan_backend: str) -> None:
        super().__init__(*layers)
        self.scan_backend = scan_backend

    def forward(self, image: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W')."""
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and _fuses(layer, layers[0]) and _runs_kernels(self.scan_backend, image):
                layers.pop(0)
                image = _norm_relu(layer, image)
            else:
                image = layer(image)
        return image


def _runs_kernels(scan_backend: str, x: Tensor) -> bool:
    # a compiler makes kernels of its own
    return (
        not torch.compiler.is_compiling()
        and resolve_backend(scan_backend, x.device, x.dtype) == 'triton'
    )


def _fuses(norm: nn.Module, activation: nn.Module) -> bool:
    """Whether the kernels do what these two do; else each is called, with its hooks."""
    return (
        type(norm) is nn.BatchNorm2d
        and type(activation) is nn.ReLU
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and not is_watched(norm)
        and not is_watched(activation)
    )


def _norm_relu(norm: nn.BatchNorm2d, image: Tensor) -> Tensor:
    from groupmamba_mm.ops.norm.batch_norm import batch_norm_relu

    if norm.training:
        if image.numel() == image.shape[1]:
            return norm(image)  # torch's own error: one value has no variance
        norm.num_batches_tracked.add_(1)
    return batch_norm_relu(
        image,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.training,
        norm.momentum,
        norm.eps,
    )
