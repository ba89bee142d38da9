"""What runs a config: the runner, the loops and hooks it may ask for, and the commands' parts."""
from .checkpointing import SafeCheckpointHook
from .hooks import DrawPredictionsHook
from .loops import AmpTestLoop
from .optim import MergedOptimWrapperConstructor
from .runner import CheckedRunner
from .train_loops import ResumableEpochLoop, ResumableIterLoop

__all__ = [
    'AmpTestLoop', 'CheckedRunner', 'DrawPredictionsHook', 'MergedOptimWrapperConstructor',
    'ResumableEpochLoop', 'ResumableIterLoop', 'SafeCheckpointHook'
]
