"""The four scanning directions of Eq. 6 as views of a channels-last grid."""

from collections.abc import Sequence

import torch
from torch import Tensor

#: The closed set of directions. 'left-right' reads the grid row by row, 'top-bottom' column by
#: column; the other two read the same sequences from the end (bottom-right corner first).
DIRECTIONS = ('left-right', 'right-left', 'top-bottom', 'bottom-top')

#: Those that read column by column, and those that read from the end.
COLUMN_MAJOR = ('top-bottom', 'bottom-top')
REVERSED = ('right-left', 'bottom-top')


def direction_bits(directions: Sequence[str]) -> tuple[int, int]:
    """What kernels take: bit g says of group g whether it runs by columns, and from the end."""
    return tuple(
        sum(1 << g for g, name in enumerate(directions) if name in names)
        for names in (COLUMN_MAJOR, REVERSED)
    )


def check_directions(directions: Sequence[str]) -> tuple[str, ...]:
    """Validate direction names.

    Args:
        directions: Names out of :data:`DIRECTIONS`, at least one.

    Returns:
        The names as a tuple.

    Raises:
        ValueError: For an empty sequence or an unknown name.
    """
    if isinstance(directions, str) or len(directions) == 0:
        raise ValueError(
            f'directions must be a non-empty sequence of names out of {DIRECTIONS}, '
            f'got {directions!r}'
        )
    for name in directions:
        if name not in DIRECTIONS:
            raise ValueError(f'unknown scan direction {name!r}; choose from {DIRECTIONS}')
    return tuple(directions)


def to_scan_order(tokens: Tensor, grid: tuple[int, int], direction: str) -> Tensor:
    """Bring row-major tokens into the order in which a direction visits them.

    Args:
        tokens: (B, L, ...) with L = H * W, row-major.
        grid: (H, W).
        direction: A name out of :data:`DIRECTIONS`.

    Returns:
        (B, L, ...); the input itself for 'left-right'.
    """
    if direction in COLUMN_MAJOR:
        tokens = tokens.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    return tokens.flip(1) if direction in REVERSED else tokens


def from_scan_order(tokens: Tensor, grid: tuple[int, int], direction: str) -> Tensor:
    """The inverse of :func:`to_scan_order`: (B, L, ...) in scan order to row-major."""
    if direction in REVERSED:
        tokens = tokens.flip(1)
    if direction in COLUMN_MAJOR:
        tokens = tokens.unflatten(1, (grid[1], grid[0])).transpose(1, 2).flatten(1, 2)
    return tokens


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
