"""The operations of mmpretrain's RandAugment as operations on batches."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from mmpretrain.datasets import transforms
from mmpretrain.datasets.transforms.auto_augment import BaseAugTransform
from torch import Tensor

from groupmamba_mm.errors import ConfigError

from . import batch_ops


class Operation(NamedTuple):
    """What an operation of mmpretrain's on single images is on batches.

    Attributes:
        argument: The argument of the single one that its magnitude is, None if it has none.
        parameters: From the single one, its magnitudes (N, ) for N images, and the images' height
            and width to the function's second argument, (N, P). P is 0 if it has none.
        function: From the single one to a function of :mod:`batch_ops`. What has the same function
            runs together.
        makes_tables: Whether the function makes tables, not images.
    """

    argument: str | None
    parameters: Callable[[BaseAugTransform, np.ndarray, int, int], np.ndarray]
    function: Callable[[BaseAugTransform], Callable[..., Tensor]]
    makes_tables: bool = False


_LEVELS = np.arange(256)
_WARPS = {
    name: partial(batch_ops.warp, interpolation=name) for name in ('nearest', 'bilinear', 'bicubic')
}


def _shear(single, values, height, width):
    matrices = _identities(len(values))
    if single.direction == 'horizontal':
        matrices[:, 0, 1] = -values
    else:
        matrices[:, 1, 0] = -values
    return _warp_parameters(single, matrices, height, width)


def _translate(single, values, height, width):
    matrices = _identities(len(values))
    if single.direction == 'horizontal':
        matrices[:, 0, 2] = -values * width
    else:
        matrices[:, 1, 2] = -values * height
    return _warp_parameters(single, matrices, height, width)


def _rotate(single, values, height, width):
    angles, matrices = np.deg2rad(values), _identities(len(values))
    matrices[:, 0, 0] = matrices[:, 1, 1] = np.cos(angles) / single.scale
    matrices[:, 0, 1] = np.sin(angles) / single.scale
    matrices[:, 1, 0] = -matrices[:, 0, 1]
    center = np.array(single.center or ((width - 1) / 2, (height - 1) / 2))
    matrices[:, :, 2] = center - matrices[:, :, :2] @ center
    return _warp_parameters(single, matrices, height, width)


def _identities(number: int) -> np.ndarray:
    return np.tile(np.eye(2, 3), (number, 1, 1))


def _warp_parameters(single, matrices, height, width):
    """From matrices in pixels to those of :func:`batch_ops.warp`, with the colour: (N, 9)."""
    scale = np.array([[2 / width], [2 / height]])
    matrices = matrices * scale
    matrices[:, :, 2:] += scale / 2 - 1
    fill = np.broadcast_to(np.asarray(single.pad_val, dtype=np.float64), (len(matrices), 3))
    return np.concatenate([matrices.reshape(-1, 6), fill], axis=1)


def _invert(single, values, height, width):
    return np.tile(255 - _LEVELS, (len(values), 1))


def _posterize(single, values, height, width):
    shift = 8 - np.ceil(values).astype(np.int64)[:, None]
    return _LEVELS >> shift << shift


def _solarize(single, values, height, width):
    return np.where(_LEVELS < values[:, None], _LEVELS, 255 - _LEVELS)


def _solarize_add(single, values, height, width):
    return np.where(_LEVELS < single.thr, np.minimum(_LEVELS + values[:, None], 255), _LEVELS)


def _brightness(single, values, height, width):
    return np.clip(_LEVELS * (1 + values[:, None]), 0, 255)


def _factors(single, values, height, width):
    return 1 + values[:, None]


def _nothing(single, values, height, width):
    return np.empty((len(values), 0))


def _warp(single: BaseAugTransform) -> Callable[..., Tensor]:
    if single.interpolation not in _WARPS:
        raise ConfigError(
            f'{type(single).__name__}: interpolation must be one of {list(_WARPS)} '
            f'on batches, got {single.interpolation!r}; set it in hparams'
        )
    return _WARPS[single.interpolation]


def _always(function: Callable[..., Tensor]) -> Callable[[BaseAugTransform], Callable[..., Tensor]]:
    return lambda single: function


_given = _always(batch_ops.given_tables)

#: By the class of the single operation.
OPERATIONS: dict[type, Operation] = {
    transforms.Shear: Operation('magnitude', _shear, _warp),
    transforms.Translate: Operation('magnitude', _translate, _warp),
    transforms.Rotate: Operation('angle', _rotate, _warp),
    transforms.Invert: Operation(None, _invert, _given, True),
    transforms.Posterize: Operation('bits', _posterize, _given, True),
    transforms.Solarize: Operation('thr', _solarize, _given, True),
    transforms.SolarizeAdd: Operation('magnitude', _solarize_add, _given, True),
    transforms.Brightness: Operation('magnitude', _brightness, _given, True),
    transforms.AutoContrast: Operation(
        None, _nothing, _always(batch_ops.auto_contrast_tables), True
    ),
    transforms.Equalize: Operation(None, _nothing, _always(batch_ops.equalize_tables), True),
    transforms.Contrast: Operation('magnitude', _factors, _always(batch_ops.contrast_tables), True),
    transforms.ColorTransform: Operation('magnitude', _factors, _always(batch_ops.adjust_color)),
    transforms.Sharpness: Operation('magnitude', _factors, _always(batch_ops.adjust_sharpness)),
}
