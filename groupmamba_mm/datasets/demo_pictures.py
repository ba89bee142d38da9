"""The files of one picture of a demo data set.

Each function depends on its arguments alone, so that several processes can share the pictures out
among themselves.
"""

import signal
from pathlib import Path

import numpy as np
from PIL import Image

from groupmamba_mm.errors import DataError
from groupmamba_mm.extras import explain_missing

from .demo_annotations import SEG_PALETTE, coco_annotations, label_map
from .demo_scenes import CLASSES, Scene, compose_scene

with explain_missing('the demo data'):
    import cv2

#: A folder for each class, in the order of the labels.
CLASS_FOLDERS = tuple(f'{label}_{name}' for label, name in enumerate(CLASSES))

#: Pictures of several digits: how many at most, and their scales, see ``demo_scenes.SCALE_RANGE``.
MAX_DIGITS = 6
SCENE_SCALE_RANGE = (0.25, 0.5)


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent, which ends its workers: each would print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def compose_digit(seed: int, split: str, index: int, image_size: int) -> Scene:
    """Draw the picture of one digit; the classes take turns.

    Args:
        seed: Seed of the data set.
        split: 'train' or 'val'.
        index: Number of the picture in its split.
        image_size: Side in pixels.

    Returns:
        The scene.
    """
    return compose_scene(seed, split, index, image_size, labels=[index % len(CLASSES)])


def compose_digits(seed: int, split: str, index: int, image_size: int) -> Scene:
    """Draw the picture of 1 to ``MAX_DIGITS`` digits; their numbers take turns.

    Args:
        seed: Seed of the data set.
        split: 'train' or 'val'.
        index: Number of the picture in its split.
        image_size: Side in pixels.

    Returns:
        The scene.
    """
    return compose_scene(
        seed,
        split,
        index,
        image_size,
        num_digits=1 + index % MAX_DIGITS,
        scale_range=SCENE_SCALE_RANGE,
    )


def picture_name(index: int) -> str:
    """The file name of a picture, from its number in its split."""
    return f'{index:06d}.png'


def write_picture(path: Path, image: np.ndarray) -> None:
    """Write an image file.

    Args:
        path: The file.
        image: Uint8 RGB (H, W, 3).

    Raises:
        DataError: If it cannot be written.
    """
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
        raise DataError(f'{path} could not be written: check the free space and the permissions')


def write_digit(index: int, folder: Path, split: str, seed: int, image_size: int) -> None:
    """Write a picture for classification.

    Args:
        index: Number of the picture in its split.
        folder: Folder of the data set, with those of the classes.
        split: 'train' or 'val'.
        seed: Seed of the data set.
        image_size: Side in pixels.
    """
    scene = compose_digit(seed, split, index, image_size)
    class_folder = CLASS_FOLDERS[index % len(CLASSES)]
    write_picture(folder / split / class_folder / picture_name(index), scene.image)


def write_detection_picture(
    index: int, folder: Path, split: str, seed: int, image_size: int
) -> list[dict]:
    """Write a picture for detection.

    Args:
        index: Number of the picture in its split.
        folder: Folder of the data set, with that of the split.
        split: 'train' or 'val'.
        seed: Seed of the data set.
        image_size: Side in pixels.

    Returns:
        The picture's annotations in COCO's format; their ids count from 1 in each picture.
    """
    scene = compose_digits(seed, split, index, image_size)
    write_picture(folder / split / picture_name(index), scene.image)
    return coco_annotations(scene, image_id=index + 1, first_id=1)


def write_segmentation_picture(
    index: int, folder: Path, split: str, seed: int, image_size: int
) -> None:
    """Write a picture for segmentation and its label map.

    Args:
        index: Number of the picture in its split.
        folder: Folder of the data set, with those of the split.
        split: 'train' or 'val'.
        seed: Seed of the data set.
        image_size: Side in pixels.
    """
    scene = compose_digits(seed, split, index, image_size)
    write_picture(folder / 'images' / split / picture_name(index), scene.image)
    # The palette is for the eye: what readers get are the labels.
    labels = Image.fromarray(label_map(scene))
    labels.putpalette(np.array(SEG_PALETTE, dtype=np.uint8).ravel().tolist())
    labels.save(folder / 'annotations' / split / picture_name(index))
