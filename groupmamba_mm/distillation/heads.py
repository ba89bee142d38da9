"""Classification heads that learn from the label and from a teacher (Eq. 10).

``alpha`` is the weight of the label, as in Eq. 10. In DeiT's and the released code ``alpha`` is the
weight of the teacher, ``1 - alpha`` here.

The parameters have the names of the heads without a teacher, so a checkpoint serves both.
"""

from abc import ABC, abstractmethod

from mmengine.registry import MODELS
from mmpretrain.models.heads import LinearClsHead
from mmpretrain.structures import DataSample
from torch import Tensor

from groupmamba_mm.heads import TwoHeadClsHead

_DEFAULT_LOSS = dict(type='DistillationLoss', kind='hard')


class DistilledHead(ABC):
    """The objective that heads with a teacher share; mixed into an mmpretrain head.

    Args:
        *args: See the head.
        alpha: Weight of the label's loss, from 0 to 1; the teacher's is ``1 - alpha``.
        distill_loss: Config of the teacher's loss.
        **kwargs: See the head.

    Raises:
        ValueError: ``alpha`` is outside of 0 to 1.
    """

    def __init__(
        self, *args, alpha: float = 0.5, distill_loss: dict = _DEFAULT_LOSS, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= alpha <= 1:
            raise ValueError(
                f'alpha must be from 0 (teacher alone) to 1 (label alone), got {alpha}'
            )
        self.alpha = alpha
        self.distill_loss = MODELS.build(distill_loss)

    @abstractmethod
    def branches(self, feats: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The logits that learn from the label and those that learn from the teacher, (B, K)."""

    def loss(
        self, feats: tuple[Tensor, ...], data_samples: list[DataSample], teacher_logits: Tensor
    ) -> dict[str, Tensor]:
        """Compute ``alpha * L(label) + (1 - alpha) * L(teacher)``, the two terms apart.

        Args:
            feats: The backbone's output; the last one is (B, in_channels).
            data_samples: The labels, as classes or as probabilities (after Mixup and CutMix).
            teacher_logits: (B, K).

        Returns:
            The two weighted terms ``loss_label`` and ``loss_teacher``, and with ``cal_acc`` the
            accuracy of the logits that learn from the label.
        """
        for_label, for_teacher = self.branches(feats)
        losses = self._get_loss(for_label, data_samples)
        losses['loss_label'] = self.alpha * losses.pop('loss')
        losses['loss_teacher'] = (1 - self.alpha) * self.distill_loss(for_teacher, teacher_logits)
        return losses


@MODELS.register_module()
class DistilledLinearClsHead(DistilledHead, LinearClsHead):
    """One linear layer that learns from both (Eq. 10).

    Args:
        *args: See mmpretrain's ``LinearClsHead``.
        **kwargs: See there and :class:`DistilledHead`.
    """

    def branches(self, feats: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """See :meth:`DistilledHead.branches`; here they are the same logits."""
        logits = self(feats)
        return logits, logits


@MODELS.register_module()
class DistilledTwoHeadClsHead(DistilledHead, TwoHeadClsHead):
    """A linear layer for the label and one for the teacher, as in the released model.

    At test time the logits are their mean.

    Args:
        *args: See :class:`groupmamba_mm.heads.TwoHeadClsHead`.
        **kwargs: See there and :class:`DistilledHead`.
    """

    def branches(self, feats: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """See :meth:`DistilledHead.branches`."""
        return self.forward_heads(feats)
