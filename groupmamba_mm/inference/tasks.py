"""What differs between the tasks: how a prediction is reported and drawn."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np


class Task(ABC):
    """One task.

    Args:
        classes: Names of the classes; None: their numbers are said.
        score_thr: Detections below this score are left out.
        top: Number of classes that a classifier names.
    """

    visualizer: str

    def __init__(self, classes: Sequence[str] | None, score_thr: float, top: int) -> None:
        self.classes = classes
        self.score_thr = score_thr
        self.top = top

    @abstractmethod
    def describe(self, sample: Any) -> dict[str, Any]:
        """A data sample as plain data.

        Args:
            sample: The library's data sample.

        Returns:
            What JSON can hold.
        """

    def draw(self, visualizer: Any, rgb: np.ndarray, sample: Any) -> None:
        """Draw a prediction; the visualizer keeps the picture.

        Args:
            visualizer: The library's.
            rgb: The image (H, W, 3), uint8, RGB.
            sample: The library's data sample.
        """
        visualizer.add_datasample('image', rgb, sample, draw_gt=False)

    def name(self, label: int) -> str:
        """A class's name."""
        return str(label) if self.classes is None else self.classes[label]


class Classification(Task):
    """mmpretrain's classifiers."""

    visualizer = 'UniversalVisualizer'

    def describe(self, sample: Any) -> dict[str, Any]:
        """See :class:`Task`."""
        scores = sample.pred_score
        best = scores.argsort(descending=True)[: self.top].tolist()
        return dict(
            label=self.name(best[0]),
            score=round(scores[best[0]].item(), 4),
            top=[dict(label=self.name(i), score=round(scores[i].item(), 4)) for i in best],
        )

    def draw(self, visualizer: Any, rgb: np.ndarray, sample: Any) -> None:
        """See :class:`Task`."""
        visualizer.visualize_cls(rgb, sample, classes=self.classes, draw_gt=False)


class Detection(Task):
    """mmdet's detectors."""

    visualizer = 'DetLocalVisualizer'

    def describe(self, sample: Any) -> dict[str, Any]:
        """See :class:`Task`."""
        found = sample.pred_instances
        found = found[found.scores >= self.score_thr]
        instances = []
        for i in range(len(found)):
            entry = dict(
                label=self.name(int(found.labels[i])),
                score=round(found.scores[i].item(), 4),
                box=[round(side, 1) for side in found.bboxes[i].tolist()],
            )
            if 'masks' in found:
                entry['mask_pixels'] = int(found.masks[i].sum())
            instances.append(entry)
        return dict(instances=instances)

    def draw(self, visualizer: Any, rgb: np.ndarray, sample: Any) -> None:
        """See :class:`Task`."""
        visualizer.add_datasample(
            'image', rgb, sample.cpu(), draw_gt=False, pred_score_thr=self.score_thr
        )


class Segmentation(Task):
    """mmseg's segmenters."""

    visualizer = 'SegLocalVisualizer'

    def describe(self, sample: Any) -> dict[str, Any]:
        """See :class:`Task`."""
        labels, counts = sample.pred_sem_seg.data.unique(return_counts=True)
        total = counts.sum().item()
        order = counts.argsort(descending=True).tolist()
        return dict(
            share={self.name(int(labels[i])): round(counts[i].item() / total, 4) for i in order}
        )


#: The task of each library.
TASKS = {'mmpretrain': Classification, 'mmdet': Detection, 'mmseg': Segmentation}
