"""Where images come from: files, folders, patterns, videos and standard input."""

import glob
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groupmamba_mm.errors import DataError
from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.inference'):
    import cv2

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')
VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm')


@dataclass(frozen=True)
class Source:
    """One image that is to be read.

    Attributes:
        name: What it is called in results: a path, ``-``, or a video with the frame's number.
        image: The file, or the array (H, W, 3), uint8, BGR.
    """

    name: str
    image: Path | np.ndarray


def find_files(where: str) -> list[Path]:
    """The files that an argument stands for.

    Args:
        where: An image or video, a folder of images (searched through), or a pattern.

    Returns:
        The files, sorted.

    Raises:
        DataError: There are none.
    """
    path = Path(where)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise DataError(
                f'folder {where} has no images ({", ".join(IMAGE_SUFFIXES)}) in it or below it'
            )
        return files
    files = sorted(p for p in map(Path, glob.glob(where, recursive=True)) if p.is_file())
    if not files:
        raise DataError(f'{where} is no file, no folder and no pattern of files; check the path')
    return files


def is_video(path: Path) -> bool:
    """Whether a file is a video by its name."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def read_stdin() -> Source:
    """One image from standard input.

    Returns:
        The image.

    Raises:
        DataError: It is none.
    """
    return Source('-', decode_image(sys.stdin.buffer.read(), 'standard input'))


def decode_image(content: bytes, name: str) -> np.ndarray:
    """An image from the bytes of its file.

    Args:
        content: The bytes.
        name: What they came from, for the message.

    Returns:
        (H, W, 3), uint8, BGR.

    Raises:
        DataError: They are no image.
    """
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if content else None
    if image is None:
        raise DataError(
            f'{name} ({len(content)} bytes) is no image that OpenCV can read; give a whole file, '
            'such as a JPEG or PNG'
        )
    return image


def read_frames(path: Path) -> Iterator[Source]:
    """The frames of a video.

    Args:
        path: The video.

    Yields:
        A frame after the other.

    Raises:
        DataError: It cannot be read.
    """
    video = cv2.VideoCapture(str(path))
    try:
        ok, frame = video.read()
        if not ok:
            raise DataError(f'video {path} cannot be read; convert it, for example to .mp4')
        number = 0
        while ok:
            yield Source(f'{path}#{number}', frame)
            number += 1
            ok, frame = video.read()
    finally:
        video.release()


def frames_per_second(path: Path) -> float:
    """The speed of a video."""
    video = cv2.VideoCapture(str(path))
    try:
        return video.get(cv2.CAP_PROP_FPS) or 25.0
    finally:
        video.release()
