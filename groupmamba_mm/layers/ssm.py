"""The selective state-space model of all groups: projections, discretisation, scan."""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupmamba_mm.ops import check_backend, grouped_ssm, resolve_backend, selective_scan
from groupmamba_mm.ops.selective_scan import group_from_scan_order, group_to_scan_order
from groupmamba_mm.ops.selective_scan.directions import kernels_know

from .fused import report_plain
from .grouped import grouped_linear
from .scan_plan import ScanPlan


class GroupedSSM(nn.Module):
    """S6 (Eq. 1-2) with its input-dependent dt, B and C, for G groups of d channels.

    Args:
        channels: Number of channels C = G * d of all groups together.
        num_groups: Number of groups G.
        dt_rank: Rank of the projection to dt.
        d_state: State size N of each channel.
        scan_backend: See :func:`groupmamba_mm.ops.backend.choose_backend`.
        has_norm: Whether a LayerNorm over each group follows, which the fused scan takes in.

    Parameters, in the shapes in which they are decayed or not (two or more dimensions are decayed,
    as in the released recipe): ``x_proj_weight`` (G, dt_rank + 2N, d), ``dt_proj_weight``
    (G, d, dt_rank), ``dt_proj_bias`` (G, d), ``A_log`` (G, d, N), ``D`` (C,).
    """

    def __init__(
        self,
        channels: int,
        num_groups: int,
        dt_rank: int,
        d_state: int = 1,
        scan_backend: str = 'auto',
        has_norm: bool = False,
    ) -> None:
        super().__init__()
        width = channels // num_groups
        self.num_groups = num_groups
        self.dt_rank = dt_rank
        self.d_state = d_state
        self.scan_backend = check_backend(scan_backend)
        self.has_norm = has_norm
        self.x_proj_weight = nn.Parameter(torch.empty(num_groups, dt_rank + 2 * d_state, width))
        self.dt_proj_weight = nn.Parameter(torch.empty(num_groups, width, dt_rank))
        self.dt_proj_bias = nn.Parameter(torch.empty(num_groups, width))
        self.A_log = nn.Parameter(torch.empty(num_groups, width, d_state))
        self.D = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
        """Mamba's initialisation: dt log-uniform in [dt_min, dt_max], A = -(1..N), D = 1."""
        bound = 1 / math.sqrt(self.x_proj_weight.shape[-1])
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        nn.init.uniform_(self.dt_proj_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.exp(
            torch.rand_like(self.dt_proj_bias) * math.log(dt_max / dt_min) + math.log(dt_min)
        )
        self.dt_proj_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        steps = torch.arange(1, self.d_state + 1, dtype=self.A_log.dtype, device=self.A_log.device)
        self.A_log.copy_(torch.log(steps).expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, grid, plan: ScanPlan) -> Tensor:
        """Scan (B, L, C) row-major tokens as ``plan`` says; returns the sum, (B, L, C)."""
        backend = self.resolve_backend(x)
        if backend == 'triton':
            outputs = [self._scan_in_kernels(x, grid, directions) for directions in plan]
            return outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(0)
        dt, A, B, C = self.discretise(x)
        outputs = [
            selective_scan(
                x, dt, A, B, C, self.D, grid=grid, directions=directions, backend=backend
            )
            for directions in plan
        ]
        return outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(0)

    def discretise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the scan of (B, L, C) tokens is given besides them.

        Returns:
            dt (B, L, C), A (C, N), B and C (B, L, G, N).
        """
        low_rank, B, C = grouped_linear(
            x.unflatten(-1, (self.num_groups, -1)), self.x_proj_weight
        ).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = grouped_linear(low_rank, self.dt_proj_weight)
        # dt, A and the state decide how long the memory is: fp32 at least, also under autocast
        dtype = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(dtype) + self.dt_proj_bias.to(dtype)).flatten(2)
        A = -torch.exp(self.A_log.to(dtype)).flatten(0, 1)
        return dt, A, B, C

    def _scan_in_kernels(self, x: Tensor, grid, directions: Sequence[str]) -> Tensor:
        scan = functools.partial(grouped_ssm, gated=False, backend='triton', grid=grid)
        if kernels_know(directions):
            return scan(x, *self.parameters_of_scan(), directions=directions)
        groups = x.unflatten(-1, (self.num_groups, -1))
        ahead = group_to_scan_order(groups, grid, directions).flatten(2)
        y = scan(ahead, *self.parameters_of_scan(), directions=('left-right',) * self.num_groups)
        return group_from_scan_order(y.view_as(groups), grid, directions).flatten(2)

    def parameters_of_scan(self) -> tuple[Tensor, ...]:
        """The parameters in the order of :func:`groupmamba_mm.ops.grouped_ssm`."""
        return self.x_proj_weight, self.dt_proj_weight, self.dt_proj_bias, self.A_log, self.D

    def fuses(self, x: Tensor, plan: ScanPlan) -> bool:
        """Whether a block runs as :mod:`groupmamba_mm.layers.fused`: Triton, and one scan."""
        if len(plan) > 1 or self.resolve_backend(x) != 'triton':
            return False
        if not kernels_know(plan[0]):
            return report_plain(f'the kernels do not know all of the directions {plan[0]}')
        return True

    def resolve_backend(self, x: Tensor) -> str:
        """The backend that ``scan_backend`` stands for on the device and in the dtype of x."""
        width = self.D.shape[0] // self.num_groups if self.has_norm else 1
        return resolve_backend(
            self.scan_backend, x.device, x.dtype, self.d_state, self.num_groups, width, self.dt_rank
        )

    def count_macs(self, x: Tensor, grid, plan: ScanPlan) -> int:
        """Multiply-adds of the scans alone, by the convention 9*B*L*C*N + B*L*C for each."""
        return len(plan) * x.numel() * (9 * self.d_state + 1)

    def extra_repr(self) -> str:
        return (
            f'channels={self.D.shape[0]}, num_groups={self.num_groups}, '
            f'dt_rank={self.dt_rank}, d_state={self.d_state}, '
            f'scan_backend={self.scan_backend!r}'
        )
