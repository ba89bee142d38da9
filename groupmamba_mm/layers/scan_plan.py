"""Which group is scanned in which direction."""

from collections.abc import Sequence

from groupmamba_mm.ops.selective_scan import check_directions

#: One entry for each scan, whose outputs are summed; an entry names a direction for each group.
ScanPlan = tuple[tuple[str, ...], ...]


def make_scan_plan(
    num_groups: int,
    directions: Sequence[str] | None,
    share_directions: bool,
    default: Sequence[str],
) -> ScanPlan:
    """Assign directions to groups.

    Args:
        num_groups: Number of groups G.
        directions: Direction names, or None for the first G of ``default``. Each group has one
            direction: group g takes ``directions[g % len(directions)]``.
        share_directions: Scan every group in all of the directions with the same parameters and
            sum the outputs, instead of one direction a group.
        default: The family's own order of the four directions (all of them if shared).

    Returns:
        The plan: one scan with a direction for each group, or with ``share_directions`` one scan
        for each direction.

    Raises:
        ValueError: Unknown direction, or a number of directions that does not divide the groups.
    """
    if num_groups < 1:
        raise ValueError(f'num_groups must be at least 1, got {num_groups}')
    if directions is None:
        directions = default if share_directions else default[:num_groups]
    directions = check_directions(directions)
    if share_directions:
        return tuple((name,) * num_groups for name in directions)
    if num_groups % len(directions):
        raise ValueError(
            f'{len(directions)} directions cannot be shared out evenly among {num_groups} groups; '
            'give a number of directions that divides num_groups, or set share_directions=True '
            'to scan every group in all of them'
        )
    return (directions * (num_groups // len(directions)),)
