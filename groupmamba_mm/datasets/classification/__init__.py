"""The data path of classification: workers decode and crop, the model's device augments batches."""
from .batch_augment import BatchRandAugment, BatchRandomErasing, BatchRandomFlip
from .collate import StackedSamples, stack_samples
from .data_preprocessor import AugmentingClsDataPreprocessor
from .resizing import AntialiasedRandomResizedCrop, AntialiasedResizeEdge

__all__ = [
    'AntialiasedRandomResizedCrop', 'AntialiasedResizeEdge', 'AugmentingClsDataPreprocessor',
    'BatchRandAugment', 'BatchRandomErasing', 'BatchRandomFlip', 'StackedSamples', 'stack_samples'
]
