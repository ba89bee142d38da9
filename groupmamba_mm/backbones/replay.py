"""Inference without launches from Python: a pass that comes again and again is replayed.

A small batch takes a GPU less time than Python takes to launch its kernels. When the same kind of
pass has come several times in a row, it is recorded in a CUDA graph. Weights are read in the graph:
what changes them in place is seen. What a graph cannot see ends it: tensors in other memory, hooks,
replaced submodules, other modes.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from groupmamba_mm.cuda_graph import captured
from groupmamba_mm.layers import GroupedSSM, is_watched

logger = logging.getLogger('groupmamba_mm')

#: Passes of a kind in a row before it is recorded.
PASSES_BEFORE = 8
#: Recordings thrown away before no more are made: images of many sizes gain nothing.
MOST_RECORDINGS = 4


class InferenceReplay:
    """The recorded pass of a backbone. Copies of the backbone begin without one."""

    def __init__(self) -> None:
        self._kind: tuple | None = None
        self._passes = 0
        self._recordings = 0
        self._replay = None
        self._modules: tuple[nn.Module, ...] = ()
        self._seen: tuple | None = None

    def __deepcopy__(self, memo: dict) -> 'InferenceReplay':
        return InferenceReplay()

    def __reduce__(self) -> tuple:
        return InferenceReplay, ()

    def __call__(self, backbone: nn.Module, image: Tensor) -> tuple[Tensor, ...] | None:
        """The backbone's outputs by replaying, in new memory; None if they have to be computed.

        Args:
            backbone: In eval mode.
            image: (B, C, H, W) on a GPU.
        """
        autocast = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None
        kind = (image.shape, image.dtype, image.device, autocast)
        if kind != self._kind:
            self._kind, self._passes, self._replay = kind, 0, None
        self._passes += 1
        if self._replay is not None and self._look(backbone) != self._seen:
            self._passes, self._replay = 1, None
        if self._replay is None:
            if self._passes <= PASSES_BEFORE or self._recordings >= MOST_RECORDINGS:
                return None
            self._modules = tuple(backbone.modules())
            self._seen = self._look(backbone)
            if not _can_be_recorded(self._modules, image):
                self._passes = 0
                return None
            self._recordings += 1
            self._replay = _record(backbone, image, autocast)
            if self._replay is None:
                self._recordings = MOST_RECORDINGS
                return None
        with torch.inference_mode(False), torch.no_grad():
            outputs = self._replay(image)
        return tuple(output.clone() for output in outputs)

    def _look(self, backbone: nn.Module) -> tuple:
        """All that a graph does not see change."""
        tensors, children, modes = [], [], []
        for module in self._modules:
            tensors += [t.data_ptr() for t in module._parameters.values() if t is not None]
            tensors += [t.data_ptr() for t in module._buffers.values() if t is not None]
            children += map(id, module._modules.values())
            modes.append((module.training, is_watched(module)))
        return (
            tensors,
            children,
            modes,
            backbone.residual_in_fp32,
            [m.scan_backend for m in self._modules if isinstance(m, GroupedSSM)],
        )


def _can_be_recorded(modules: tuple[nn.Module, ...], image: Tensor) -> bool:
    """Whether all is launched by kernels that take graphs, and nobody watches a part."""
    return not any(map(is_watched, modules[1:])) and all(
        module.resolve_backend(image) == 'triton'
        for module in modules
        if isinstance(module, GroupedSSM)
    )


def _record(
    backbone: nn.Module, image: Tensor, autocast: torch.dtype | None
) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
    """The replay of a pass, as :func:`groupmamba_mm.cuda_graph.captured` returns it.

    None, with a warning, if this GPU or driver does not record it, or does not give with it what
    launches give.
    """

    def forward(image: Tensor) -> tuple[Tensor, ...]:
        return type(backbone).forward(backbone, image)

    # without autocast's cache, whose casts of weights would be of before the graph
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast('cuda', autocast, enabled=autocast is not None, cache_enabled=False),
    ):
        image = image.clone()  # one that may be written to in any mode
        expected = forward(image)
        try:
            replay = captured(forward, torch.zeros_like(image))
            outputs = replay(image)
        except RuntimeError as error:
            problem = str(error).strip().splitlines()[0]
        else:
            if all(
                torch.allclose(got, wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item())
                for got, wanted in zip(outputs, expected)
            ):
                return replay
            problem = 'its results differ from those of launches'
    logger.warning(
        f'inference stays with launches from Python, as it cannot be replayed: {problem}'
    )
    return None
