"""Random augmentations of a whole batch, with random numbers of each image's own.

What is drawn is drawn on the host, by numpy's global generator and from the distributions of
mmpretrain's transforms of single images; so it is known there which images an operation concerns,
and each runs on those alone, in a few kernels and without waiting for the device. Only the noise of
erased areas is drawn on the device, by torch's global generator.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from mmpretrain.datasets.transforms import RandAugment, RandomErasing
from mmpretrain.datasets.transforms.auto_augment import BaseAugTransform
from torch import Tensor

from groupmamba_mm.errors import ConfigError

from .batch_ops import look_up
from .operations import OPERATIONS


@TRANSFORMS.register_module()
class BatchRandomFlip(BaseTransform):
    """Flip some images of a batch.

    Args:
        prob (float): Probability of each image. Defaults to 0.5.
        direction (str): 'horizontal' or 'vertical'. Defaults to 'horizontal'.

    Raises:
        ValueError: If an argument has another value.
    """

    _DIMS = dict(horizontal=3, vertical=2)

    def __init__(self, prob: float = 0.5, direction: str = 'horizontal') -> None:
        if not 0 <= prob <= 1:
            raise ValueError(f'prob must be from 0 to 1, got {prob}')
        if direction not in self._DIMS:
            raise ValueError(f'direction must be one of {list(self._DIMS)}, got {direction!r}')
        self.prob = prob
        self.direction = direction

    def transform(self, images: Tensor) -> Tensor:
        """Flip.

        Args:
            images (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        chosen = _to_device(np.random.rand(len(images)) < self.prob, images)
        return torch.where(
            chosen[:, None, None, None], images.flip(self._DIMS[self.direction]), images
        )


@TRANSFORMS.register_module()
class BatchRandomErasing(RandomErasing):
    """mmpretrain's ``RandomErasing`` for a batch; its arguments.

    The colours are in the order of the images' channels.
    """

    def transform(self, images: Tensor) -> Tensor:
        """Erase a rectangle in some images.

        Args:
            images (Tensor): (B, 3, H, W), uint8; changed in place.

        Returns:
            Tensor: The same tensor.
        """
        chosen = np.flatnonzero(np.random.rand(len(images)) <= self.erase_prob)
        if len(chosen) == 0:
            return images
        height, width = images.shape[-2:]
        drawn = _to_device(np.stack([chosen, *self._patches(len(chosen), height, width)]), images)
        index, (top, left, bottom, right) = drawn[0], drawn[1:, :, None]
        y = torch.arange(height, device=images.device)
        x = torch.arange(width, device=images.device)
        erased = ((y >= top) & (y < bottom))[:, None, :, None] & ((x >= left) & (x < right))[
            :, None, None, :
        ]
        fill = self._fill(len(chosen), images)
        return images.index_copy_(0, index, torch.where(erased, fill, images[index]))

    def _patches(self, number: int, height: int, width: int) -> tuple[np.ndarray, ...]:
        """Draw ``random_patch`` for several images: top, left, bottom, right, (number, ) each."""
        low, high = np.log(self.aspect_range)
        aspect = np.exp(np.random.uniform(low, high, number))
        area = height * width * np.random.uniform(self.min_area_ratio, self.max_area_ratio, number)
        patch_height = np.minimum(np.round(np.sqrt(area * aspect)), height).astype(np.int64)
        patch_width = np.minimum(np.round(np.sqrt(area / aspect)), width).astype(np.int64)
        # as there, the last place is drawn only where it is the only one
        top = np.random.randint(np.maximum(height - patch_height, 1))
        left = np.random.randint(np.maximum(width - patch_width, 1))
        return top, left, top + patch_height, left + patch_width

    def _fill(self, number: int, images: Tensor) -> Tensor:
        shape = (number, *images.shape[1:])
        if self.mode == 'rand' and self.fill_std is None:
            return torch.randint(256, shape, dtype=torch.uint8, device=images.device)
        colors = np.array([self.fill_color, self.fill_std or (0,) * 3], dtype=np.float32)
        color, std = _to_device(colors, images)[:, :, None, None]
        if self.mode == 'const':
            return color.to(torch.uint8).expand(shape)
        noise = torch.randn(shape, device=images.device)
        return noise.mul_(std).add_(color).clamp_(0, 255).to(torch.uint8)


@TRANSFORMS.register_module()
class BatchRandAugment(RandAugment):
    """mmpretrain's ``RandAugment`` for a batch; its arguments, policies and distributions.

    Each image draws operations and magnitudes of its own. The colours in ``hparams`` are in the
    order red, green, blue.

    Raises:
        ConfigError: If a policy has an operation, or an interpolation, that does not run on
            batches.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for transform in self.transforms:
            if type(transform) not in OPERATIONS:
                raise ConfigError(
                    f'BatchRandAugment has no {type(transform).__name__}, only '
                    f'{", ".join(kind.__name__ for kind in OPERATIONS)}; use the RandAugment of '
                    'single images in the pipeline for others'
                )
            OPERATIONS[type(transform)].function(transform)  # raises if it cannot run

    def transform(self, images: Tensor) -> Tensor:
        """Augment.

        Args:
            images (Tensor): (B, 3, H, W), uint8; changed in place.

        Returns:
            Tensor: The same tensor.
        """
        for _ in range(self.num_policies):
            self._run(images, self._draw(len(images), *images.shape[-2:]))
        return images

    def _draw(self, number: int, height: int, width: int) -> list['_Task']:
        """Draw an operation for each image and list what runs together."""
        policies = np.random.randint(len(self.transforms), size=number)
        probs = np.array([transform.prob for transform in self.transforms])
        policies[np.random.rand(number) > probs[policies]] = -1
        tasks: dict[tuple, list] = {}
        for policy, transform in enumerate(self.transforms):
            index = np.flatnonzero(policies == policy)
            if len(index) == 0:
                continue
            operation = OPERATIONS[type(transform)]
            values = _draw_values(transform, operation.argument, len(index))
            parameters = operation.parameters(transform, values, height, width)
            kind = operation.makes_tables, operation.function(transform)
            tasks.setdefault(kind, []).append((index, parameters))
        return [
            _Task(*kind, *(np.concatenate(parts) for parts in zip(*drawn)))
            for kind, drawn in tasks.items()
        ]

    @staticmethod
    def _run(images: Tensor, tasks: list['_Task']) -> None:
        if not tasks:
            return
        # those that make tables come first and share the look-up
        tasks = sorted(tasks, key=lambda task: not task.makes_tables)
        # one copy to the device for all: whole numbers of this size are exact in float32
        drawn = _to_device(
            np.concatenate(
                [task.chosen for task in tasks] + [task.parameters.ravel() for task in tasks]
            ).astype(np.float32),
            images,
        )
        number = sum(len(task.chosen) for task in tasks)
        index, parameters = drawn[:number].long(), drawn[number:]
        chosen = images[index]
        results = [
            task.function(part, *([values.view(task.parameters.shape)] if len(values) else []))
            for task, part, values in zip(
                tasks,
                chosen.split([len(task.chosen) for task in tasks]),
                parameters.split([task.parameters.size for task in tasks]),
            )
        ]
        num_tables = sum(task.makes_tables for task in tasks)
        if num_tables:
            tables = torch.cat(results[:num_tables])
            results[:num_tables] = [look_up(chosen[: len(tables)], tables)]
        images.index_copy_(0, index, torch.cat(results))


class _Task(NamedTuple):
    """An operation and the images that it runs on.

    Attributes:
        makes_tables: Whether the function makes tables, not images.
        function: One of :mod:`batch_ops`.
        chosen: Which images, (N, ).
        parameters: The function's second argument, (N, P); P is 0 if it has none.
    """

    makes_tables: bool
    function: Callable[..., Tensor]
    chosen: np.ndarray
    parameters: np.ndarray


def _draw_values(transform: BaseAugTransform, argument: str | None, number: int) -> np.ndarray:
    """Draw what ``random_magnitude`` and ``random_negative`` draw, for several images."""
    if argument is None:
        return np.empty(number)
    level = transform.magnitude_level
    if transform.magnitude_range is None:
        values = np.full(number, getattr(transform, argument), dtype=np.float64)
    else:
        if transform.magnitude_std == 'inf':
            levels = np.random.uniform(0, level, number)
        elif transform.magnitude_std > 0:
            levels = np.random.normal(level, transform.magnitude_std, number)
            levels = levels.clip(0, transform.total_level)
        else:
            levels = np.full(number, level, dtype=np.float64)
        low, high = transform.magnitude_range
        values = levels / transform.total_level * (high - low) + low
    negative = np.random.rand(number) < transform.random_negative_prob
    return np.where(negative, -values, values)


def _to_device(values: np.ndarray, images: Tensor) -> Tensor:
    """Copy numbers to the images' device without waiting for it."""
    tensor = torch.from_numpy(values)
    if images.is_cuda:
        # from memory that is not page-locked, a copy waits for all that was launched before
        tensor = tensor.pin_memory()
    return tensor.to(images.device, non_blocking=True)
