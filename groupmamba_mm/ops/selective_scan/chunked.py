"""The selective scan in plain PyTorch, vectorised over chunks: any device, the fast CPU path."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .directions import group_from_scan_order, group_to_scan_order
from .recurrence import recorded_recurrence, recurrence, recurrence_backward


class _SelectiveScan(torch.autograd.Function):
    """The scan of tokens that are in scan order already, with a backward of its own.

    Shapes: x, dt (B, L, G, d); A (G, d, N); B, C (B, L, G, N). Autograd through the same steps
    would keep three more tensors of the size of the state and pass over memory twice as often.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        decay = (dt[..., None] * A).exp_()
        state = recurrence(decay, (dt * x)[..., None] * B[..., None, :])
        ctx.save_for_backward(x, dt, A, B, C, decay, state)
        return _sum_states(state, C)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor, ...]:
        x, dt, A, B, C, decay, state = ctx.saved_tensors
        grad_C = torch.einsum('blgd,blgdn->blgn', grad_y, state)
        grad_log_decay, grad_update = recurrence_backward(
            decay, state, grad_y[..., None] * C[..., None, :]
        )
        grad_log_decay *= decay
        grad_A = torch.einsum('blgdn,blgd->gdn', grad_log_decay, dt)
        grad_B = torch.einsum('blgdn,blgd->blgn', grad_update, dt * x)
        grad_input = _sum_states(grad_update, B)  # of dt * x
        grad_dt = grad_log_decay.mul_(A).sum(-1).addcmul_(grad_input, x)
        return grad_input.mul_(dt), grad_dt, grad_A, grad_B, grad_C


def _sum_states(state: Tensor, weight: Tensor) -> Tensor:
    """Sum over n of state[..., d, n] * weight[..., n]: (B, L, G, d, N) to (B, L, G, d)."""
    if weight.shape[-1] == 1:
        return state.squeeze(-1) * weight
    return (state * weight[..., None, :]).sum(-1)


def needs_plain_operators(device: torch.device) -> bool:
    """Whether an exporter, a tracer or a transform of torch.func looks at each operator.

    torch.compile does too, which answers that it exports. For a CPU it takes the recurrence whole:
    Inductor's C++ of the plain operators takes minutes to compile.
    """
    if torch.compiler.is_dynamo_compiling():
        return device.type != 'cpu'
    return (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    )  # no public name; autograd asks it too


def _recorded_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    grid: tuple[int, int],
    directions: Sequence[str],
) -> Tensor:
    """:class:`_SelectiveScan` for row-major tokens in few operators that every runtime has."""
    sizes = [t.shape[-1] for t in (x, dt, B, C)]
    x, dt, B, C = group_to_scan_order(torch.cat((x, dt, B, C), dim=-1), grid, directions).split(
        sizes, dim=-1
    )
    state = recorded_recurrence(dt[..., None] * A, (dt * x)[..., None] * B[..., None, :])
    return _sum_states(state, C)


def selective_scan_torch(
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
    if needs_plain_operators(x.device):
        y = _recorded_scan(x, dt, A, B, C, grid, directions)
    else:
        x_seq, dt_seq, B_seq, C_seq = (
            group_to_scan_order(t, grid, directions) for t in (x, dt, B, C)
        )
        y = _SelectiveScan.apply(x_seq, dt_seq, A, B_seq, C_seq)
    y = group_from_scan_order(y, grid, directions)
    return y if D is None else torch.addcmul(y, x, D)
