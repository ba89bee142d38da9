"""Detectors for images of any number of channels."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models import DetDataPreprocessor
from mmengine.registry import MODELS


@MODELS.register_module()
class MultiChannelDetDataPreprocessor(DetDataPreprocessor):
    """mmdet's data preprocessor, whose base takes means of one or three channels only.

    Args:
        mean (Sequence[float], optional): One value for each channel. Defaults to None.
        std (Sequence[float], optional): The same. Defaults to None.
        **kwargs: See :class:`mmdet.models.DetDataPreprocessor`.

    Raises:
        ValueError: If only one of both is given, or with different numbers of values.
    """

    def __init__(
        self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if (mean is None) != (std is None) or (mean is not None and len(mean) != len(std)):
            raise ValueError(
                f'mean and std must have one value for each channel, got {mean} and {std}'
            )
        if mean is not None:
            self._enable_normalize = True
            for name, values in (('mean', mean), ('std', std)):
                self.register_buffer(
                    name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), False
                )
