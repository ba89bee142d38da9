"""Scenes of real scanned digits on real photographs, for the demo data sets.

The digits are the 8x8 scans of ``sklearn.datasets.load_digits``; the backgrounds are crops of the
two photographs of ``sklearn.datasets.load_sample_images``. Both ship inside scikit-learn, so a
scene needs no download. Every number drawn comes from a generator seeded with (seed, split,
index): a scene does not depend on how many others are made, nor in which order.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from groupmamba_mm.extras import explain_missing

with explain_missing('the demo data'):
    import cv2

CLASSES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
SPLITS = ('train', 'val')

MIN_IMAGE_SIZE = 64
# A scan has 8 pixels a side: drawn smaller than this, its strokes are too thin to read.
MIN_DIGIT_SIZE = 12

# Of each class, in the order of load_digits, every fifth scan is kept for validation.
VAL_DIGIT_STEP = 5
# The right part of each photograph is kept for validation.
VAL_PHOTO_SHARE = 0.35

# Longer side of the digit's box, after its rotation, as a share of the image side; what is drawn
# is rounded to whole pixels.
SCALE_RANGE = (0.35, 0.9)
# Degrees, counter-clockwise.
ANGLE_RANGE = (-25.0, 25.0)
OPACITY_RANGE = (0.8, 1.0)
# Standard deviation of the blur on the edges, as a share of the digit's longer side.
SOFTNESS_RANGE = (0.0, 0.015)
# Each of the ink's three channels, where 1 is the full range.
INK_RANGE = (0.3, 1.0)
# The ink is brighter than what it is written on. Smallest difference in luma (0 to 1) between the
# blended ink and its surroundings, which nine tenths of the pixels on and around the digit must
# keep.
MIN_CONTRAST = 0.4

# Side of the square cut out of a photograph, in its own pixels.
CROP_SIDE_RANGE = (80, 220)
# Mean and standard deviation of the background's luma (0 to 1). Photographs differ in both from
# crop to crop; brought to these, none is too bright for the ink nor too dark to be seen.
BACKGROUND_LUMA_RANGE = (0.15, 0.4)
BACKGROUND_CONTRAST_RANGE = (0.03, 0.08)
# More would show a smooth crop's compression noise.
MAX_BACKGROUND_GAIN = 3.0

# A digit partly hidden by later ones keeps at least this share of its pixels visible.
MIN_VISIBLE_SHARE = 0.6
PLACE_ATTEMPTS = 50
SCENE_ATTEMPTS = 20
COLOUR_ATTEMPTS = 20

# Share of full ink (16 in load_digits) from which an upscaled pixel counts as the digit's own.
INK_THRESHOLD = 0.5
# The scan is enlarged this much before it is thresholded and turned.
GLYPH_FACTOR = 16
LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class PhotoCrop:
    """All it takes to draw a background again.

    Attributes:
        photo (str): File name of the photograph.
        x (int): Left edge of the square crop in the photograph.
        y (int): Top edge.
        side (int): Side of the crop.
        flipped (bool): Whether the crop is mirrored left to right.
        luma (float): Mean luma that it is brought to.
        contrast (float): Standard deviation of its luma that it is brought to.
    """

    photo: str
    x: int
    y: int
    side: int
    flipped: bool
    luma: float
    contrast: float


@dataclass(frozen=True, eq=False)
class DigitInstance:
    """One digit of a scene.

    Attributes:
        label (int): The digit, 0 to 9.
        mask (np.ndarray): Bool (H, W), the digit's visible pixels.
        bbox (tuple[int]): Box (x1, y1, x2, y2) around the visible pixels; x2 and y2 are exclusive.
        source_index (int): Index of the scan in ``load_digits``.
        scale (float): Longer side of the whole digit's box as a share of the image side.
        angle (float): Rotation in degrees, counter-clockwise.
        contrast (float): Luma difference to the surroundings, as ``MIN_CONTRAST`` measures it.
        full_area (int): Number of the digit's pixels before others covered some of them.
    """

    label: int
    mask: np.ndarray
    bbox: tuple
    source_index: int
    scale: float
    angle: float
    contrast: float
    full_area: int


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and what is on it.

    Attributes:
        image (np.ndarray): Uint8 RGB (H, W, 3).
        instances (tuple[DigitInstance]): The digits, the lowest first.
        crop (PhotoCrop): The background.
    """

    image: np.ndarray
    instances: tuple
    crop: PhotoCrop


