"""Blocks of both families by the kernels of :mod:`groupmamba_mm.ops.blocks`.

The submodules of a block are not called there, only their parameters are read. A block with a
submodule that somebody hooked, replaced or patched therefore runs module by module instead, and
says so once.
"""

import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from groupmamba_mm.ops.blocks import run_block

logger = logging.getLogger('groupmamba_mm')
_reported = set()


class Residual(NamedTuple):
    """A block's output before its last residual connection, which the next norm can make itself.

    Attributes:
        tokens: (B, L, C), the stream.
        branch: (B, L, >=C), what is to be added to its first C channels.
        drop_scale: (B,), stochastic depth's factor of the branch, or None.
    """

    tokens: Tensor
    branch: Tensor
    drop_scale: Tensor | None

    def materialize(self) -> Tensor:
        """The sum, in the precision of the stream."""
        branch = self.branch[..., : self.tokens.shape[-1]]
        if self.drop_scale is None:
            return self.tokens + branch
        scale = self.drop_scale.view(-1, 1, 1).to(self.tokens.dtype)
        return torch.addcmul(self.tokens, branch.to(self.tokens.dtype), scale)


def is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks, or a forward that was patched."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or 'forward' in module.__dict__
    )


def find_parts(
    block: nn.Module, kinds: dict[str, tuple[type[nn.Module], ...]]
) -> dict[str, nn.Module] | None:
    """The submodules of a block that the kernels can replace.

    Args:
        block: The block.
        kinds: The types that the submodule of each name may have, parents before children.

    Returns:
        The submodules by name; None if one is hooked, patched or of another type; a warning
        names it.
    """
    if torch_module._has_any_global_hook():
        return report_plain('there are hooks on all modules')
    parts = {'': block}
    for name, types in kinds.items():
        parent, child = _split_name(name)
        part = parts[parent]._modules[child]
        parts[name] = part
        if type(part) not in types:
            return report_plain(f'{name} of a block is a {type(part).__name__}')
        if is_watched(part):
            return report_plain(f'{name} of a block has a hook, or a forward of its own')
    return parts


def find_parameters(
    parts: dict[str, nn.Module], names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> list[Tensor] | None:
    """Parameters by their names in the block; None, with a warning, if one is not as expected."""
    found = []
    for name, shape in zip(names, shapes):
        part, own_name = _split_name(name)
        parameter = parts[part]._parameters[own_name]
        if (
            parameter is None
            or parameter.shape != shape
            or (found and parameter.dtype != found[0].dtype)
        ):
            is_like = (
                'missing' if parameter is None else f'{tuple(parameter.shape)} in {parameter.dtype}'
            )
            return report_plain(
                f'{name} of a block is {is_like}, where {tuple(shape)} in one dtype for '
                'all parameters is wanted'
            )
        found.append(parameter)
    return found


@functools.cache
def _split_name(name: str) -> tuple[str, str]:
    parent, _, child = name.rpartition('.')
    return parent, child


def report_plain(problem: str) -> None:
    """Warn once that a block runs module by module, and why; returns None."""
    if problem not in _reported:
        _reported.add(problem)
        logger.warning(
            'a block runs module by module instead of in kernels, which takes several '
            f'times as long: {problem}'
        )


def draw_drop_path(drop_path: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Stochastic depth's factors of a block's two branches, each (B,): 0 or 1 / (1 - p).

    None without it. The branches are dropped independently of each other.
    """
    if not drop_path.training or drop_path.p == 0:
        return None, None
    keep = 1 - drop_path.p
    scale = torch.empty(2, x.shape[0], device=x.device).bernoulli_(keep).div_(keep)
    return scale[0], scale[1]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision of products: autocast's, or that of the input."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def run(
    family: str,
    spec: NamedTuple,
    grid: tuple[int, int],
    x: Tensor | Residual,
    drops: tuple[Tensor | None, Tensor | None],
    parameters: list[Tensor],
) -> Residual:
    """:func:`groupmamba_mm.ops.blocks.run_block` with what one block passes to the next."""
    tokens, branch, branch_drop = x if isinstance(x, Residual) else (x, None, None)
    stream, branch = run_block(
        family, spec, grid, compute_dtype(tokens), tokens, branch, branch_drop, drops[0], parameters
    )
    return Residual(stream, branch, drops[1])
