"""Data-parallel training over several processes."""

from functools import partial
from typing import Any

from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor, nn


@MODEL_WRAPPERS.register_module()
class BucketViewDDP(MMDistributedDataParallel):
    """mmengine's DDP with gradients that are views of the buckets which the processes exchange.

    The averaged gradients then need not be copied back. Gradients arrive in the weights' own
    strides: those of depthwise convolutions in channels-last differ in a dimension of one element,
    of which DDP warns.

    Args:
        module (nn.Module): The model.
        broadcast_buffers (bool): Whether each forward pass starts with the first process's buffers,
            such as BatchNorm's statistics. Defaults to False, as in mmengine's runner.
        gradient_as_bucket_view (bool): See above. Defaults to True.
        **kwargs: See :class:`mmengine.model.MMDistributedDataParallel`.
    """

    def __init__(
        self,
        module: nn.Module,
        broadcast_buffers: bool = False,
        gradient_as_bucket_view: bool = True,
        **kwargs: Any,
    ) -> None:
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.dim() > 1 and 1 in parameter.shape:
                parameter.register_hook(
                    partial(_with_strides, shape=tuple(parameter.shape), strides=parameter.stride())
                )
        super().__init__(
            module,
            broadcast_buffers=broadcast_buffers,
            gradient_as_bucket_view=gradient_as_bucket_view,
            **kwargs,
        )


def _with_strides(
    gradient: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Tensor | None:
    """The same gradient in other strides, None if they differ where it matters."""
    if gradient.stride() == strides or any(
        own != wanted and length > 1
        for own, wanted, length in zip(gradient.stride(), strides, shape)
    ):
        return None
    return gradient.as_strided(shape, strides)
