"""The data path of classification: workers decode and crop, the model's device augments batches."""

from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.datasets.classification'):
    from .batch_augment import BatchRandAugment, BatchRandomErasing, BatchRandomFlip
    from .collate import StackedSamples, stack_samples
    from .data_preprocessor import AugmentingClsDataPreprocessor
    from .resizing import AntialiasedRandomResizedCrop, AntialiasedResizeEdge

__all__ = [
    'AntialiasedRandomResizedCrop',
    'AntialiasedResizeEdge',
    'AugmentingClsDataPreprocessor',
    'BatchRandAugment',
    'BatchRandomErasing',
    'BatchRandomFlip',
    'StackedSamples',
    'stack_samples',
]
