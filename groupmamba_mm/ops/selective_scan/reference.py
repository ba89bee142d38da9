"""The selective scan as Eq. 1-2 read, one token after the other: slow, obvious, the truth."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .directions import group_from_scan_order, group_to_scan_order


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    grid: tuple[int, int],
    directions: Sequence[str],
) -> Tensor:
    """See :func:`groupmamba_mm.ops.selective_scan` for the arguments; all of them in one dtype.

    Shapes here: x, dt (B, L, G, d); A (G, d, N); B, C (B, L, G, N); D (G, d) or None.
    """
    x, dt, B, C = (group_to_scan_order(t, grid, directions) for t in (x, dt, B, C))
    state = x.new_zeros(x.shape[0], *A.shape)  # (B, G, d, N)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, :, None] * A)
        state = decay * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D * x
    return group_from_scan_order(y, grid, directions)
