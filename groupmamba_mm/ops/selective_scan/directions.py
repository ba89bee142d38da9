"""The order in which a group's scan visits the tokens of the grid, and the place to add one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: The directions of Eq. 6. 'left-right' reads the grid row by row from the top-left corner,
#: 'top-bottom' column by column; the other two read the same sequences from the end.
DIRECTIONS = ('left-right', 'right-left', 'top-bottom', 'bottom-top')
#: The same on the grid mirrored left to right: the readings that start in the two other corners.
MIRRORED_DIRECTIONS = tuple(f'{name}-mirrored' for name in DIRECTIONS)


class Direction(NamedTuple):
    """A reading of the grid that the kernels know.

    Attributes:
        column_major: Whether column by column.
        reverse: Whether from the end.
        mirrored: Whether on the grid mirrored left to right.
    """

    column_major: bool
    reverse: bool
    mirrored: bool


#: Bits of a group's direction in the number that the kernels take.
BITS = len(Direction._fields)

_registry: dict[str, Direction | Callable[[int, int], Tensor]] = {
    name: Direction(index % 4 >= 2, index % 2 == 1, index >= 4)
    for index, name in enumerate((*DIRECTIONS, *MIRRORED_DIRECTIONS))
}


def register_direction(name: str, order: Callable[[int, int], Tensor]) -> None:
    """Add a direction.

    The kernels do not know it: tokens are brought into its order in PyTorch, scanned straight
    ahead, and brought back, which takes longer.

    Args:
        name: What ``directions`` of a model calls it.
        order: Takes (H, W), and returns the positions of all L = H * W tokens in row-major order,
            (L,) whole numbers, in the order of the scan.

    Raises:
        ValueError: The name is taken, or the order is no permutation of the tokens.
    """
    if name in _registry:
        raise ValueError(f'the scan direction {name!r} is there already; choose another name')
    for height, width in ((1, 1), (1, 3), (2, 3), (5, 4)):
        positions = order(height, width)
        if sorted(positions.tolist()) != list(range(height * width)):
            raise ValueError(
                f'the scan direction {name!r} does not visit each of the {height * width} tokens '
                f'of a {height} x {width} grid once: {positions.tolist()}'
            )
    _registry[name] = order


def check_directions(directions: Sequence[str]) -> tuple[str, ...]:
    """Validate direction names.

    Args:
        directions: Names of registered directions, at least one.

    Returns:
        The names as a tuple.

    Raises:
        ValueError: For an empty sequence or an unknown name.
    """
    if isinstance(directions, str) or len(directions) == 0:
        raise ValueError(
            f'directions must be a non-empty sequence of names out of {tuple(_registry)}, '
            f'got {directions!r}'
        )
    for name in directions:
        if name not in _registry:
            raise ValueError(
                f'unknown scan direction {name!r}; choose from {tuple(_registry)}, or add it with '
                'register_direction'
            )
    return tuple(directions)


def kernels_know(directions: Sequence[str]) -> bool:
    """Whether the kernels have all of these directions."""
    return all(isinstance(_registry[name], Direction) for name in directions)


def direction_code(directions: Sequence[str]) -> int:
    """What the kernels take: three bits for each group, as in :class:`Direction`.

    Raises:
        ValueError: The kernels do not know one of the directions.
    """
    code = 0
    for g, name in enumerate(directions):
        direction = _registry[name]
        if not isinstance(direction, Direction):
            raise ValueError(
                f'the kernels do not know the scan direction {name!r}; bring the tokens into its '
                "order with group_to_scan_order, or use the backend 'torch'"
            )
        code |= sum(bit << i for i, bit in enumerate(direction)) << (BITS * g)
    return code


def to_scan_order(tokens: Tensor, grid: tuple[int, int], direction: str) -> Tensor:
    """Bring row-major tokens into the order in which a direction visits them.

    Args:
        tokens: (B, L, ...) with L = H * W, row-major.
        grid: (H, W).
        direction: Name of a registered direction.

    Returns:
        (B, L, ...); the input itself for 'left-right'.
    """
    found = _registry[direction]
    if not isinstance(found, Direction):
        return tokens.index_select(1, found(*grid).to(tokens.device))
    if found.mirrored or found.column_major:
        rows = tokens.unflatten(1, grid)
        rows = rows.flip(2) if found.mirrored else rows
        tokens = (rows.transpose(1, 2) if found.column_major else rows).flatten(1, 2)
    return tokens.flip(1) if found.reverse else tokens


def from_scan_order(tokens: Tensor, grid: tuple[int, int], direction: str) -> Tensor:
    """The inverse of :func:`to_scan_order`: (B, L, ...) in scan order to row-major."""
    found = _registry[direction]
    if not isinstance(found, Direction):
        return tokens.index_select(1, found(*grid).to(tokens.device).argsort())
    if found.reverse:
        tokens = tokens.flip(1)
    if found.column_major:
        tokens = tokens.unflatten(1, (grid[1], grid[0])).transpose(1, 2).flatten(1, 2)
    return tokens.unflatten(1, grid).flip(2).flatten(1, 2) if found.mirrored else tokens


def group_to_scan_order(tokens: Tensor, grid: tuple[int, int], directions: Sequence[str]) -> Tensor:
    """Bring each group of channels into the order of its own direction.

    Args:
        tokens: (B, L, G, D) row-major.
        grid: (H, W) with H * W = L.
        directions: One name for each of the G groups.

    Returns:
        (B, L, G, D), group g in the order of ``directions[g]``.
    """
    if all(name == 'left-right' for name in directions):
        return tokens
    return torch.stack(
        [to_scan_order(group, grid, name) for group, name in zip(tokens.unbind(2), directions)],
        dim=2,
    )


def group_from_scan_order(
    tokens: Tensor, grid: tuple[int, int], directions: Sequence[str]
) -> Tensor:
    """The inverse of :func:`group_to_scan_order`, (B, L, G, D) to row-major (B, L, G, D)."""
    if all(name == 'left-right' for name in directions):
        return tokens
    return torch.stack(
        [from_scan_order(group, grid, name) for group, name in zip(tokens.unbind(2), directions)],
        dim=2,
    )
