"""What runs a config: the runner, the loops and hooks it may ask for, and the commands' parts."""
from .averaging import ForeachExponentialMovingAverage
from .distributed import BucketViewDDP
from .hooks import DrawPredictionsHook, RunAheadHook
from .loops import AmpTestLoop
from .message_hub import DeferredMessageHub
from .optim import (MergedOptimWrapperConstructor, SyncFreeAmpOptimWrapper,
                    SyncFreeOptimWrapper)
from .randomness import EpochSeedHook, seed_worker_by_epoch
from .runner import CheckedRunner

__all__ = [
    'AmpTestLoop', 'BucketViewDDP', 'CheckedRunner', 'DeferredMessageHub', 'DrawPredictionsHook',
    'EpochSeedHook', 'ForeachExponentialMovingAverage', 'MergedOptimWrapperConstructor',
    'RunAheadHook', 'SyncFreeAmpOptimWrapper', 'SyncFreeOptimWrapper', 'seed_worker_by_epoch'
]
