"""The digits of a demo scene as COCO instances and as a map of labels."""

import numpy as np

from .demo_scenes import CLASSES, Scene

#: Names of a label map's values: the background is 0, a digit one more than itself.
SEG_CLASSES = ('background',) + CLASSES

#: Colours (R, G, B) of :data:`SEG_CLASSES`; those of the digits are also the detector's.
SEG_PALETTE = (
    (0, 0, 0),
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (170, 110, 40),
    (128, 128, 0),
)


def label_map(scene: Scene) -> np.ndarray:
    """Write each digit's label into its visible pixels.

    Args:
        scene: The scene.

    Returns:
        Uint8 (H, W) of indices into :data:`SEG_CLASSES`.
    """
    labels = np.zeros(scene.image.shape[:2], dtype=np.uint8)
    for digit in scene.instances:
        labels[digit.mask] = digit.label + 1
    return labels


def coco_categories() -> list[dict]:
    """The categories of a COCO file: a digit's id is one more than itself."""
    return [
        dict(id=label + 1, name=name, supercategory='digit') for label, name in enumerate(CLASSES)
    ]


def coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    """Describe the visible pixels of each digit as COCO does.

    Args:
        scene: The scene.
        image_id: The id of its image.
        first_id: The id of its first annotation; the others count on from there.

    Returns:
        Annotations with the mask as compressed run lengths, in the order of the instances.
    """
    from pycocotools import mask as coco_mask

    annotations = []
    for number, digit in enumerate(scene.instances):
        runs = coco_mask.encode(np.asfortranarray(digit.mask, dtype=np.uint8))
        x1, y1, x2, y2 = digit.bbox
        annotations.append(
            dict(
                id=first_id + number,
                image_id=image_id,
                category_id=digit.label + 1,
                bbox=[x1, y1, x2 - x1, y2 - y1],
                area=int(digit.mask.sum()),
                iscrowd=0,
                segmentation=dict(size=list(runs['size']), counts=runs['counts'].decode('ascii')),
            )
        )
    return annotations
