"""The released model's classification head: two linear layers, their mean at test time."""

from mmengine.registry import MODELS
from mmpretrain.models.heads import ClsHead
from mmpretrain.structures import DataSample
from torch import Tensor, nn


@MODELS.register_module()
class TwoHeadClsHead(ClsHead):
    """Two linear heads on one feature vector; the logits are their mean.

    In the released recipe the first head learns the label and the second the teacher's decision,
    with weight 0.5 each: see :class:`groupmamba_mm.distillation.DistilledTwoHeadClsHead`. Without a
    teacher, here, both learn the label, with the same weights.

    Args:
        num_classes: Number of classes K.
        in_channels: Width of the backbone's feature vector.
        loss: Config of the loss.
        topk: The k of the training accuracy.
        cal_acc: Whether to compute the accuracy of the mean logits during training.
        init_cfg: mmengine's initialisation config; linear layers get the released truncated
            normal with std 0.02.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        loss: dict = dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk: tuple[int, ...] = (1,),
        cal_acc: bool = False,
        init_cfg: dict | None = dict(type='TruncNormal', layer='Linear', std=0.02),
    ):
        super().__init__(loss=loss, topk=topk, cal_acc=cal_acc, init_cfg=init_cfg)
        if num_classes < 1:
            raise ValueError(f'num_classes must be at least 1, got {num_classes}')
        self.num_classes = num_classes
        self.label_fc = nn.Linear(in_channels, num_classes)
        self.teacher_fc = nn.Linear(in_channels, num_classes)

    def forward_heads(self, feats: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Both heads' logits, (B, K) each."""
        features = self.pre_logits(feats)
        return self.label_fc(features), self.teacher_fc(features)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """The mean logits, (B, K)."""
        label, teacher = self.forward_heads(feats)
        return (label + teacher) / 2

    def loss(self, feats: tuple[Tensor, ...], data_samples: list[DataSample], **kwargs) -> dict:
        """Mean of the two heads' losses on the label, and their parts for the log."""
        scores = self.forward_heads(feats)
        label_loss, teacher_loss = (
            self._get_loss(score, data_samples, **kwargs) for score in scores
        )
        losses = dict(
            loss_label_head=label_loss['loss'] / 2, loss_teacher_head=teacher_loss['loss'] / 2
        )
        if self.cal_acc:
            mean = self._get_loss((scores[0] + scores[1]) / 2, data_samples, **kwargs)
            losses.update((k, v) for k, v in mean.items() if k.startswith('accuracy'))
        return losses
