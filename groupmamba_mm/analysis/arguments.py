"""Values of command line options that several tools check alike."""

import argparse
import re
from pathlib import Path


def positive_int(text: str) -> int:
    """Read a whole number of 1 or more.

    Args:
        text: What was typed.

    Returns:
        The number.

    Raises:
        argparse.ArgumentTypeError: It is none; argparse makes a usage error of it.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of 1 or more')
    return int(text)


def image_size(text: str) -> tuple[int, int]:
    """Read the size of an image.

    Args:
        text: What was typed, such as ``224`` or ``800x1344``.

    Returns:
        (H, W) in pixels.

    Raises:
        argparse.ArgumentTypeError: It is no size; argparse makes a usage error of it.
    """
    found = re.fullmatch(r'([1-9]\d*)(?:x([1-9]\d*))?', text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f'{text!r} is no image size; give a side such as 224, or '
            'height x width such as 800x1344'
        )
    return int(found[1]), int(found[2] or found[1])


def png_path(text: str) -> Path:
    """Read the path of a PNG file.

    Args:
        text: What was typed.

    Returns:
        The path.

    Raises:
        argparse.ArgumentTypeError: It does not end in .png; argparse makes a usage error of it.
    """
    path = Path(text)
    if path.suffix.lower() != '.png':
        raise argparse.ArgumentTypeError(f'{text!r} is no PNG file: end the name in .png')
    return path
