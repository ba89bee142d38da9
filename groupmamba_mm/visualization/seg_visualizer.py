"""mmseg's visualizer with names of any script."""

import numpy as np
from mmengine.registry import VISUALIZERS
from mmengine.structures import PixelData
from mmseg.visualization import SegLocalVisualizer


@VISUALIZERS.register_module()
class NamedSegVisualizer(SegLocalVisualizer):
    """mmseg's visualizer, which writes names by matplotlib: OpenCV knows Latin letters only.

    Args: as :class:`mmseg.visualization.SegLocalVisualizer`.
    """

    def _draw_sem_seg(
        self,
        image: np.ndarray,
        sem_seg: PixelData,
        classes: list | None,
        palette: list | None,
        with_labels: bool | None = True,
    ) -> np.ndarray:
        drawn = super()._draw_sem_seg(image, sem_seg, classes, palette, with_labels=False)
        labels = np.asarray(sem_seg.cpu().data)[0]
        found = [label for label in np.unique(labels) if label < len(classes)]
        if not with_labels or not found:
            return drawn
        self.set_image(drawn)
        places = np.stack(
            [self._get_center_loc((labels == label).astype(np.uint8)) for label in found]
        )
        self.draw_texts(
            [str(classes[label]) for label in found],
            places,
            colors='w',
            font_sizes=max(6, min(image.shape[:2]) // 25),
            bboxes=[
                dict(facecolor=np.asarray(palette[label]) / 255, edgecolor='black', pad=1)
                for label in found
            ],
        )
        return self.get_image()
