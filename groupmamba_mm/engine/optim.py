"""Parameter groups of an optimizer, as few as the settings need."""
from typing import Dict, List, Optional, Union

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor with one parameter group for all parameters of the same settings.

    mmengine's own makes a group of each parameter. PyTorch updates one group after the other, so
    that hundreds of groups are thousands of small kernels, more time than the update itself takes.
    The settings of each parameter, and what becomes of it, are the same.

    Args:
        *args: See ``mmengine.optim.DefaultOptimWrapperConstructor``.
        **kwargs: See there.
    """

    def add_params(self,
                   params: List[Dict],
                   module: nn.Module,
                   prefix: str = '',
                   is_dcn_module: Optional[Union[int, float]] = None) -> None:
        """Append the groups of a module's parameters.

        Args:
            params: The groups so far, extended in place.
            module: The module.
            prefix: Its name in the model, '' for the model itself.
            is_dcn_module: See ``mmengine.optim.DefaultOptimWrapperConstructor.add_params``.
        """
        if prefix:  # mmengine's recursion into a child
            super().add_params(params, module, prefix, is_dcn_module)
            return
        single: List[Dict] = []
        super().add_params(single, module, prefix, is_dcn_module)
        merged: Dict[tuple, Dict] = {}
        for group in single:
            settings = {key: value for key, value in group.items() if key != 'params'}
            same = merged.setdefault(tuple(sorted(settings.items())), dict(params=[], **settings))
            same['params'] += group['params']
        params += merged.values()
