"""What runs a config: the runner, the loops and hooks it may ask for, and the commands' parts."""
from .checkpointing import SafeCheckpointHook
from .health import HealthHook
from .hooks import DrawPredictionsHook
from .loops import AmpTestLoop
from .optim import MergedOptimWrapperConstructor
from .run_control import RunControlHook
from .runner import CheckedRunner
from .train_loops import ResumableEpochLoop, ResumableIterLoop

__all__ = [
    'AmpTestLoop', 'CheckedRunner', 'DrawPredictionsHook', 'HealthHook',
    'MergedOptimWrapperConstructor', 'ResumableEpochLoop', 'ResumableIterLoop', 'RunControlHook',
    'SafeCheckpointHook'
]
