"""Pictures for tests of image operations."""

import cv2
import numpy as np


def picture(height, width, seed=0):
    """Soft shapes with grain, as a photograph has.

    Args:
        height (int): Of at least 16 pixels.
        width (int): Of at least 16 pixels.
        seed (int): Others give other pictures.

    Returns:
        np.ndarray: (height, width, 3), uint8.
    """
    noise = np.random.default_rng(seed)
    shapes = noise.integers(0, 256, (height // 16, width // 16, 3)).astype(np.uint8)
    shapes = cv2.resize(shapes, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(shapes + noise.normal(0, 6, shapes.shape), 0, 255).astype(np.uint8)
