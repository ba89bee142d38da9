"""The public selective scan: validation, then the backend."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from groupmamba_mm.ops.backend import check_backend, resolve_backend

from .chunked import selective_scan_torch
from .directions import check_directions
from .mamba import selective_scan_mamba
from .reference import selective_scan_reference

#: What each backend name runs. A backend takes the tensors of :func:`selective_scan` with the
#: groups unfolded (x, dt: (B, L, G, d)), all in the dtype of the state.
BACKENDS: dict[str, Callable[..., Tensor]] = {
    'torch': selective_scan_torch,
    'reference': selective_scan_reference,
    'mamba_ssm': selective_scan_mamba,
}


def _resolve(backend: str, x: Tensor, d_state: int) -> str:
    """The name in :data:`BACKENDS` that runs for ``backend``."""
    if check_backend(backend) == 'auto':
        return 'torch'
    if backend == 'triton':
        raise ValueError(
            "selective_scan has no backend 'triton': the Triton kernels compute projections, scan "
            "and norm in one and live one level up, in groupmamba_mm.ops.grouped_ssm; use 'torch' "
            "or 'mamba_ssm' for the scan alone"
        )
    if backend == 'mamba_ssm':  # the others run everywhere
        resolve_backend(backend, x.device, x.dtype, d_state)
    return backend


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], layout: str, device: torch.device
) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f'selective_scan: {name} must be a floating-point tensor, got {kind}')
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f'selective_scan: {name} must have shape {layout} = {shape}, got {tuple(tensor.shape)}'
        )
    if tensor.device != device:
        raise ValueError(
            f'selective_scan: {name} is on {tensor.device} but x is on {device}; '
            'move all arguments to one device'
        )


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    grid: tuple[int, int],
    directions: Sequence[str],
    backend: str = 'auto',
) -> Tensor:
    r"""Grouped directional selective scan over channels-last tokens (S6, Eq. 1-2 and 6).

    The C channels form G = len(directions) groups of d = C / G; group g visits the tokens of the
    H x W grid in the order of ``directions[g]``. Per channel, with t counting along that order and
    n along the state,

    .. math::
        h_{t,n} = e^{dt_t A_n} h_{t-1,n} + dt_t B_{t,n} x_t, \qquad
        y_t = \textstyle\sum_n C_{t,n} h_{t,n} + D x_t.

    (Mamba's first-order form of Eq. 2's B.) The state is kept in fp32 at least: fp16 and bf16
    inputs are computed in fp32, fp64 inputs in fp64.

    Args:
        x: Inputs, (B, L, C), L = H * W tokens in row-major order.
        dt: Step sizes after softplus, (B, L, C).
        A: Continuous-time decay, negative, (C, N) with N = ``d_state``.
        B: Input projection, (B, L, G, N).
        C: Output projection, (B, L, G, N).
        D: Skip weights, (C,), or None for no skip.
        grid: (H, W).
        directions: One of ``'left-right'``, ``'right-left'``, ``'top-bottom'``, ``'bottom-top'``
            for each group.
        backend: ``'torch'`` (chunked, differentiable once), ``'reference'`` (a loop over the
            tokens), ``'mamba_ssm'`` (the CUDA kernel of the original Mamba, if installed;
            differentiable once, its gradients not bitwise repeatable) or ``'auto'``, which is
            ``'torch'`` here: the environment variable and the Triton kernels are the layers'.

    Returns:
        y, (B, L, C), row-major, in the dtype of ``x``.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: Shapes, devices, directions or the backend do not fit; the message names which.
        BackendError: ``'mamba_ssm'`` cannot run; the message has the remedy.
    """
    directions = check_directions(directions)
    check_backend(backend)
    groups = len(directions)
    if not isinstance(x, Tensor) or x.dim() != 3:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f'selective_scan: x must be a tensor of shape (B, L, C), got {shape}')
    batch, length, channels = x.shape
    height, width = grid
    if height < 1 or width < 1 or height * width != length:
        raise ValueError(
            f'selective_scan: grid {tuple(grid)} has {height * width} tokens but x has L = {length}'
        )
    if channels == 0 or channels % groups:
        raise ValueError(
            f'selective_scan: {channels} channels cannot be divided into '
            f'{groups} groups (one for each direction)'
        )
    if not isinstance(A, Tensor) or A.dim() != 2 or A.shape[-1] < 1:
        shape = tuple(A.shape) if isinstance(A, Tensor) else type(A).__name__
        raise ValueError(f'selective_scan: A must be a tensor of shape (C, N), got {shape}')
    d_state = A.shape[1]
    for name, tensor, shape, layout in (
        ('x', x, (batch, length, channels), '(B, L, C)'),
        ('dt', dt, (batch, length, channels), '(B, L, C)'),
        ('A', A, (channels, d_state), '(C, N)'),
        ('B', B, (batch, length, groups, d_state), '(B, L, G, N)'),
        ('C', C, (batch, length, groups, d_state), '(B, L, G, N)'),
    ):
        _check_tensor(name, tensor, shape, layout, x.device)
    if D is not None:
        _check_tensor('D', D, (channels,), '(C,)', x.device)

    run = BACKENDS[_resolve(backend, x, d_state)]
    dtype = torch.promote_types(x.dtype, torch.float32)
    unfold = (groups, channels // groups)
    kind = x.device.type
    has_autocast = kind != 'meta'  # which has none
    with torch.autocast(kind, enabled=False) if has_autocast else nullcontext():
        y = run(
            x.to(dtype).unflatten(-1, unfold),
            dt.to(dtype).unflatten(-1, unfold),
            A.to(dtype).unflatten(0, unfold),
            B.to(dtype),
            C.to(dtype),
            None if D is None else D.to(dtype).unflatten(0, unfold),
            (height, width),
            directions,
        )
    return y.flatten(2).to(x.dtype)
