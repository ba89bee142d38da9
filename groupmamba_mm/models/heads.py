"""The linear classifiers of both families, with mmpretrain's names, so that weights serve both."""

from torch import Tensor, nn


class LinearHead(nn.Module):
    """One linear layer.

    Args:
        channels: Width C of the feature vector.
        num_classes: Number of classes K; 0 gives the features back.
    """

    layers = ('fc',)

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        for name in self.layers:
            self.add_module(
                name, nn.Linear(channels, num_classes) if num_classes else nn.Identity()
            )

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) to logits (B, K)."""
        return self.fc(features)

    def classifiers(self) -> tuple[nn.Module, ...]:
        """The layers whose outputs are logits."""
        return tuple(getattr(self, name) for name in self.layers)


class TwoLinearHead(LinearHead):
    """The released model's two layers, whose mean are the logits.

    Args: as :class:`LinearHead`.
    """

    layers = ('label_fc', 'teacher_fc')

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) to logits (B, K)."""
        return (self.label_fc(features) + self.teacher_fc(features)) / 2
