"""What runs a config: the runner, the loops and hooks it may ask for, and the commands' parts."""
from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.engine'):
    from .hooks import DrawPredictionsHook
    from .loops import AmpTestLoop
    from .optim import MergedOptimWrapperConstructor
    from .randomness import EpochSeedHook, seed_worker_by_epoch
    from .runner import CheckedRunner

__all__ = [
    'AmpTestLoop', 'CheckedRunner', 'DrawPredictionsHook', 'EpochSeedHook',
    'MergedOptimWrapperConstructor', 'seed_worker_by_epoch'
]