def compose_scene(
    seed, split, index, image_size=64, num_digits=1, labels=None, scale_range=SCALE_RANGE
):
    """Draw one scene.

    Later digits cover earlier ones. A digit that would leave less than ``MIN_VISIBLE_SHARE`` of
    another visible is placed again, and so is one that finds no legible ink where it lies.

    Args:
        seed (int): Seed of the data set, 0 or more.
        split (str): 'train' or 'val'; decides which scans and which parts of the photographs
            are used.
        index (int): Number of the scene in its split, 0 or more.
        image_size (int): Side of the square picture in pixels.
        num_digits (int): Number of digits.
        labels (Sequence[int], optional): The digits to draw, ``num_digits`` of them. Drawn at
            random if None.
        scale_range (tuple[float]): Smallest and largest scale of a digit, see ``SCALE_RANGE``.

    Returns:
        Scene: The picture with its digits.

    Raises:
        ValueError: If an argument is out of its range.
        RuntimeError: If the digits do not fit into the picture.
    """
    _check_arguments(seed, split, index, image_size, num_digits, labels, scale_range)
    rng = np.random.default_rng(np.random.SeedSequence((seed, SPLITS.index(split), index)))
    if labels is None:
        labels = rng.integers(len(CLASSES), size=num_digits).tolist()
    for _ in range(SCENE_ATTEMPTS):
        scene = _try_scene(rng, split, image_size, labels, scale_range)
        if scene is not None:
            return scene
    raise RuntimeError(
        f'{num_digits} digits with a scale of {scale_range[0]} to {scale_range[1]} do not fit '
        f'into one picture (seed {seed}, split {split!r}, index {index}): ask for fewer digits '
        'or a smaller scale_range'
    )


@cache
def split_digits(split):
    """List the scans that belong to a split.

    Args:
        split (str): 'train' or 'val'.

    Returns:
        tuple[np.ndarray]: For each class, the indices of its scans in ``load_digits``.
    """
    _check_split(split)
    _, targets = _load_scans()
    members = []
    for label in range(len(CLASSES)):
        indices = np.flatnonzero(targets == label)
        is_val = np.arange(len(indices)) % VAL_DIGIT_STEP == VAL_DIGIT_STEP - 1
        members.append(indices[is_val] if split == 'val' else indices[~is_val])
    return tuple(members)


def split_columns(width, split):
    """Tell which columns of a photograph belong to a split.

    Args:
        width (int): Width of the photograph.
        split (str): 'train' or 'val'.

    Returns:
        tuple[int]: First column, and the one after the last.
    """
    _check_split(split)
    border = width - round(width * VAL_PHOTO_SHARE)
    return (0, border) if split == 'train' else (border, width)


def render_background(crop, image_size):
    """Draw the background of a scene.

    Args:
        crop (PhotoCrop): Where it comes from and how it is changed.
        image_size (int): Side of the square picture in pixels.

    Returns:
        np.ndarray: Float32 RGB (image_size, image_size, 3), 0 to 1.
    """
    photo = _load_photos()[crop.photo]
    patch = photo[crop.y : crop.y + crop.side, crop.x : crop.x + crop.side]
    if crop.flipped:
        patch = patch[:, ::-1]
    patch = _resize(patch.astype(np.float32) / 255, image_size, image_size)
    mean = patch.mean(axis=(0, 1))
    tint = mean * (crop.luma / (mean @ LUMA_WEIGHTS))
    gain = min(MAX_BACKGROUND_GAIN, crop.contrast / (patch @ LUMA_WEIGHTS).std())
    return np.clip(tint + (patch - mean) * gain, 0, 1)


