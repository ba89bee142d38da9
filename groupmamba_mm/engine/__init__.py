"""What runs a config: the runner, the loops and hooks it may ask for, and the commands' parts."""
from .hooks import DrawPredictionsHook
from .loops import AmpTestLoop
from .randomness import EpochSeedHook, seed_worker_by_epoch
from .runner import CheckedRunner

__all__ = [
    'AmpTestLoop', 'CheckedRunner', 'DrawPredictionsHook', 'EpochSeedHook', 'seed_worker_by_epoch'
]
