"""Which kernels a backbone will launch, compiled before it does."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groupmamba_mm.layers import GroupedSSM
from groupmamba_mm.ops import resolve_backend

logger = logging.getLogger('groupmamba_mm')

#: Sizes of images (H, W) whose launches include those of all sizes a dense task may bring: sides
#: that are multiples of 224 and others, long and short sequences.
DENSE_SIZES = ((224, 224), (800, 1344), (800, 1216), (320, 608), (1344, 800))


def prepare_kernels(backbone: nn.Module, image: Tensor) -> None:
    """Compile, side by side, what a backbone launches for such images; once for each kind of pass.

    A training pass brings the validation's kernels along.

    Nothing is done where the Triton kernels do not run, and in seconds what this machine's cache of
    Triton has already.

    Args:
        backbone: A ``GroupMamba``.
        image: (B, C, H, W) on a GPU.
    """
    kind = _kind_of_pass(backbone, image)
    if kind in backbone._prepared:
        return
    is_covered = any(_covers(backbone, one, kind) for one in backbone._prepared)
    backbone._prepared.add(kind)
    if is_covered:
        return
    if torch.cuda.is_current_stream_capturing() or not _runs_kernels(backbone):
        return
    major, minor = torch.cuda.get_device_capability(image.device)
    kinds = kinds_to_compile(backbone, kind)
    backbone._prepared.update(kinds)
    try:
        compile_backbone(backbone, tuple(image.shape[2:]), kinds, 10 * major + minor)
    except (OSError, RuntimeError) as error:  # such as a cache that cannot be written
        logger.warning(
            f'kernels are not compiled ahead, but one by one as they are met: {error} '
            '(TRITON_CACHE_DIR names the folder where they are kept)'
        )
    # the check at first use finds its kernels in the cache, too
    ssm = next(module for module in backbone.modules() if isinstance(module, GroupedSSM))
    resolve_backend(ssm.scan_backend, image.device)


def _covers(backbone: nn.Module, one: 'Pass', other: 'Pass') -> bool:
    """Whether what one kind of pass has compiled is all that another launches: a classifier's with
    many images brings the kernels of fewer along, see :func:`kinds_to_compile`.
    """
    is_dense = backbone.out_indices is not None
    fits = one.batch == other.batch if is_dense else one.batch >= other.batch
    return fits and one._replace(batch=other.batch) == other


def _runs_kernels(backbone: nn.Module) -> bool:
    """Whether the kernels may be what is chosen, and are compiled; why not is the business of
    ``ops/backend.py``.
    """
    import os

    from groupmamba_mm.ops.backend import (
        TRITON_MIN_CAPABILITY,
        VARIABLE,
        import_problem,
        is_interpreted,
    )

    names = {m.scan_backend for m in backbone.modules() if isinstance(m, GroupedSSM)}
    names = {os.environ.get(VARIABLE) or 'auto' if name == 'auto' else name for name in names}
    return (
        bool(names & {'auto', 'triton'})
        and not is_interpreted()
        and import_problem('triton') is None
        and torch.cuda.get_device_capability() >= TRITON_MIN_CAPABILITY
    )


def compile_backbone(
    backbone: nn.Module,
    size: tuple[int, int],
    kinds: Sequence['Pass'],
    capability: int,
    workers: int | None = None,
) -> int:
    """Compile what a backbone launches, unless this machine's cache of Triton has it.

    Args:
        backbone: A ``GroupMamba``, on any device.
        size: Of a classifier's images, (H, W); those of dense tasks have any.
        kinds: Of passes.
        capability: Of the GPU: 90 is 9.0.
        workers: Processes; None: one for each core.

    Returns:
        How many kernels there are; 0 if all was done before.
    """
    from groupmamba_mm.ops.precompile import compile_once

    sizes = [size] if backbone.out_indices is None else DENSE_SIZES
    return compile_once(
        (repr(backbone), kinds, sizes),
        lambda: note_backbone(backbone, sizes, kinds, capability),
        capability,
        workers,
    )


def kinds_to_compile(backbone: nn.Module, kind: 'Pass') -> list['Pass']:
    """A kind of passes, and those that will come with it.

    With a classifier's come those of a single image, as an epoch's last batch may bring few images,
    whose scans take other kernels. With a training's comes its validation: of a dense task image by
    image.
    """
    single, is_dense = kind._replace(batch=1), backbone.out_indices is not None
    kinds = [kind] if is_dense else [kind, single]
    if not kind.training:
        return kinds
    validated = [single] if is_dense else kinds
    return [*kinds, *(one._replace(training=False, wants_gradient=False) for one in validated)]


class Pass(NamedTuple):
    """A kind of forward pass, perhaps with the backward pass after it.

    Attributes:
        batch: Number of images.
        dtype: Of the images.
        autocast: Its dtype, or None.
        training: Whether the model is in training mode.
        wants_gradient: Whether there is a backward pass.
    """

    batch: int
    dtype: torch.dtype
    autocast: torch.dtype | None
    training: bool
    wants_gradient: bool


def _kind_of_pass(backbone: nn.Module, image: Tensor) -> Pass:
    wants_gradient = torch.is_grad_enabled() and any(p.requires_grad for p in backbone.parameters())
    autocast = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None
    return Pass(image.shape[0], image.dtype, autocast, backbone.training, wants_gradient)


def note_backbone(
    backbone: nn.Module, sizes: Sequence[tuple[int, int]], kinds: Sequence[Pass], capability: int
) -> list:
    """What the backbone and the kernels' check launch, as
    :func:`groupmamba_mm.ops.precompile.note_launches`.

    Args:
        backbone: A ``GroupMamba``, on any device.
        sizes: Of images, (H, W).
        kinds: Of passes.
        capability: Of the GPU: 90 is 9.0.
    """
    from groupmamba_mm.ops.precompile import note_launches
    from groupmamba_mm.ops.self_test import CASES

    stages, was_training = backbone.stages, backbone.training

    def run() -> None:
        device = torch.device('cpu')
        tensors = {
            f'backbone.{name}': torch.empty(
                t.shape, dtype=t.dtype, device=device, requires_grad=t.requires_grad
            )
            for name, t in [*backbone.named_parameters(), *backbone.named_buffers()]
        }
        for kind in kinds:
            backbone.train(kind.training)
            for size in sizes:
                image = torch.empty(
                    kind.batch, backbone.in_channels, *size, dtype=kind.dtype, device=device
                )
                with (
                    torch.set_grad_enabled(kind.wants_gradient),
                    torch.autocast('cpu', kind.autocast, enabled=kind.autocast is not None),
                ):
                    outputs = torch.func.functional_call(_Forward(backbone), tensors, (image,))
                if kind.wants_gradient:
                    sum(y.float().sum() for y in outputs).backward()
        with torch.enable_grad(), torch.autocast('cpu', enabled=False):
            for case in CASES:
                list(case(device))

    try:
        # the first block of a model has no branch before it, the second no stochastic depth in it
        backbone.stages = nn.ModuleList(nn.ModuleList(stage[:3]) for stage in stages)
        return note_launches(run, capability)
    finally:
        backbone.stages = stages
        backbone.train(was_training)


class _Forward(nn.Module):
    """A backbone's plain forward, neither compiled nor prepared once more."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor):
        return type(self.backbone).forward(self.backbone, image)