def _check_split(split):
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}: use one of {", ".join(map(repr, SPLITS))}')


def _check_arguments(seed, split, index, image_size, num_digits, labels, scale_range):
    _check_split(split)
    for name, value, least in (
        ('seed', seed, 0),
        ('index', index, 0),
        ('image_size', image_size, MIN_IMAGE_SIZE),
        ('num_digits', num_digits, 1),
    ):
        if value < least:
            raise ValueError(f'{name} is {value}: use {least} or more')
    if labels is not None:
        if len(labels) != num_digits:
            raise ValueError(
                f'labels has {len(labels)} entries but num_digits is {num_digits}: '
                'give one label a digit'
            )
        for label in labels:
            if not 0 <= label < len(CLASSES):
                raise ValueError(f'labels contains {label}: use 0 to {len(CLASSES) - 1}')
    low, high = scale_range
    if not 0 < low <= high <= 1:
        raise ValueError(
            f'scale_range is {scale_range}: use two shares of the image side in '
            'rising order, above 0 and up to 1'
        )
    if low * image_size < MIN_DIGIT_SIZE:
        raise ValueError(
            f'scale_range starts at {low}, which is {low * image_size:.1f} px of an image of '
            f'{image_size} px: use {MIN_DIGIT_SIZE / image_size:.3f} or more, so that a digit has '
            f'{MIN_DIGIT_SIZE} px'
        )


def _sklearn_datasets():
    with explain_missing('the demo data'):
        from sklearn import datasets
    return datasets


@cache
def _load_scans():
    scans = _sklearn_datasets().load_digits()
    return (scans.images / 16).astype(np.float32), scans.target


@cache
def _load_photos():
    # One by one, because the paths of load_sample_images depend on the installation.
    return {
        name: _sklearn_datasets().load_sample_image(name) for name in ('china.jpg', 'flower.jpg')
    }


def _try_scene(rng, split, image_size, labels, scale_range):
    """Draw a scene, or return None if one of its digits found no place."""
    crop = _draw_crop(rng, split)
    canvas = render_background(crop, image_size)
    instances = []
    for label in labels:
        for _ in range(PLACE_ATTEMPTS):
            placed = _try_digit(rng, split, canvas, instances, label, scale_range)
            if placed is not None:
                canvas, instances = placed
                break
        else:
            return None
    image = np.round(canvas * 255).astype(np.uint8)
    return Scene(image=image, instances=tuple(instances), crop=crop)


def _draw_crop(rng, split):
    photos = _load_photos()
    name = sorted(photos)[rng.integers(len(photos))]
    height, width = photos[name].shape[:2]
    first, end = split_columns(width, split)
    side = int(rng.integers(CROP_SIDE_RANGE[0], CROP_SIDE_RANGE[1] + 1))
    return PhotoCrop(
        photo=name,
        x=int(rng.integers(first, end - side + 1)),
        y=int(rng.integers(height - side + 1)),
        side=side,
        flipped=bool(rng.integers(2)),
        luma=float(rng.uniform(*BACKGROUND_LUMA_RANGE)),
        contrast=float(rng.uniform(*BACKGROUND_CONTRAST_RANGE)),
    )


