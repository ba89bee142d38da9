"""An optimizer with few parameter groups."""
from typing import List, Optional, Union

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from groupmamba_mm.errors import ConfigError


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor with one parameter group for each set of options.

    With ``paramwise_cfg``, mmengine makes a group of every single parameter, and PyTorch updates
    one group after the other: hundreds of launches a step on a GPU instead of a few. The options
    of every parameter are the same here. Groups stand in the order in which their options first
    occur in the model, and parameters in the model's order. The optimizer's state in checkpoints
    follows the groups, so that training resumes with the constructor it was started with.

    Args: as :class:`mmengine.optim.DefaultOptimWrapperConstructor`.
    """

    def add_params(self,
                   params: List[dict],
                   module: nn.Module,
                   prefix: str = '',
                   is_dcn_module: Optional[Union[int, float]] = None) -> None:
        """Add the groups of a module, merged once the whole model is through.

        Args:
            params (list[dict]): The groups, changed in place.
            module (nn.Module): The module.
            prefix (str): Its place in the model, '' for the model itself.
            is_dcn_module (int|float|None): See the parent.

        Raises:
            ConfigError: If a parameter is in the model twice and ``bypass_duplicate`` is not set.
        """
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix == '':  # the parent calls itself for the children with their names
            params[:] = self._merge(params)

    def _merge(self, params: List[dict]) -> List[dict]:
        return merge_groups(params)


def merge_groups(groups: List[dict]) -> List[dict]:
    """Join parameter groups with equal options.

    Args:
        groups (list[dict]): Groups as a torch optimizer takes them.

    Returns:
        list[dict]: New groups; the ones given are unchanged.

    Raises:
        ConfigError: If a parameter is in two groups.
    """
    merged: List[dict] = []
    seen = set()
    for group in groups:
        # PyTorch only warns about one in the same group twice, and then updates it twice
        if not seen.isdisjoint(map(id, group['params'])):
            raise ConfigError('a parameter is in the model twice, under two names; set '
                              'optim_wrapper.paramwise_cfg.bypass_duplicate=True')
        seen.update(map(id, group['params']))
        options = {key: value for key, value in group.items() if key != 'params'}
        for other in merged:
            if {key: value for key, value in other.items() if key != 'params'} == options:
                other['params'] += group['params']
                break
        else:
            merged.append(dict(options, params=list(group['params'])))
    return merged
