"""TensorBoard, Weights & Biases and MLflow: scalars, learning rates and example predictions."""

import importlib.util
import os
from collections.abc import Sequence

from mmengine.config import Config

from groupmamba_mm.errors import ConfigError

from .config_checks import type_name

#: mmengine's backends by the names on the command line, which are the packages' too.
TRACKERS = {
    'tensorboard': 'TensorboardVisBackend',
    'wandb': 'WandbVisBackend',
    'mlflow': 'MLflowVisBackend',
}
# MLflow's own default; mmengine's, a folder of files, is refused by MLflow 3.
_MLFLOW_PLACE = 'sqlite:///mlflow.db'

# What paints predictions, by library; mmseg's own writes Latin letters only.
_VISUALIZERS = {
    'mmpretrain': 'UniversalVisualizer',
    'mmdet': 'DetLocalVisualizer',
    'mmseg': 'NamedSegVisualizer',
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
    cfg.setdefault('visualizer', dict(type='Visualizer'))
    if type_name(cfg.visualizer) in ('Visualizer', 'SegLocalVisualizer'):
        cfg.visualizer.type = _VISUALIZERS[cfg.default_scope]
    if cfg.default_scope == 'mmseg':
        importlib.import_module('groupmamba_mm.visualization.seg_visualizer')  # registers it
    backends = list(cfg.visualizer.get('vis_backends') or [dict(type='LocalVisBackend')])
    present = {backend['type'] for backend in backends}
    options = dict(mlflow=dict(tracking_uri=os.environ.get('MLFLOW_TRACKING_URI') or _MLFLOW_PLACE))
    cfg.visualizer.vis_backends = backends + [
        dict(type=TRACKERS[name], **options.get(name, {}))
        for name in names
        if TRACKERS[name] not in present
    ]
    cfg.custom_hooks = list(cfg.get('custom_hooks') or []) + [dict(type='ExamplePredictionsHook')]
