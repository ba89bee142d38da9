"""TensorBoard, Weights & Biases and MLflow: scalars, learning rates and example predictions."""

import importlib.util
from collections.abc import Sequence

from mmengine.config import Config

from groupmamba_mm.errors import ConfigError

#: mmengine's backends by the names on the command line, which are the packages' too.
TRACKERS = {
    'tensorboard': 'TensorboardVisBackend',
    'wandb': 'WandbVisBackend',
    'mlflow': 'MLflowVisBackend',
}

# By library: its visualizer, the hook that draws predictions, and what switches that on.
_PAINTING = {
    'mmpretrain': ('UniversalVisualizer', 'VisualizationHook', 'enable'),
    'mmdet': ('DetLocalVisualizer', 'DetVisualizationHook', 'draw'),
    'mmseg': ('SegLocalVisualizer', 'SegVisualizationHook', 'draw'),
}


def track_with(cfg: Config, names: Sequence[str]) -> None:
    """Let a run report to experiment trackers, beside its own files.

    Args:
        cfg (Config): The config, changed in place.
        names (Sequence[str]): Some of :data:`TRACKERS`.

    Raises:
        ConfigError: If one's package is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f'--track {name}: its package is not installed; pip install {name}')
    visualizer, hook, switch = _PAINTING[cfg.default_scope]
    cfg.setdefault('visualizer', dict(type=visualizer))
    backends = list(cfg.visualizer.get('vis_backends') or [dict(type='LocalVisBackend')])
    present = {backend['type'] for backend in backends}
    cfg.visualizer.vis_backends = backends + [
        dict(type=TRACKERS[name]) for name in names if TRACKERS[name] not in present
    ]
    cfg.setdefault('default_hooks', {})
    painting = cfg.default_hooks.setdefault('visualization', dict(type=hook))
    painting[switch] = True
