"""Data-parallel training over several processes."""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor, nn
from torch.autograd import Variable

from groupmamba_mm.cuda_graph import ALIGNED_TO
from groupmamba_mm.errors import ConfigError


@MODEL_WRAPPERS.register_module()
class FlatDataParallel(nn.Module):
    """Data parallelism that exchanges all gradients at once, when the backward pass is over.

    PyTorch's DDP takes each gradient as it comes: a copy into a bucket for each of some 600
    weights, launched by a host that has to keep up with a GPU, so that the buckets which are full
    travel during the backward pass. A backward pass that is replayed from a CUDA graph gives all
    gradients at its end, where one copy and one exchange are enough.

    Gradients are averaged over the processes at the end of each backward pass of a loss that the
    wrapped model computed outside :meth:`no_sync`. Weights and buffers begin as the first
    process's; buffers are not exchanged later.

    Args:
        module (nn.Module): The model, on its device.

    Raises:
        ConfigError: The processes have different models.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._named = list(module.named_parameters())
        self._is_synced, self._is_queued = True, False
        self._buckets: list[Tensor] = []
        self._views: list[Tensor] = []
        self._viewed: list[int] = []  # ids of the weights whose gradients have the views
        self._begin_as_the_first_process()

    def _begin_as_the_first_process(self) -> None:
        state = [*self.module.named_parameters(), *self.module.named_buffers()]
        own = [f'{name}: {tuple(t.shape)} {t.dtype} {t.requires_grad}' for name, t in state]
        digests = [''] * dist.get_world_size()
        dist.all_gather_object(digests, hashlib.sha256(repr(own).encode()).hexdigest())
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise ConfigError(
                f'process(es) {others} have another model than process 0; start all with the same '
                'config and code'
            )
        with torch.no_grad():
            for _, tensor in state:
                value = tensor.contiguous()
                dist.broadcast(value, src=0)
                tensor.copy_(value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Args:
            *args: As the model's.
            **kwargs: As the model's.

        Returns:
            Any: What the model returns.
        """
        outputs = self.module(*args, **kwargs)
        if self._is_synced and torch.is_grad_enabled():
            self._is_queued = False
            for output in _tensors(outputs):
                if output.requires_grad:
                    output.register_hook(self._queue)
        return outputs

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Train one step, as :meth:`mmengine.model.BaseModel.train_step`.

        Args:
            data (Any): A batch of the loader.
            optim_wrapper (OptimWrapper): The optimizer.

        Returns:
            dict[str, Tensor]: The losses.
        """
        with optim_wrapper.optim_context(self):
            losses = self._run_forward(self._model.data_preprocessor(data, training=True), 'loss')
        if not any(loss.requires_grad for loss in _tensors(losses)):
            raise ConfigError(
                f'the model returns {type(losses).__name__} as losses, in which no tensor with a '
                'gradient is found; return a dict of tensors or of lists of them'
            )
        loss, logged = self._model.parse_losses(losses)
        optim_wrapper.update_params(loss)
        return logged

    def val_step(self, data: Any) -> list:
        """Predict a batch of the validation.

        Args:
            data (Any): A batch of the loader.

        Returns:
            list: The predictions.
        """
        return self._model.val_step(data)

    def test_step(self, data: Any) -> list:
        """Predict a batch of the test.

        Args:
            data (Any): A batch of the loader.

        Returns:
            list: The predictions.
        """
        return self._model.test_step(data)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Passes that begin here leave their gradients to this process, to be added up."""
        before, self._is_synced = self._is_synced, False
        try:
            yield
        finally:
            self._is_synced = before

    _run_forward = BaseModel._run_forward  # of dicts, lists and tuples

    @property
    def _model(self) -> BaseModel:
        return self.module

    def _queue(self, gradient: Tensor) -> None:
        """Have the gradients averaged when the backward pass that runs is over."""
        if not self._is_queued:
            self._is_queued = True
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._is_queued = False
        parameters = [p for _, p in self._named if p.requires_grad]
        gradients = [parameter.grad for parameter in parameters]
        if any(gradient is None for gradient in gradients):
            unused = [n for n, p in self._named if p.requires_grad and p.grad is None]
            raise ConfigError(
                f'{len(unused)} weights have no part in the loss of this batch, of which processes '
                f'cannot exchange gradients: {", ".join(unused[:5])}; freeze them '
                '(requires_grad=False), or set find_unused_parameters=True'
            )
        trained = [id(parameter) for parameter in parameters]
        if trained != self._viewed:  # the first time, or some were frozen since
            self._viewed = trained
            self._make_views(gradients)
        torch._foreach_copy_(self._views, gradients)
        for bucket in self._buckets:
            bucket.div_(dist.get_world_size())
            dist.all_reduce(bucket)
        for parameter, view in zip(parameters, self._views):
            parameter.grad = view

    def _make_views(self, gradients: list[Tensor]) -> None:
        """Memory for gradients side by side, a bucket for each type; with equal strides, all are
        copied in a few launches.
        """
        kinds = [(gradient.dtype, gradient.device) for gradient in gradients]
        sizes, places = dict.fromkeys(kinds, 0), []
        for kind, gradient in zip(kinds, gradients):
            places.append(sizes[kind])
            sizes[kind] += math.ceil(gradient.numel() / ALIGNED_TO) * ALIGNED_TO
        buckets = {kind: torch.zeros(n, dtype=kind[0], device=kind[1]) for kind, n in sizes.items()}
        self._views = []
        for kind, gradient, place in zip(kinds, gradients, places):
            strides = torch.empty_like(gradient, device='meta').stride()  # without gaps
            self._views.append(buckets[kind].as_strided(gradient.shape, strides, place))
        self._buckets = list(buckets.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in outputs of a model."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(list(vars(value).values()))
