"""Normalisation, and in training augmentation, of a whole batch on the model's device."""

import math
from collections.abc import Sequence

import torch
from mmengine.registry import MODELS, TRANSFORMS
from mmpretrain.models.utils import ClsDataPreprocessor
from mmpretrain.structures import DataSample
from torch import Tensor
from torch.nn import functional as F

from groupmamba_mm.errors import ConfigError, DataError

from .collate import StackedSamples, has_single_label


@MODELS.register_module()
class AugmentingClsDataPreprocessor(ClsDataPreprocessor):
    """mmpretrain's ``ClsDataPreprocessor`` that also augments the images of a training batch.

    The workers send uint8 images; flips, RandAugment, erasing, normalisation and mixing run here,
    each on all images at once and without waiting for the device. All random numbers come from the
    global generators of numpy and torch.

    Args:
        augments (Sequence[dict]): Transforms of the uint8 batch in training, in this order:
            ``BatchRandomFlip``, ``BatchRandAugment``, ``BatchRandomErasing`` or others that are
            registered and take and return (B, 3, H, W). With ``to_rgb`` their images, and so the
            colours in their arguments, are RGB. Defaults to none.
        **kwargs: See ``ClsDataPreprocessor``; its ``batch_augments`` mix the normalised images and
            their labels.
    """

    def __init__(self, augments: Sequence[dict] = (), **kwargs) -> None:
        super().__init__(**kwargs)
        # copies from pinned memory need not be waited for
        self._non_blocking = True
        self.augments = [TRANSFORMS.build(augment) for augment in augments]

    def forward(self, data: dict, training: bool = False) -> dict:
        """Prepare a batch.

        Args:
            data (dict): 'inputs' (B, 3, H, W) and, if there are labels, 'data_samples'.
            training (bool): Whether to augment and mix. Defaults to False.

        Returns:
            dict: 'inputs' (B, 3, H, W), float32, and 'data_samples', a list.

        Raises:
            DataError: If a batch to be augmented is not uint8, has images of several sizes, or has
                not exactly one label for each image.
        """
        inputs, samples = data['inputs'], data.get('data_samples')
        stackable = (
            isinstance(inputs, Tensor)
            and inputs.dim() == 4
            and (
                samples is None
                or isinstance(samples, StackedSamples)
                or all(has_single_label(sample) for sample in samples)
            )
        )
        if training and self.augments:
            _require_augmentable(inputs, stackable)
        if not stackable:
            if isinstance(samples, StackedSamples):
                data = dict(data, data_samples=samples.unstack())
            return super().forward(data, training)

        inputs = self._prepare(inputs, training)
        if samples is None:
            return dict(inputs=inputs, data_samples=None)
        if not isinstance(samples, StackedSamples):
            samples = StackedSamples.stack(samples)
        inputs, samples = self._label(inputs, samples, training)
        return dict(inputs=inputs, data_samples=samples)

    def _prepare(self, inputs: Tensor, training: bool) -> Tensor:
        """Augment, normalise and pad."""
        inputs = self.cast_data(inputs)
        if self.to_rgb and inputs.size(1) == 3:
            inputs = inputs.flip(1)
        elif training and self.augments:
            inputs = inputs.clone()  # augmentations write into it
        if training:
            # autocast, in which an optimizer wrapper calls this, would round coordinates to bf16
            with torch.autocast(inputs.device.type, enabled=False):
                for augment in self.augments:
                    inputs = augment(inputs)
        inputs = (inputs - self.mean).div_(self.std) if self._enable_normalize else inputs.float()
        if self.pad_size_divisor > 1:
            height, width = inputs.shape[-2:]
            missing = [
                math.ceil(size / self.pad_size_divisor) * self.pad_size_divisor - size
                for size in (width, height)
            ]
            inputs = F.pad(inputs, (0, missing[0], 0, missing[1]), 'constant', self.pad_value)
        return inputs

    def _label(
        self, inputs: Tensor, stacked: StackedSamples, training: bool
    ) -> tuple[Tensor, list[DataSample]]:
        """Mix the images with their labels and hand the labels to the data samples."""
        labels = stacked.labels.to(self.device, non_blocking=True)
        samples = StackedSamples(labels, stacked.metainfo).unstack()
        if not self.to_onehot:
            return inputs, samples
        num_classes = self.num_classes or samples[0].get('num_classes')
        if num_classes is None:
            raise ConfigError(
                'data_preprocessor has no num_classes, so labels cannot be made '
                'probabilities; set it to the number of classes'
            )
        scores = F.one_hot(labels, num_classes)
        if training and self.batch_augments is not None:
            # the permutation is then drawn on the device: an index from the host is waited for
            with torch.device(self.device):
                inputs, scores = self.batch_augments(inputs, scores)
        for sample, score in zip(samples, scores.unbind()):
            sample.set_field(score, 'gt_score')
            sample.set_field(num_classes, 'num_classes', field_type='metainfo')
        return inputs, samples


def _require_augmentable(inputs: Tensor | Sequence[Tensor], stackable: bool) -> None:
    """Refuse a training batch that the augmentations cannot take."""
    if not isinstance(inputs, Tensor):
        sizes = sorted({tuple(image.shape) for image in inputs})
        raise DataError(
            f'the images of a training batch are a list with the sizes {sizes[:3]}, and '
            'data_preprocessor.augments take one tensor; make them one size in the pipeline and '
            'collate them with stack_samples or default_collate'
        )
    if not stackable or inputs.size(1) != 3:
        raise DataError(
            f'data_preprocessor.augments take images (B, 3, H, W) with one label each, got a batch '
            f'of shape {tuple(inputs.shape)}, or with other labels; augment these in the pipeline '
            'and set data_preprocessor.augments=[]'
        )
    if inputs.dtype != torch.uint8:
        raise DataError(
            f'data_preprocessor.augments take uint8 images, got {inputs.dtype}; leave to_float32 '
            'and normalisation out of the pipeline'
        )
