"""What runs a config: the runner, the loops and hooks it may ask for, and the commands' parts."""
from groupmamba_mm.datasets.bad_images import BadImagesHook, SkipBadImages
from groupmamba_mm.datasets.listing import QuickLocalBackend
from .hooks import DrawPredictionsHook, WriteLabelsHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .loops import AmpTestLoop
from .optim import MergedOptimWrapperConstructor
from .randomness import EpochSeedHook, seed_worker_by_epoch
from .runner import CheckedRunner

__all__ = [
    'AmpTestLoop', 'BadImagesHook', 'CheckedRunner', 'DrawPredictionsHook', 'EpochSeedHook',
    'LayerDecayOptimWrapperConstructor', 'MergedOptimWrapperConstructor', 'QuickLocalBackend',
    'SkipBadImages', 'WriteLabelsHook', 'seed_worker_by_epoch'
]
