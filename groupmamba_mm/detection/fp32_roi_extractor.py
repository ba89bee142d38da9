"""RoIAlign inside of mixed precision."""

from collections.abc import Sequence

import torch
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class Fp32RoIExtractor(SingleRoIExtractor):
    """mmdet's extractor of one pyramid level for each box, always computed in fp32.

    mmcv's RoIAlign has kernels for fp16, fp32 and fp64 but none for bf16, and mmdet rounds the
    boxes to the precision of the maps: in bf16, a coordinate above 1024 to a multiple of 8 pixels.
    Outside of mixed precision it computes what its base class does, but also for maps in PyTorch's
    channels-last layout, which mmcv's kernel misreads without a word.

    It takes the arguments of ``mmdet.models.roi_heads.SingleRoIExtractor``.
    """

    def forward(
        self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Cut the boxes' features out of the maps.

        Args:
            feats: Maps (B, C, H_i, W_i) of the levels, of any floating point type.
            rois: (K, 5): the number of the image, then x1, y1, x2, y2 in pixels.
            roi_scale_factor: Factor by which the boxes are enlarged first.

        Returns:
            (K, C, h, w), fp32.
        """
        with torch.autocast(rois.device.type, enabled=False):
            # mmcv's RoIAlign reads channels-last memory as if it were not
            maps = tuple(features.float().contiguous() for features in feats)
            return super().forward(maps, rois.float(), roi_scale_factor)