def _try_digit(rng, split, canvas, instances, label, scale_range):
    """Put one more digit on the canvas.

    Returns:
        tuple[np.ndarray, list[DigitInstance]] | None: The new canvas and all instances with their
            masks updated, or None if the place drawn hides another digit or makes this one
            illegible.
    """
    image_size = len(canvas)
    source_index = int(rng.choice(split_digits(split)[label]))
    angle = float(rng.uniform(*ANGLE_RANGE))
    size = max(1, round(float(rng.uniform(*scale_range)) * image_size))
    glyph = _turned_glyph(source_index, angle, size)

    height, width = glyph.shape
    x = int(rng.integers(image_size - width + 1))
    y = int(rng.integers(image_size - height + 1))
    coverage = np.zeros((image_size, image_size), dtype=np.float32)
    coverage[y : y + height, x : x + width] = glyph
    mask = coverage >= 0.5

    uncovered = [_uncover(instance, mask) for instance in instances]
    if any(item is None for item in uncovered):
        return None

    opacity = float(rng.uniform(*OPACITY_RANGE))
    colour, contrast = _draw_colour(rng, canvas, mask, size, opacity)
    if colour is None:
        return None
    softness = float(rng.uniform(*SOFTNESS_RANGE)) * size
    # Below a fifth of a pixel the blur changes nothing that rounding keeps.
    if softness > 0.2:
        coverage = cv2.GaussianBlur(coverage, (0, 0), softness)
    alpha = (coverage * opacity)[..., None]
    digit = DigitInstance(
        label=int(label),
        mask=mask,
        bbox=_bbox(mask),
        source_index=source_index,
        scale=size / image_size,
        angle=angle,
        contrast=contrast,
        full_area=int(mask.sum()),
    )
    return canvas * (1 - alpha) + colour * alpha, uncovered + [digit]


def _turned_glyph(source_index, angle, size):
    """Draw a scan, turned, with its longer side ``size`` pixels long.

    Returns:
        np.ndarray: Float32 (h, w), the share of each pixel that the digit covers.
    """
    images, _ = _load_scans()
    # Strokes often reach the rim of the scan: an empty ring lets them end in a round shape, and
    # three more leave room for the corners to turn.
    scan = np.pad(images[source_index], 4)
    side = len(scan) * GLYPH_FACTOR
    ink = cv2.resize(scan, (side, side), interpolation=cv2.INTER_CUBIC)
    ink = (ink >= INK_THRESHOLD).astype(np.float32)
    centre = ((side - 1) / 2, (side - 1) / 2)
    ink = cv2.warpAffine(ink, cv2.getRotationMatrix2D(centre, angle, 1.0), (side, side))
    x1, y1, x2, y2 = _bbox(ink >= 0.5)
    ink = ink[y1:y2, x1:x2]
    factor = size / max(ink.shape)
    height, width = (max(1, round(length * factor)) for length in ink.shape)
    return np.clip(_resize(ink, width, height), 0, 1)


def _uncover(instance, cover):
    """Take covered pixels off an instance; None if too few of them stay visible."""
    if not (instance.mask & cover).any():
        return instance
    visible = instance.mask & ~cover
    if visible.sum() < MIN_VISIBLE_SHARE * instance.full_area:
        return None
    return DigitInstance(**{**vars(instance), 'mask': visible, 'bbox': _bbox(visible)})


def _draw_colour(rng, canvas, mask, size, opacity):
    """Draw an ink that stands out from what lies on and around the mask.

    Returns:
        tuple[np.ndarray | None, float]: The RGB colour, 0 to 1, and its contrast; no colour if
            none was found.
    """
    reach = 2 * max(1, round(0.1 * size)) + 1
    around = cv2.dilate(mask.astype(np.uint8), np.ones((reach, reach), np.uint8)) > 0
    luma = canvas[around] @ LUMA_WEIGHTS
    tenth = len(luma) // 10
    for _ in range(COLOUR_ATTEMPTS):
        colour = rng.uniform(*INK_RANGE, 3).astype(np.float32)
        difference = (colour @ LUMA_WEIGHTS - luma) * opacity
        contrast = float(np.partition(difference, tenth)[tenth])
        if contrast >= MIN_CONTRAST:
            return colour, contrast
    return None, 0.0


def _bbox(mask):
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _resize(array, width, height):
    shrinks = width < array.shape[1]
    # Averaging keeps the edges smooth when shrinking, but turns into blocks when enlarging.
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(array), (width, height), interpolation=interpolation)
