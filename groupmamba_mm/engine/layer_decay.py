"""Learning rates that fall from the head down to the stem, for the three tasks alike."""

from typing import Any

from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from groupmamba_mm.errors import ConfigError

from .optim import MergedOptimWrapperConstructor


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(MergedOptimWrapperConstructor):
    """Layer-wise decay for a model with any backbone that knows the depth of its parameters.

    A parameter of depth d out of D gets the learning rate times ``layer_decay_rate**(D - 1 - d)``:
    the stem the lowest, necks and heads the full one. The other options of ``paramwise_cfg`` work
    as ever, and groups with equal options are joined.

    Args:
        optim_wrapper_cfg (dict): As :class:`mmengine.optim.DefaultOptimWrapperConstructor`.
        paramwise_cfg (dict): The same, with ``layer_decay_rate`` above 0 and at most 1.

    Raises:
        ConfigError: If the rate is missing or outside of that.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        self.layer_decay_rate = paramwise_cfg.pop('layer_decay_rate', None)
        rate = self.layer_decay_rate
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ConfigError(
                f'optim_wrapper.paramwise_cfg.layer_decay_rate is {rate!r}; set it '
                'to a number above 0 and at most 1, for example 0.8'
            )
        # mmengine looks at single parameters only where paramwise_cfg says something
        paramwise_cfg.setdefault('bypass_duplicate', False)
        super().__init__(optim_wrapper_cfg, paramwise_cfg)

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: int | float | None = None,
    ) -> None:
        """Add the groups of a module, with lower rates for what lies deeper.

        Args:
            params (list[dict]): The groups, changed in place.
            module (nn.Module): The module.
            prefix (str): Its place in the model, '' for the model itself.
            is_dcn_module (int|float|None): See the parent.

        Raises:
            ConfigError: If no backbone of the model knows the depth of its parameters.
        """
        if prefix == '':
            self._factors = layer_factors(module, self.layer_decay_rate)
        super().add_params(params, module, prefix, is_dcn_module)

    def _merge(self, params: list[dict]) -> list[dict]:
        for group in params:
            (parameter,) = group['params']
            group['lr'] = group.get('lr', self.base_lr) * self._factors.get(id(parameter), 1.0)
        return super()._merge(params)


def layer_factors(model: nn.Module, rate: float) -> dict[int, float]:
    """Find what the learning rate of each parameter of a backbone is multiplied with.

    Args:
        model (nn.Module): A model with a backbone that has ``get_layer_depth(name, prefix)``.
        rate (float): The decay from a layer to the one below.

    Returns:
        dict: The factors by the ids of the parameters.

    Raises:
        ConfigError: If there is no such backbone.
    """
    factors: dict[int, float] = {}
    for name, module in model.named_modules():
        if name.split('.')[-1] == 'backbone' and hasattr(module, 'get_layer_depth'):
            for key, parameter in module.named_parameters():
                depth, depths = module.get_layer_depth(f'backbone.{key}', 'backbone.')
                factors[id(parameter)] = rate ** (depths - 1 - depth)
    if not factors:
        kind: Any = type(getattr(model, 'backbone', model)).__name__
        raise ConfigError(
            f'optim_wrapper.constructor=LayerDecayOptimWrapperConstructor: {kind} '
            'does not say how deep its layers lie (get_layer_depth); take another '
            'backbone or constructor'
        )
    return factors
