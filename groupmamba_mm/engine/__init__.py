"""What runs a config: the runner, the loops and hooks it may ask for, and the commands' parts."""

import warnings

from groupmamba_mm.extras import explain_missing

# Without operators mmcv warns at every start of an attention that no classifier here has.
warnings.filterwarnings('ignore', message='Fail to import ``MultiScaleDeformableAttention``')

with explain_missing('groupmamba_mm.engine'):
    from groupmamba_mm.datasets.bad_images import BadImagesHook, SkipBadImages
    from groupmamba_mm.datasets.listing import QuickLocalBackend

    from .averaging import ForeachExponentialMovingAverage
    from .checkpointing import SafeCheckpointHook
    from .distributed import FlatDataParallel
    from .health import HealthHook
    from .hooks import DrawPredictionsHook, ExamplePredictionsHook, RunAheadHook, WriteLabelsHook
    from .initializer import CheckedPretrainedInit
    from .layer_decay import LayerDecayOptimWrapperConstructor
    from .loops import AmpTestLoop
    from .message_hub import DeferredMessageHub
    from .optim import (
        MergedOptimWrapperConstructor,
        SyncFreeAmpOptimWrapper,
        SyncFreeOptimWrapper,
        ZeroRedundancyOptimizer,
    )
    from .run_control import RunControlHook
    from .runner import CheckedRunner
    from .train_loops import ResumableEpochLoop, ResumableIterLoop

__all__ = [
    'AmpTestLoop',
    'BadImagesHook',
    'CheckedPretrainedInit',
    'CheckedRunner',
    'DeferredMessageHub',
    'DrawPredictionsHook',
    'ExamplePredictionsHook',
    'FlatDataParallel',
    'ForeachExponentialMovingAverage',
    'HealthHook',
    'LayerDecayOptimWrapperConstructor',
    'MergedOptimWrapperConstructor',
    'QuickLocalBackend',
    'ResumableEpochLoop',
    'ResumableIterLoop',
    'RunAheadHook',
    'RunControlHook',
    'SafeCheckpointHook',
    'SkipBadImages',
    'SyncFreeAmpOptimWrapper',
    'SyncFreeOptimWrapper',
    'WriteLabelsHook',
    'ZeroRedundancyOptimizer',
]
