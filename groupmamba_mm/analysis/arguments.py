"""Values of command line options that several tools check alike."""
import argparse
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
