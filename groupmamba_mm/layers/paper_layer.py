"""The paper's modulated group mamba layer, Eq. 3-9."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from groupmamba_mm.ops.selective_scan import group_from_scan_order, group_to_scan_order
from groupmamba_mm.ops.selective_scan.directions import direction_code

from . import fused
from .channel_affinity import ChannelAffinity, NoChannelAffinity
from .convolution import CausalConv1d
from .ffn import FFN, GroupedFFN
from .grouped import GroupedLayerNorm, GroupedLinear
from .scan_plan import ScanPlan
from .ssm import GroupedSSM

#: Readings of what the paper leaves open, the ones that come closest to Table 6's counts.
EXPAND = 2
CONV_TAPS = 3
VSSS_FFN_RATIO = 2


class GroupedMamba1d(nn.Module):
    """The Mamba block of every group, with one 1-D selective scan.

    Input projection to (x, z), causal depthwise convolution along the scanned sequence, SiLU, scan,
    gate by SiLU(z), output projection.

    Args:
        channels: Number of channels C of all groups together.
        plan: The directions of the groups.
        d_state: State size N.
        scan_backend: See :func:`groupmamba_mm.ops.backend.choose_backend`.
    """

    def __init__(self, channels: int, plan: ScanPlan, d_state: int, scan_backend: str) -> None:
        super().__init__()
        self.plan = plan
        groups = len(plan[0])
        width = channels // groups
        inner = EXPAND * width
        self.in_proj = GroupedLinear(width, 2 * inner, groups, bias=False)
        self.conv1d = CausalConv1d(groups * inner, CONV_TAPS)
        self.ssm = GroupedSSM(groups * inner, groups, math.ceil(width / 16), d_state, scan_backend)
        self.out_proj = GroupedLinear(inner, width, groups, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, G, d) tokens of an H x W grid to (B, L, G, d)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        outputs = [self._scan(x, grid, directions) for directions in self.plan]
        y = outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(0)
        return self.out_proj(y * F.silu(z))

    def _scan(self, x: Tensor, grid: tuple[int, int], directions: tuple[str, ...]) -> Tensor:
        # The convolution runs along the scanned sequence: bring the tokens into that order first,
        # where the scan itself goes straight ahead.
        ahead = (('left-right',) * len(directions),)
        tokens = group_to_scan_order(x, grid, directions).flatten(2)
        y = self.ssm(self.conv1d(tokens, self.ssm.resolve_backend(tokens)), grid, ahead)
        return group_from_scan_order(y.unflatten(-1, x.shape[-2:]), grid, directions)


class GroupedVSSS(nn.Module):
    """The VSSS block of every group (Eq. 4 and 6): Mamba, then FFN, each after a LayerNorm.

    Args:
        channels: Number of channels C of all groups together.
        plan: The directions of the groups.
        d_state: State size N.
        scan_backend: See :func:`groupmamba_mm.ops.backend.choose_backend`.
    """

    def __init__(self, channels: int, plan: ScanPlan, d_state: int, scan_backend: str) -> None:
        super().__init__()
        self.num_groups = len(plan[0])
        self.norm1 = GroupedLayerNorm(channels, self.num_groups)
        self.mamba = GroupedMamba1d(channels, plan, d_state, scan_backend)
        self.norm2 = GroupedLayerNorm(channels, self.num_groups)
        self.ffn = GroupedFFN(channels // self.num_groups, self.num_groups, VSSS_FFN_RATIO)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        groups = (self.num_groups, x.shape[-1] // self.num_groups)
        x = x + self.mamba(self.norm1(x).unflatten(-1, groups), grid).flatten(2)
        return x + self.ffn(self.norm2(x).unflatten(-1, groups)).flatten(2)


class ModulatedGroupMambaLayer(nn.Module):
    """X_out = X_in + FFN(LN(CAM(GroupedMamba(X_in), Affinity(X_in)))), Eq. 3.

    Args:
        channels: Number of channels C.
        plan: The directions of the groups.
        ffn_ratio: Hidden width of the outer FFN over C.
        d_state: State size N.
        channel_affinity: False leaves CAM out.
        drop_path: Probability of dropping the residual branch of a sample.
        scan_backend: See :func:`groupmamba_mm.ops.backend.choose_backend`.
    """

    def __init__(
        self,
        channels: int,
        plan: ScanPlan,
        ffn_ratio: float,
        d_state: int,
        channel_affinity: bool,
        drop_path: float,
        scan_backend: str,
    ) -> None:
        super().__init__()
        self.affinity = ChannelAffinity(channels) if channel_affinity else NoChannelAffinity()
        self.vsss = GroupedVSSS(channels, plan, d_state, scan_backend)
        self.norm = nn.LayerNorm(channels, eps=1e-5)
        self.ffn = FFN(channels, ffn_ratio)
        self.drop_path = StochasticDepth(drop_path, 'row')

    def forward(
        self, x: Tensor | fused.Residual, grid: tuple[int, int], is_last: bool = True
    ) -> Tensor | fused.Residual:
        """(B, L, C) tokens of an H x W grid to (B, L, C); see :meth:`OfficialBlock.forward`."""
        tokens = x.tokens if isinstance(x, fused.Residual) else x
        mamba = self.vsss.mamba
        if mamba.ssm.fuses(tokens, mamba.plan):
            result = self._run_fused(x, tokens, grid)
            if result is not None:
                return result.materialize() if is_last else result
        x = x.materialize() if isinstance(x, fused.Residual) else x
        modulated = self.vsss(x, grid) * self.affinity(x)  # Eq. 9
        return x + self.drop_path(self.ffn(self.norm(modulated)))

    def _run_fused(
        self, x: Tensor | fused.Residual, tokens: Tensor, grid: tuple[int, int]
    ) -> fused.Residual | None:
        """Run the fused kernels; None if they do not implement one of the submodules."""
        from groupmamba_mm.ops.blocks.paper import AFFINITY_PARAMETERS, PARAMETERS, PaperSpec

        kinds, names = _FUSED_PARTS, PARAMETERS
        if type(self.affinity) is not NoChannelAffinity:
            kinds, names = _FUSED_PARTS_WITH_AFFINITY, PARAMETERS + AFFINITY_PARAMETERS
        parts = fused.find_parts(self, kinds)
        if parts is None:
            return None
        ssm, norm, conv = parts['vsss.mamba.ssm'], parts['norm'], parts['vsss.mamba.conv1d']
        spec = PaperSpec(
            norm.normalized_shape[0],
            ssm.num_groups,
            ssm.dt_proj_weight.shape[1],
            conv.kernel_size[0],
            parts['vsss.ffn.fc1'].weight.shape[1],
            parts['ffn.fc1'].out_features,
            ssm.dt_rank,
            ssm.d_state,
            direction_code(parts['vsss.mamba'].plan[0]),
            parts['affinity.fc1'].out_features if names is not PARAMETERS else 0,
            parts['vsss.norm1'].eps,
            parts['vsss.norm2'].eps,
            norm.eps,
        )
        parameters = fused.find_parameters(parts, names, spec.shapes())
        if parameters is None:
            return None
        drop = fused.draw_drop_path(parts['drop_path'], tokens)[0]
        return fused.run('paper', spec, grid, x, (None, drop), parameters)


#: The submodules of a layer that the kernels implement.
_FUSED_PARTS = {
    'affinity': (ChannelAffinity, NoChannelAffinity),
    'vsss': (GroupedVSSS,),
    'vsss.norm1': (GroupedLayerNorm,),
    'vsss.mamba': (GroupedMamba1d,),
    'vsss.mamba.in_proj': (GroupedLinear,),
    'vsss.mamba.conv1d': (CausalConv1d,),
    'vsss.mamba.ssm': (GroupedSSM,),
    'vsss.mamba.out_proj': (GroupedLinear,),
    'vsss.norm2': (GroupedLayerNorm,),
    'vsss.ffn': (GroupedFFN,),
    'vsss.ffn.fc1': (GroupedLinear,),
    'vsss.ffn.fc2': (GroupedLinear,),
    'norm': (nn.LayerNorm,),
    'ffn': (FFN,),
    'ffn.fc1': (nn.Linear,),
    'ffn.fc2': (nn.Linear,),
    'drop_path': (StochasticDepth,),
}
_FUSED_PARTS_WITH_AFFINITY = {
    **_FUSED_PARTS,
    'affinity.fc1': (nn.Linear,),
    'affinity.fc2': (nn.Linear,),
}
