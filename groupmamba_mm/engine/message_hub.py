"""Logged values that stay on the GPU until somebody reads them."""

from collections import OrderedDict, defaultdict

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from torch import Tensor

# So many values wait at most, whoever reads: each of them holds a piece of GPU memory.
_MAX_PENDING = 10_000


class DeferredMessageHub(MessageHub):
    """A message hub that does not wait for the GPU when a value is written.

    mmengine's own turns every logged tensor into a number at once, so that the host waits for the
    GPU several times in each iteration. Here tensors are kept, and all of them are fetched in one
    copy when a value is read: when a line is logged or a checkpoint is saved. Readers find the same
    numbers in the same order.

    It is found by ``MessageHub.get_current_instance()`` like the original.

    Args: as :class:`mmengine.logging.MessageHub`.
    """

    def __init__(self, name: str, **kwargs) -> None:
        self._pending: dict[str, list[tuple[Tensor | int | float, int]]] = OrderedDict()
        self._num_pending = 0
        super().__init__(name, **kwargs)

    def update_scalar(
        self,
        key: str,
        value: int | float | np.ndarray | Tensor,
        count: int = 1,
        resumed: bool = True,
    ) -> None:
        """Write a value down, see :meth:`mmengine.logging.MessageHub.update_scalar`.

        Args:
            key (str): Its name.
            value (Tensor or np.ndarray or int or float): The value, one element.
            count (int): By how much it counts in a mean. Defaults to 1.
            resumed (bool): Whether checkpoints hold it. Defaults to True.
        """
        self._set_resumed_keys(key, resumed)
        assert isinstance(count, int), f'count must be int, got {type(count)}: {count}'
        if isinstance(value, Tensor):
            assert value.numel() == 1, f'{key} has {value.numel()} elements, one can be logged'
            # a copy: what it was computed in may be written over, in a CUDA graph by the next step
            value = value.detach().reshape(()).clone()
        else:
            value = self._get_valid_value(value)
        self._pending.setdefault(key, []).append((value, count))
        self._num_pending += 1
        if self._num_pending >= _MAX_PENDING:
            self.fetch(*self._pending)

    def fetch(self, *keys: str) -> None:
        """Bring values that wait to the host.

        Args:
            *keys (str): Their names; those of which nothing waits are skipped.
        """
        waiting = {key: self._pending.pop(key) for key in keys if key in self._pending}
        groups = defaultdict(list)
        for key, entries in waiting.items():
            for index, (value, _) in enumerate(entries):
                if isinstance(value, Tensor):
                    groups[value.device, value.dtype].append((key, index, value))
        numbers = {}
        for members in groups.values():
            fetched = torch.stack([value for *_, value in members]).tolist()
            numbers.update(
                {(key, index): number for (key, index, _), number in zip(members, fetched)}
            )
        for key, entries in waiting.items():
            self._append(
                key,
                [numbers.get((key, index), value) for index, (value, _) in enumerate(entries)],
                [count for _, count in entries],
            )
            self._num_pending -= len(entries)

    def _append(self, key: str, values: list[int | float], counts: list[int]) -> None:
        buffer = self._log_scalars.get(key)
        if buffer is None:
            self._log_scalars[key] = HistoryBuffer(values, counts)
            return
        # one copy of the history for all of them; HistoryBuffer.update makes one for each
        length = buffer.max_length
        buffer._log_history = np.append(buffer._log_history, values)[-length:]
        buffer._count_history = np.append(buffer._count_history, counts)[-length:]

    @property
    def log_scalars(self) -> OrderedDict:
        """See :attr:`mmengine.logging.MessageHub.log_scalars`."""
        self.fetch(*self._pending)
        return super().log_scalars

    def get_scalar(self, key: str) -> HistoryBuffer:
        """Read the history of one value; the others go on waiting.

        Args:
            key (str): Its name.

        Returns:
            HistoryBuffer: The history.

        Raises:
            KeyError: There is no value of that name.
        """
        self.fetch(key)
        if key not in self._log_scalars:
            raise KeyError(
                f'nothing is logged as {key!r}; there are '
                f'{sorted(self._log_scalars.keys() | self._pending.keys())}'
            )
        return self._log_scalars[key]

    def state_dict(self) -> dict:
        """See :meth:`mmengine.logging.MessageHub.state_dict`."""
        self.fetch(*self._pending)
        return super().state_dict()


# The metaclass gave the class a table of its own, in which get_current_instance() of the original,
# as the libraries call it, would not look.
DeferredMessageHub._instance_dict = MessageHub._instance_dict
