"""The moving average of the weights (EMA) in a few launches."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS
from torch import Tensor, nn

#: A module's table of parameters or buffers and a name in it: where a tensor is found, also after
#: it was replaced by another one.
Slot = tuple[dict[str, Tensor], str]


@MODELS.register_module()
class ForeachExponentialMovingAverage(ExponentialMovingAverage):
    """mmengine's ``ExponentialMovingAverage``, which updates all tensors at once.

    The original makes a state dict in every step and launches a kernel for each tensor. Numbers,
    options and checkpoints are the same. Only weights that two modules share, which the original
    moves twice a step with ``update_buffers=True``, are moved once.

    Args: as :class:`mmengine.model.ExponentialMovingAverage`.
    """

    def __init__(self, model: nn.Module, *args, **kwargs) -> None:
        super().__init__(model, *args, **kwargs)
        self._slots = _slots(self.module)
        parameters = {key for key, _ in self.module.named_parameters()}
        buffers = {key for key, _ in self.module.named_buffers()}
        self._averaged = [key for key in self.avg_parameters if key in parameters | buffers]
        self._kept_equal = [] if self.update_buffers else sorted(buffers)
        self._source: tuple[nn.Module, dict[str, Slot]] | None = None

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards a model.

        Args:
            model (nn.Module): The model that trains.
        """
        # in a tuple: as an attribute of its own the model would become a part of this module
        if self._source is None or self._source[0] is not model:
            self._source = model, _slots(model)
        steps = int(self.steps)  # a tensor on the CPU
        if steps == 0:
            self._copy(self._averaged)
        elif steps % self.interval == 0:
            for averages, values in self._groups(self._averaged):
                if averages[0].is_floating_point():
                    torch._foreach_lerp_(averages, values, self.momentum)
        self._copy(self._kept_equal)
        self.steps += 1

    def _copy(self, keys: Iterable[str]) -> None:
        for averages, values in self._groups(keys):
            torch._foreach_copy_(averages, values)

    def _groups(self, keys: Iterable[str]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """The averages of some names and the model's tensors, by device and type."""
        groups = defaultdict(lambda: ([], []))
        for key in keys:
            store, name = self._slots[key]
            average = store[name]
            store, name = self._source[1][key]
            averages, values = groups[average.device, average.dtype]
            averages.append(average)
            values.append(store[name].to(average.device))
        return iter(groups.values())


def _slots(model: nn.Module) -> dict[str, Slot]:
    """Where a model's parameters and buffers are, by their names."""
    return {
        f'{prefix}.{name}' if prefix else name: (store, name)
        for prefix, module in model.named_modules()
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None
    }
