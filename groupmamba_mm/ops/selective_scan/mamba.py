"""The selective scan by mamba-ssm's CUDA kernel, all groups in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .directions import group_from_scan_order, group_to_scan_order


@torch.compiler.disable  # the library's extension is no operator that a compiler sees through
def selective_scan_mamba(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    grid: tuple[int, int],
    directions: Sequence[str],
) -> Tensor:
    """See :func:`groupmamba_mm.ops.selective_scan` for the arguments; all of them in fp32.

    Shapes here: x, dt (B, L, G, d); A (G, d, N); B, C (B, L, G, N); D (G, d) or None.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x_seq, dt_seq, B_seq, C_seq = (group_to_scan_order(t, grid, directions) for t in (x, dt, B, C))
    y = selective_scan_fn(
        _tokens_last(x_seq).flatten(1, 2),  # (B, G, d, L) -> (B, C, L)
        _tokens_last(dt_seq).flatten(1, 2),
        A.flatten(0, 1),
        _tokens_last(B_seq),
        _tokens_last(C_seq),
        None if D is None else D.flatten(),
        delta_softplus=False,
    )
    y = y.unflatten(1, A.shape[:2]).permute(0, 3, 1, 2)  # (B, C, L) -> (B, L, G, d)
    return group_from_scan_order(y, grid, directions)


def _tokens_last(tokens: Tensor) -> Tensor:
    return tokens.permute(0, 2, 3, 1).contiguous()  # (B, L, G, d) -> (B, G, d, L)
