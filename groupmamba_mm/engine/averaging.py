"""The moving average of the weights (EMA) in a few launches."""

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence

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
        self._source: tuple[nn.Module, _Pairs, _Pairs] | None = None

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards a model.

        Args:
            model (nn.Module): The model that trains.
        """
        # in a tuple: as an attribute of its own the model would become a part of this module
        if self._source is None or self._source[0] is not model:
            slots = _slots(model)
            self._source = (
                model,
                *(
                    _Pairs([(self._slots[key], slots[key]) for key in keys])
                    for keys in (self._averaged, self._kept_equal)
                ),
            )
        _, averaged, kept_equal = self._source
        steps = int(self.steps)  # a tensor on the CPU
        if steps == 0:
            averaged.copy()
        elif steps % self.interval == 0:
            for averages, values in averaged.groups():
                if averages[0].is_floating_point():
                    torch._foreach_lerp_(averages, values, self.momentum)
        kept_equal.copy()
        self.steps += 1


class _Pairs:
    """Averages and what they are averages of, grouped for operations on many tensors at once.

    Args:
        slots: Of an average and of the model's tensor each.
    """

    def __init__(self, slots: Sequence[tuple[Slot, Slot]]) -> None:
        self._slots = [slot for pair in slots for slot in pair]
        self._tensors: list[Tensor] = []
        self._groups: list[tuple[list[Tensor], list[Tensor]]] = []

    def groups(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Averages and the model's tensors, on the averages' device, by device and type."""
        tensors = [store[name] for store, name in self._slots]
        if not all(map(operator.is_, tensors, self._tensors or [None])):
            groups = defaultdict(lambda: ([], []))
            for average, value in zip(tensors[::2], tensors[1::2]):
                averages, values = groups[average.device, average.dtype, value.device]
                averages.append(average)
                values.append(value)
            self._tensors, self._groups = tensors, list(groups.values())
        for averages, values in self._groups:
            device = averages[0].device
            if values[0].device != device:
                values = [value.to(device) for value in values]
            yield averages, values

    def copy(self) -> None:
        """Make the averages equal to the model's tensors."""
        for averages, values in self.groups():
            torch._foreach_copy_(averages, values)


def _slots(model: nn.Module) -> dict[str, Slot]:
    """Where a model's parameters and buffers are, by their names."""
    return {
        f'{prefix}.{name}' if prefix else name: (store, name)
        for prefix, module in model.named_modules()
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None
    }
