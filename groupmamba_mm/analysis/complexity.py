"""Parameters and multiply-adds of a model, counted in one forward pass."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

#: What :func:`count_complexity` counts, for the tools to print beside their figures.
CONVENTION = (
    'MACs: one for each multiply-add of convolutions, linear layers and matrix products, '
    'plus 9*B*L*C*N + B*L*C for each selective scan; norms, activations and other '
    'element-wise work are not counted'
)

PRODUCTS = 'convolutions, linears, matmuls'
SCAN = 'scan'


@dataclass(frozen=True)
class Complexity:
    """What a model costs.

    Attributes:
        params: Number of parameter elements, shared ones once; buffers do not count.
        macs: Multiply-adds of one forward pass of the whole batch.
        macs_by_kind: The same divided into :data:`PRODUCTS` and :data:`SCAN`.
    """

    params: int
    macs: int
    macs_by_kind: dict[str, int]


def count_complexity(
    model: nn.Module,
    image_size: int | tuple[int, int],
    batch: int = 1,
    in_channels: int = 3,
    run: Callable[[nn.Module, torch.Tensor], Any] | None = None,
) -> Complexity:
    """Count the parameters and multiply-adds of a model that takes one batch of images.

    The products are counted where PyTorch executes them. Scans, which PyTorch does not know, are
    reported by their modules: ``count_macs`` with the arguments of ``forward``. The model runs
    once for that, in eval mode, on its own device.

    Args:
        model: A backbone, or any model whose ``forward`` takes the images alone, such as an
            mmpretrain ``ImageClassifier`` (whose head is counted with it) or an mmseg
            ``EncoderDecoder`` (backbone and decode head).
        image_size: Side of a square image, or (H, W).
        batch: Number of images.
        in_channels: Channels of the images.
        run: Called with the model and the images, for a model whose ``forward`` takes more than
            images. None: ``model(images)``.

    Returns:
        The counts.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    device = next(model.parameters()).device
    image = torch.zeros(batch, in_channels, height, width, device=device)
    # PyTorch's counter does not know the fused attention of the CPU, only the products in it
    with (
        _eval_mode(model),
        _scan_macs(model) as scans,
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(image) if run is None else run(model, image)
    macs = {PRODUCTS: counter.get_total_flops() // 2, SCAN: sum(scans)}
    params = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(params=params, macs=sum(macs.values()), macs_by_kind=macs)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and afterwards each module back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _scan_macs(model: nn.Module) -> Iterator[list[int]]:
    """Collect what the modules with a ``count_macs`` report, call by call."""
    macs = []

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        macs.append(module.count_macs(*args, **kwargs))

    hooks = [
        module.register_forward_hook(add, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, 'count_macs')
    ]
    try:
        yield macs
    finally:
        for hook in hooks:
            hook.remove()
