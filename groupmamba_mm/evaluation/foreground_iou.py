"""The mean IoU with and without the background."""

import numpy as np
from mmengine.registry import METRICS
from mmseg.evaluation import IoUMetric


@METRICS.register_module()
class ForegroundIoUMetric(IoUMetric):
    """mmseg's metric, and beside it the mean IoU of all classes but the first.

    A background that fills most of every picture is easy, and its IoU lifts the mean. The added
    value is called ``mIoU_foreground``, in per cent as the others.

    It takes the arguments of ``mmseg.evaluation.IoUMetric``.
    """

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the metrics of all images.

        Args:
            results: For each image the areas of intersection, union, prediction and label, one
                value for each class.

        Returns:
            The metrics by their names.
        """
        metrics = super().compute_metrics(results)
        if not self.format_only:
            intersection, union = (sum(image[part] for image in results) for part in (0, 1))
            iou = (intersection[1:] / union[1:]).numpy()  # NaN: a class in neither map
            metrics['mIoU_foreground'] = round(float(np.nanmean(iou)) * 100, 2)
        return metrics
