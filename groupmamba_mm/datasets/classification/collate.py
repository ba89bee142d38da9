"""Batches that cross from a worker in a few objects instead of a few for each image."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dataset import default_collate
from mmengine.registry import FUNCTIONS
from mmpretrain.structures import DataSample
from torch import Tensor


class StackedSamples:
    """The data samples of a batch with one label each, as one tensor and their meta information.

    It is read like a list of data samples, which are then made. To unpickle and move them one by
    one takes the time of the process that trains.

    Args:
        labels (Tensor): (B, ), int64.
        metainfo (list[dict]): The meta information of each.
    """

    def __init__(self, labels: Tensor, metainfo: list[dict[str, Any]]) -> None:
        self.labels = labels
        self.metainfo = metainfo
        self._samples: list[DataSample] | None = None

    @classmethod
    def stack(cls, samples: Sequence[DataSample]) -> 'StackedSamples':
        """Stack data samples.

        Args:
            samples (Sequence[DataSample]): Such that :func:`has_single_label` holds.

        Returns:
            StackedSamples: Of their labels and meta information.
        """
        return cls(
            torch.cat([sample.gt_label for sample in samples]),
            [dict(sample.metainfo_items()) for sample in samples],
        )

    def __len__(self) -> int:
        return len(self.metainfo)

    def __getitem__(self, index: int) -> DataSample:
        if self._samples is None:
            self._samples = self.unstack()
        return self._samples[index]

    def pin_memory(self) -> 'StackedSamples':
        """Copy the labels into page-locked memory; called by torch's ``DataLoader``."""
        return StackedSamples(self.labels.pin_memory(), self.metainfo)

    def unstack(self) -> list[DataSample]:
        """Make the data samples.

        Returns:
            list[DataSample]: With ``gt_label``, a view of :attr:`labels`.
        """
        samples = []
        for label, metainfo in zip(self.labels.split(1), self.metainfo):
            sample = DataSample()
            # set_metainfo would copy each value deeply, set_gt_label looks for its type
            for key, value in metainfo.items():
                sample.set_field(value, key, field_type='metainfo')
            sample.set_field(label, 'gt_label')
            samples.append(sample)
        return samples


def has_single_label(sample: Any) -> bool:
    """Say whether a data sample holds one label and nothing else beside its meta information."""
    return (
        isinstance(sample, DataSample)
        and sample.keys() == ['gt_label']
        and sample.gt_label.numel() == 1
    )


@FUNCTIONS.register_module()
def stack_samples(data_batch: Sequence[dict]) -> dict:
    """Collate what ``PackInputs`` gives: mmengine's ``default_collate`` with stacked data samples.

    Samples of another kind (several labels, masks) stay a list.

    Args:
        data_batch (Sequence[dict]): 'inputs' (C, H, W) and 'data_samples' of each image.

    Returns:
        dict: 'inputs' (B, C, H, W) and 'data_samples', a :class:`StackedSamples` where it can be.
    """
    samples = [data.get('data_samples') for data in data_batch]
    if not all(has_single_label(sample) for sample in samples):
        return default_collate(data_batch)
    batch = default_collate(
        [
            {key: value for key, value in data.items() if key != 'data_samples'}
            for data in data_batch
        ]
    )
    batch['data_samples'] = StackedSamples.stack(samples)
    return batch
