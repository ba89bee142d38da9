"""What of a model is exported, and how its graph is recorded."""

import torch
from torch import Tensor, nn

from groupmamba_mm.backbones import GroupMamba
from groupmamba_mm.errors import ConfigError
from groupmamba_mm.models import GroupMambaClassifier


class Logits(nn.Module):
    """A classifier of mmpretrain as a plain module.

    Args:
        model: The classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, K)."""
        return self.model(image, mode='tensor')


def exported_module(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The part of a model that other runtimes can run: a classifier, or a dense backbone.

    Args:
        model: A classifier, detector or segmenter with a ``backbone``, or a backbone. The scans of
            it are set to the backend ``'torch'``, the one that is recorded.

    Returns:
        The module from normalised images (B, C, H, W) to its outputs, in eval mode, and the
        outputs' names.

    Raises:
        ConfigError: The model has no GroupMamba backbone.
    """
    backbone = getattr(model, 'backbone', model)
    if not isinstance(backbone, GroupMamba):
        raise ConfigError(
            f'the backbone is {type(backbone).__name__}, and only models on GroupMamba are exported'
        )
    for module in backbone.modules():
        if hasattr(module, 'scan_backend'):
            module.scan_backend = 'torch'
    if backbone.out_indices is not None:
        return backbone.eval(), tuple(f'stage{i + 1}' for i in backbone.out_indices)
    if model is backbone:
        return backbone.eval(), ('features',)
    plain = isinstance(model, GroupMambaClassifier)
    return (model if plain else Logits(model)).eval(), ('logits',)


def example_image(module: nn.Module, batch: int, size: tuple[int, int]) -> Tensor:
    """A random image (B, C, H, W) on the CPU for a module of :func:`exported_module`."""
    backbone = next(m for m in module.modules() if isinstance(m, GroupMamba))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, backbone.in_channels, *size, generator=generator)
