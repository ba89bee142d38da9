"""Optimizers in few launches, and their wrappers without waiting for the GPU."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch.distributed.optim
from mmengine.dist import is_distributed
from mmengine.optim import AmpOptimWrapper, DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import Tensor, nn

from groupmamba_mm.errors import ConfigError

from .config_checks import close_to

# Options of torch's optimizers that choose an implementation, not what is computed.
_IMPLEMENTATIONS = ('foreach', 'fused')


class SyncFree:
    """What wrappers of optimizers do without waiting for the GPU; mixed into mmengine's.

    The norm of the gradients is logged as the tensor that it is. mmengine's own make a number of it
    in every step, for which the host waits until the GPU has done all of the step.

    Attributes:
        gradient_norm (Tensor, optional): The norm of all gradients in the last step, before
            clipping; None if it was not needed.
    """

    gradient_norm: Tensor | None = None

    def _clip_grad(self) -> None:
        parameters = [
            parameter
            for group in self.optimizer.param_groups
            for parameter in group['params']
            if parameter.requires_grad and parameter.grad is not None
        ]
        self.gradient_norm = None
        if parameters:
            norm = self.clip_func(parameters, **self.clip_grad_kwargs)
            if norm is not None:
                self.gradient_norm = norm
                self.message_hub.update_scalar(f'train/{self.grad_name}', norm)

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue an optimizer with this run's kernels, whichever ones wrote its state.

        Args:
            state_dict (dict): See :meth:`mmengine.optim.OptimWrapper.load_state_dict`; it stays as
                it is.
        """
        own = self.optimizer.param_groups
        groups = [
            dict(saved, **{name: group[name] for name in _IMPLEMENTATIONS if name in group})
            for saved, group in zip(state_dict['param_groups'], own)
        ]
        # a number of groups that does not fit is the optimizer's to refuse
        groups += state_dict['param_groups'][len(own) :]
        super().load_state_dict(dict(state_dict, param_groups=groups))


@OPTIM_WRAPPERS.register_module()
class SyncFreeOptimWrapper(SyncFree, OptimWrapper):
    """mmengine's ``OptimWrapper`` that does not wait for the GPU, see :class:`SyncFree`."""


@OPTIM_WRAPPERS.register_module()
class SyncFreeAmpOptimWrapper(SyncFree, AmpOptimWrapper):
    """mmengine's ``AmpOptimWrapper`` that does not wait for the GPU, see :class:`SyncFree`.

    With fp16, whether a step is left out is decided on the GPU if the optimizer is fused, as it is
    by :class:`MergedOptimWrapperConstructor`; else the host waits for it.
    """


#: The mixed precision counterparts of wrappers, by their names in configs.
AMP_WRAPPERS = {
    'OptimWrapper': 'AmpOptimWrapper',
    'SyncFreeOptimWrapper': 'SyncFreeAmpOptimWrapper',
}
#: The other way round.
PLAIN_WRAPPERS = {amp: plain for plain, amp in AMP_WRAPPERS.items()}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor with one parameter group for each set of options.

    With ``paramwise_cfg``, mmengine makes a group of every single parameter, and PyTorch updates
    one group after the other: hundreds of launches a step on a GPU instead of a few. The options
    of every parameter are the same here. Groups stand in the order in which their options first
    occur in the model, and parameters in the model's order. The optimizer's state in checkpoints
    follows the groups, so that training resumes with the constructor it was started with.

    On a GPU, torch's optimizers get ``fused=True`` where they take it and the config does not
    choose: a step is then a few kernels. On a CPU they are as they were.

    Args: as :class:`mmengine.optim.DefaultOptimWrapperConstructor`.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer and its wrapper.

        Args:
            model (nn.Module): The model, on its device already.

        Returns:
            OptimWrapper: The wrapper with the optimizer.
        """
        self.optimizer_cfg = with_fused(self.optimizer_cfg, model)
        return super().__call__(model)

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: int | float | None = None,
    ) -> None:
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

    def _merge(self, params: list[dict]) -> list[dict]:
        return merge_groups(params)


@OPTIMIZERS.register_module(force=True)  # mmengine's waits for itself when a checkpoint is saved
class ZeroRedundancyOptimizer(torch.distributed.optim.ZeroRedundancyOptimizer):
    """An optimizer whose state is shared out to the processes (ZeRO, stage 1).

    Checkpoints hold all of the state, in the form of the optimizer inside: a training can go on
    with another number of processes, or without the sharing.

    Args:
        params (Iterable): Parameters or groups of them.
        optimizer_type (str): The optimizer inside, such as 'AdamW'.
        **kwargs: Its arguments.

    Raises:
        ConfigError: If there is one process alone, or no such optimizer.
    """

    def __init__(self, params: Iterable, optimizer_type: str, **kwargs: Any) -> None:
        inside = OPTIMIZERS.get(optimizer_type)
        if inside is None:
            raise ConfigError(
                f'optim_wrapper.optimizer.optimizer_type: there is no optimizer {optimizer_type!r}; '
                + close_to(optimizer_type, OPTIMIZERS.module_dict)
            )
        if not is_distributed():
            raise ConfigError(
                'optim_wrapper.optimizer.type is ZeroRedundancyOptimizer, which shares its state '
                'out to several processes, and this run has one; start it with '
                f'tools/dist_train.sh, or take type={optimizer_type}'
            )
        super().__init__(list(params), inside, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from all of the state; torch takes the other processes' parts out of it.

        Args:
            state_dict (dict): As :meth:`state_dict` gives it; it stays as it is.
        """
        super().load_state_dict(dict(state_dict, state=dict(state_dict['state'])))


def with_fused(optimizer_cfg: dict, model: nn.Module) -> dict:
    """Choose an optimizer's fused kernels if it has some for the parameters.

    Args:
        optimizer_cfg (dict): Config of an optimizer; what it says about ``fused``, ``foreach`` and
            ``differentiable`` stands.
        model (nn.Module): The model whose parameters are optimized.

    Returns:
        dict: A copy with ``fused=True``, or the config itself where they cannot be used.
    """
    optimizer = optimizer_cfg['type']
    if isinstance(optimizer, str):
        with OPTIMIZERS.switch_scope_and_registry(None) as registry:
            optimizer = registry.get(optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if (
        optimizer is None
        or not optimizer.__module__.startswith('torch.optim')
        or 'fused' not in inspect.signature(optimizer).parameters
        or not {'foreach', 'fused', 'differentiable'}.isdisjoint(optimizer_cfg)
        or not all(parameter.is_cuda and parameter.is_floating_point() for parameter in trained)
    ):
        return optimizer_cfg
    return dict(optimizer_cfg, fused=True)


def merge_groups(groups: list[dict]) -> list[dict]:
    """Join parameter groups with equal options.

    Args:
        groups (list[dict]): Groups as a torch optimizer takes them.

    Returns:
        list[dict]: New groups; the ones given are unchanged.

    Raises:
        ConfigError: If a parameter is in two groups.
    """
    merged: list[dict] = []
    seen = set()
    for group in groups:
        # PyTorch only warns about one in the same group twice, and then updates it twice
        if not seen.isdisjoint(map(id, group['params'])):
            raise ConfigError(
                'a parameter is in the model twice, under two names; set '
                'optim_wrapper.paramwise_cfg.bypass_duplicate=True'
            )
        seen.update(map(id, group['params']))
        options = {key: value for key, value in group.items() if key != 'params'}
        for other in merged:
            if {key: value for key, value in other.items() if key != 'params'} == options:
                other['params'] += group['params']
                break
        else:
            merged.append(dict(options, params=list(group['params'])))
    return merged
