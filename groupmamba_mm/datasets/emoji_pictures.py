"""Pictures of emoji on photographs, for ``tools/dataset_converters/make_emoji_data.py``.

Each function depends on its arguments alone, so that several processes can share the pictures out
among themselves.
"""

import functools
from pathlib import Path

import numpy as np

from groupmamba_mm.extras import explain_missing

from .demo_pictures import write_picture

with explain_missing('the emoji data'):
    import cv2

#: Whose drawings are in which split.
HANDS = dict(train=('google', 'twitter'), val=('facebook',))
#: Functions of ``skimage.data`` whose pictures come with the package.
PHOTOS = (
    'astronaut',
    'brick',
    'chelsea',
    'coffee',
    'grass',
    'gravel',
    'hubble_deep_field',
    'rocket',
)
#: Share of a photograph's width, from the left, of which training backgrounds are cut.
TRAIN_WIDTH = 0.65
#: Sides of the emoji and of the one beside it, as shares of the picture's, and the turn in degrees.
SCALE, SCALE_BESIDE, TURN = (0.4, 0.85), (0.2, 0.3), 30


@functools.cache
def photographs() -> list[np.ndarray]:
    """scikit-image's photographs, uint8 RGB."""
    from skimage import data

    pictures = [np.asarray(getattr(data, name)()) for name in PHOTOS]
    return [p if p.ndim == 3 else np.repeat(p[..., None], 3, axis=2) for p in pictures]


def background(random: np.random.Generator, split: str, size: int) -> np.ndarray:
    """A square piece of a photograph, brighter or darker.

    Args:
        random: Random numbers.
        split: 'train' or 'val', which have different parts of a photograph.
        size: Side in pixels.

    Returns:
        A float32 array (H, W, 3).
    """
    photo = photographs()[random.integers(len(PHOTOS))]
    border = int(TRAIN_WIDTH * photo.shape[1])
    photo = photo[:, :border] if split == 'train' else photo[:, border:]
    side = int(random.uniform(0.3, 1.0) * min(photo.shape[:2]))
    y, x = (random.integers(length - side + 1) for length in photo.shape[:2])
    piece = cv2.resize(
        photo[y : y + side, x : x + side], (size, size), interpolation=cv2.INTER_AREA
    )
    return piece.astype(np.float32) * random.uniform(0.5, 1.2)


def put(picture: np.ndarray, drawing: np.ndarray, random: np.random.Generator, side: float) -> None:
    """Lay a drawing over a picture, turned, somewhere where all of it is seen.

    Args:
        picture: Float32 (H, W, 3), changed in place.
        drawing: Uint8 RGBA.
        random: Random numbers.
        side: Of the drawing in the picture, in pixels.
    """
    size, height = picture.shape[0], drawing.shape[0]
    # premultiplied, or the colour behind what is transparent would show at the rims
    layer = drawing.astype(np.float32)
    layer[..., :3] = layer[..., :3] * layer[..., 3:] / 255
    free = (size - side) / 2
    shift = random.uniform(-free, free, 2) if free > 0 else np.zeros(2)
    turn = cv2.getRotationMatrix2D(
        ((height - 1) / 2,) * 2, random.uniform(-TURN, TURN), side / height
    )
    turn[:, 2] = turn[:, 2] + (size - height) / 2 + shift
    laid = cv2.warpAffine(layer, turn, (size, size), flags=cv2.INTER_LINEAR)
    picture[...] = picture * (1 - laid[..., 3:] / 255) + laid[..., :3]


def compose(
    seed: int, split: str, index: int, size: int, drawings: list[list[np.ndarray]]
) -> np.ndarray:
    """Draw a picture; the classes take turns.

    Args:
        seed: Seed of the data set.
        split: 'train' or 'val'.
        index: Number of the picture in its split.
        size: Side in pixels.
        drawings: Of each hand of the split, by class.

    Returns:
        Uint8 RGB (H, W, 3).
    """
    random = np.random.default_rng([seed, list(HANDS).index(split), index])
    number = len(drawings[0])
    label = index % number
    other = (label + random.integers(1, number)) % number if number > 1 else label
    picture = background(random, split, size)
    hand = drawings[random.integers(len(drawings))]
    put(picture, hand[other], random, random.uniform(*SCALE_BESIDE) * size)
    put(picture, hand[label], random, random.uniform(*SCALE) * size)
    return np.clip(picture, 0, 255).round().astype(np.uint8)


def write_emoji(
    job: tuple, folder: Path, seed: int, size: int, names: list[str], drawings: dict
) -> None:
    """Write a picture.

    Args:
        job: Its split, and its number there.
        folder: Folder of the data set, with those of the classes.
        seed: Seed of the data set.
        size: Side in pixels.
        names: Folders of the classes.
        drawings: By split, hand and class.
    """
    split, index = job
    picture = compose(seed, split, index, size, drawings[split])
    write_picture(folder / split / names[index % len(names)] / f'{index:06d}.jpg', picture)
