"""A forward pass of a detector whose work does not depend on what it finds."""

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

#: Boxes that the second stage is run on; of them, mmdet gives the first 100 to a mask head.
NUM_PROPOSALS = 1000

#: What is counted of a two-stage detector, for the tools to print beside their figures.
CONVENTION = (
    f'two-stage detector: backbone, neck, RPN head, box head on {NUM_PROPOSALS} dummy '
    "boxes and mask head on the first 100 of them, which is mmdet's convention; choosing "
    'boxes and cutting out their features are not counted'
)


def is_two_stage(model: nn.Module) -> bool:
    """Tell whether :func:`run_two_stage` can run a model."""
    return all(getattr(model, part, False) for part in ('with_rpn', 'with_roi_head'))


def run_two_stage(model: nn.Module, image: Tensor) -> None:
    """Run all parts of a two-stage detector once, on dummy boxes instead of the RPN's.

    Args:
        model: An mmdet ``TwoStageDetector``.
        image: (B, 3, H, W).
    """
    maps = model.extract_feat(image)
    model.rpn_head(maps)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0], device=image.device).expand(NUM_PROPOSALS, 4)
    model.roi_head.forward(maps, [InstanceData(bboxes=boxes) for _ in image])
