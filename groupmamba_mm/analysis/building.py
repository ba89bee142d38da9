"""A model from its config, as a runner would build it, but without data and weights."""

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from groupmamba_mm.errors import ConfigError


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model in eval mode.

    Args:
        cfg: A config with ``model`` and ``default_scope``, its ``custom_imports`` already done
            (``Config.fromfile`` does them).

    Returns:
        The model on the CPU. Its weights are the constructors' own: ``init_weights``, which reads
        checkpoints and logs every parameter, is not called.

    Raises:
        ConfigError: The config has no model.
    """
    if cfg.get('model') is None:
        raise ConfigError(f'config {cfg.filename} has no model; take one of configs/')
    model = cfg.model.copy()
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(model).eval()
