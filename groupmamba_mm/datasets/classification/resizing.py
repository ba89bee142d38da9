"""Antialiased resizing by torch's kernels for uint8: Pillow's pictures, several times as fast."""

import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from mmpretrain.datasets.transforms import RandomResizedCrop, ResizeEdge
from torch.nn import functional as F

INTERPOLATIONS = ('bilinear', 'bicubic')


def resize_antialiased(
    image: np.ndarray, size: tuple[int, int], interpolation: str = 'bicubic'
) -> np.ndarray:
    """Resize as Pillow does: the filter widens when an image shrinks.

    Nearly all values are Pillow's or one grey level beside them. OpenCV's filters do not widen, and
    its ``INTER_AREA`` is another filter.

    Args:
        image (np.ndarray): (H, W, C), uint8.
        size (tuple[int]): Height and width that it gets.
        interpolation (str): 'bilinear' or 'bicubic'. Defaults to 'bicubic'.

    Returns:
        np.ndarray: (h, w, C), uint8.

    Raises:
        ValueError: If the image is of another type.
    """
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(
            f'image must be uint8 with 3 dimensions, got {image.dtype} with '
            f'{image.ndim}; leave to_float32 and grey images to other transforms'
        )
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]  # a view, (1, C, H, W)
    resized = F.interpolate(planes, size=size, mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _checked(interpolation: str) -> str:
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f'interpolation must be one of {INTERPOLATIONS}, got {interpolation!r}')
    return interpolation


@TRANSFORMS.register_module()
class AntialiasedRandomResizedCrop(RandomResizedCrop):
    """mmpretrain's ``RandomResizedCrop`` with :func:`resize_antialiased`.

    It draws the crops of ``RandomResizedCrop`` and, but for rounding, gives the pictures of its
    ``backend='pillow'``.

    Args:
        scale (int | tuple[int]): Size of the result, (h, w) if two.
        crop_ratio_range (tuple[float]): Area of the crop as a share of the image's.
        aspect_ratio_range (tuple[float]): Width to height of the crop.
        max_attempts (int): Draws before the centre is taken.
        interpolation (str): 'bilinear' or 'bicubic'. Defaults to 'bicubic'.

    Raises:
        ValueError: If the interpolation is another one.
    """

    def __init__(
        self,
        scale,
        crop_ratio_range: tuple[float, float] = (0.08, 1.0),
        aspect_ratio_range: tuple[float, float] = (3.0 / 4.0, 4.0 / 3.0),
        max_attempts: int = 10,
        interpolation: str = 'bicubic',
    ) -> None:
        super().__init__(
            scale, crop_ratio_range, aspect_ratio_range, max_attempts, _checked(interpolation)
        )

    def transform(self, results: dict) -> dict:
        """Crop and resize.

        Args:
            results (dict): With 'img' (H, W, C), uint8.

        Returns:
            dict: The same with the new 'img' and 'img_shape'.
        """
        top, left, height, width = self.rand_crop_params(results['img'])
        crop = results['img'][top : top + height, left : left + width]
        results['img'] = resize_antialiased(crop, tuple(self.scale), self.interpolation)
        results['img_shape'] = results['img'].shape
        return results


@TRANSFORMS.register_module()
class AntialiasedResizeEdge(ResizeEdge):
    """mmpretrain's ``ResizeEdge`` with :func:`resize_antialiased`.

    But for rounding, it gives the pictures of ``backend='pillow'``.

    Args:
        scale (int): Length that the edge gets.
        edge (str): 'short', 'long', 'width' or 'height'. Defaults to 'short'.
        interpolation (str): 'bilinear' or 'bicubic'. Defaults to 'bicubic'.

    Raises:
        ValueError: If the interpolation is another one.
    """

    def __init__(self, scale: int, edge: str = 'short', interpolation: str = 'bicubic') -> None:
        super().__init__(scale, edge, interpolation=_checked(interpolation))

    def _resize_img(self, results: dict) -> None:
        height, width = results['img'].shape[:2]
        new_width, new_height = results['scale']
        results['img'] = resize_antialiased(
            results['img'], (new_height, new_width), self.interpolation
        )
        results['img_shape'] = (new_height, new_width)
        results['scale_factor'] = (new_width / width, new_height / height)
