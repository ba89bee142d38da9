"""Pictures and annotations of the shape of ImageNet, COCO and ADE20K, to measure speed on.

Nothing is to be learnt from them. What counts is what they cost: sizes, numbers of objects, and
JPEGs of the bytes of photographs, as decoding takes time for each coded bit.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from groupmamba_mm.extras import explain_missing

with explain_missing('the data of the benchmark'):
    import cv2

#: (width, height) of pictures, in pixels. ImageNet's mean is 500 x 375.
IMAGENET_SIZES = ((500, 375), (375, 500), (500, 333), (400, 400))
COCO_SIZES = ((640, 427), (427, 640), (640, 480), (480, 640), (500, 375), (640, 360))
ADE_SIZES = ((683, 512), (512, 683), (768, 512))

_JPEG_QUALITY = 90
# Spectra of photographs fall with about the frequency; the octaves above leave the bytes of one.
_SPECTRAL_SLOPE = 1.38
_CONTRAST = 50.0
_TEXTURES, _TEXTURE_SIZE = 4, 1024


def make_classification(root: Path, images: int, classes: int, threads: int) -> None:
    """Write ``root/train/CLASS/NUMBER.JPEG``.

    Args:
        root: The folder.
        images: Number of images; each class has one at least.
        classes: Number of classes.
        threads: Number of threads that draw.
    """
    each = max(1, round(images / classes))
    jobs = [(root / 'train' / f'n{index:08d}', each, index) for index in range(classes)]
    _in_parallel(_write_class, jobs, threads)


def make_detection(
    root: Path,
    annotation_file: str,
    image_folder: str,
    names: Sequence[str],
    images: int,
    threads: int,
) -> None:
    """Write images and a file of annotations in COCO's format, 7 objects an image on average.

    Args:
        root: The folder.
        annotation_file: Where in it the annotations are.
        image_folder: Where in it the images are.
        names: Names of the classes.
        images: Number of images.
        threads: Number of threads that draw.
    """
    rng = np.random.default_rng(0)
    jobs: list[tuple] = []
    records: list[dict] = []
    objects: list[dict] = []
    for index in range(images):
        size = COCO_SIZES[rng.integers(len(COCO_SIZES))]
        name = f'{index:012d}.jpg'
        jobs.append((root / image_folder / name, size, index))
        records.append(dict(id=index + 1, file_name=name, width=size[0], height=size[1]))
        for _ in range(rng.integers(3, 12)):
            objects.append(_random_object(rng, len(objects) + 1, index + 1, size, len(names)))
    _in_parallel(_write_image, jobs, threads)
    file = root / annotation_file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps(
            dict(
                images=records,
                annotations=objects,
                categories=[dict(id=index + 1, name=name) for index, name in enumerate(names)],
            )
        )
    )


def make_segmentation(
    root: Path,
    image_folder: str,
    map_folder: str,
    suffixes: tuple[str, str],
    classes: int,
    images: int,
    threads: int,
) -> None:
    """Write images and label maps.

    Args:
        root: The folder.
        image_folder: Where in it the images are.
        map_folder: Where in it the label maps are.
        suffixes: Of the images' and the maps' files.
        classes: Number of labels, 0 among them.
        images: Number of images.
        threads: Number of threads that draw.
    """
    rng = np.random.default_rng(0)
    jobs = []
    for index in range(images):
        name = f'train_{index:08d}'
        size = ADE_SIZES[rng.integers(len(ADE_SIZES))]
        jobs.append(
            (
                root / image_folder / f'{name}{suffixes[0]}',
                size,
                index,
                root / map_folder / f'{name}{suffixes[1]}',
                classes,
            )
        )
    _in_parallel(_write_image_and_map, jobs, threads)


def paint(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Paint a picture with the statistics of a photograph: a falling spectrum, objects with edges.

    Args:
        size: (W, H) in pixels, at most 1024 each.
        rng: Random numbers.

    Returns:
        (H, W, 3), uint8.
    """
    picture = _random_crop(size, rng)
    for _ in range(rng.integers(4, 9)):
        mask = np.zeros(picture.shape[:2], np.uint8)
        centre = tuple(int(rng.integers(side)) for side in size)
        axes = tuple(int(rng.integers(10, max(12, side // 3))) for side in size)
        cv2.ellipse(mask, centre, axes, int(rng.integers(180)), 0, 360, 1, -1)
        shade = rng.uniform(-60, 60, 3).astype(np.float32)
        cv2.copyTo(_random_crop(size, rng) + shade, mask, picture)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _random_crop(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    textures = _textures()
    x, y = (int(rng.integers(_TEXTURE_SIZE - side + 1)) for side in size)
    crop = textures[rng.integers(len(textures))][y : y + size[1], x : x + size[0]]
    return np.ascontiguousarray(crop[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))])


@lru_cache(maxsize=1)
def _textures() -> list[np.ndarray]:
    """Coloured noise, made once."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(_TEXTURE_SIZE)[:, None], np.fft.rfftfreq(_TEXTURE_SIZE))
    frequency[0, 0] = np.inf
    textures = []
    for _ in range(_TEXTURES):
        # the channels of photographs are much alike
        common, *own = (
            np.fft.irfft2(
                np.fft.rfft2(rng.standard_normal((_TEXTURE_SIZE, _TEXTURE_SIZE)))
                / frequency**_SPECTRAL_SLOPE
            )
            for _ in range(4)
        )
        channels = np.stack([common + 0.3 * channel for channel in own], -1)
        textures.append((128 + _CONTRAST * channels / channels.std()).astype(np.float32))
    return textures


def _random_object(
    rng: np.random.Generator, number: int, image: int, size: tuple[int, int], classes: int
) -> dict[str, Any]:
    width, height = (int(rng.integers(20, min(200, side))) for side in size)
    x, y = (int(rng.integers(side - length)) for side, length in zip(size, (width, height)))
    outline = [
        x,
        y,
        x + width,
        y,
        x + width,
        y + height,
        x + width // 2,
        y + height,
        x,
        y + height // 2,
    ]
    return dict(
        id=number,
        image_id=image,
        category_id=int(rng.integers(classes)) + 1,
        bbox=[x, y, width, height],
        area=width * height * 7 / 8,
        iscrowd=0,
        segmentation=[outline],
    )


def _in_parallel(write: Callable, jobs: list[tuple], threads: int) -> None:
    """Do jobs in threads: OpenCV and numpy, which do the work, let others run meanwhile."""
    _textures()
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda job: write(*job), jobs))
    finally:
        cv2.setNumThreads(before)


def _save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]):
        raise OSError(f'{path} could not be written')


def _write_class(folder: Path, images: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for index in range(images):
        size = IMAGENET_SIZES[rng.choice(len(IMAGENET_SIZES), p=(0.6, 0.15, 0.15, 0.1))]
        _save(folder / f'{index}.JPEG', paint(size, rng))


def _write_image(path: Path, size: tuple[int, int], seed: int) -> None:
    _save(path, paint(size, np.random.default_rng(seed)))


def _write_image_and_map(
    path: Path, size: tuple[int, int], seed: int, map_path: Path, classes: int
) -> None:
    _write_image(path, size, seed)
    rng = np.random.default_rng(seed)
    labels = np.full((size[1], size[0]), rng.integers(classes), np.uint8)
    for _ in range(12):
        centre, axes = (tuple(int(rng.integers(20, side)) for side in size) for _ in range(2))
        cv2.ellipse(
            labels,
            centre,
            (axes[0] // 3, axes[1] // 3),
            int(rng.integers(180)),
            0,
            360,
            int(rng.integers(classes)),
            -1,
        )
    _save(map_path, labels)


def default_threads() -> int:
    """The cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
