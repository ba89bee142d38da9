"""What runs a config: the runner, the loops and hooks it may ask for, and the commands' parts."""
from .hooks import DrawPredictionsHook
from .loops import AmpTestLoop
from .optim import MergedOptimWrapperConstructor
from .randomness import EpochSeedHook
from .runner import CheckedRunner

__all__ = [
    'AmpTestLoop', 'CheckedRunner', 'DrawPredictionsHook', 'EpochSeedHook',
    'MergedOptimWrapperConstructor'
]
