"""The region proposal network inside of mixed precision."""

from mmdet.models.dense_heads import RPNHead
from mmengine.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class Fp32RPNHead(RPNHead):
    """mmdet's RPN head whose scores and offsets are fp32, whatever its convolutions compute in.

    mmdet makes the anchors in the precision of the scores. In bf16 that rounds an anchor's corners
    above 1024 to multiples of 8 pixels, and mmcv's NMS does not take bf16 boxes at all. Outside of
    mixed precision it computes what its base class does.

    It takes the arguments of ``mmdet.models.dense_heads.RPNHead``.
    """

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Score the anchors of one level.

        Args:
            x: (B, C, H, W).

        Returns:
            Scores (B, A, H, W) and box offsets (B, 4 * A, H, W) of A anchors a place, fp32.
        """
        scores, offsets = super().forward_single(x)
        return scores.float(), offsets.float()
