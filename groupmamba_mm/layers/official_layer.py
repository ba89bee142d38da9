"""The released model's block: SS2D units, modulated mixer, convolutional FFN."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from groupmamba_mm.ops.selective_scan.directions import direction_code

from . import fused
from .channel_affinity import ChannelAffinity, NoChannelAffinity
from .convolution import GridDepthwiseConv
from .ffn import ConvFFN
from .grouped import GroupedLayerNorm, GroupedLinear
from .scan_plan import ScanPlan
from .ssm import GroupedSSM


class GroupedSS2D(nn.Module):
    """The SS2D units of all groups, each on its own quarter of the channels.

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
        self.in_proj = GroupedLinear(width, 2 * width, groups, bias=False)
        self.conv2d = GridDepthwiseConv(channels)
        self.ssm = GroupedSSM(
            channels, groups, math.ceil(width / 16), d_state, scan_backend, has_norm=True
        )
        self.out_norm = GroupedLayerNorm(channels, groups, eps=1e-5)
        self.out_proj = GroupedLinear(width, width, groups, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, C) tokens of an H x W grid to (B, L, C)."""
        groups = len(self.plan[0])
        x, z = self.in_proj(x.unflatten(-1, (groups, x.shape[-1] // groups))).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.flatten(2), grid))
        y = self.out_norm(self.ssm(x, grid, self.plan)) * F.silu(z).flatten(2)
        return self.out_proj(y.unflatten(-1, z.shape[-2:])).flatten(2)


class OfficialMixer(nn.Module):
    """Token mixer of the released model: SS2D units, skip, channel affinity, projection.

    The one ``norm`` is applied twice, to the input and before the projection.

    Args:
        channels: Number of channels C.
        plan: The directions of the groups.
        d_state: State size N.
        channel_affinity: False leaves the channel affinity out.
        scan_backend: See :func:`groupmamba_mm.ops.backend.choose_backend`.
    """

    def __init__(
        self, channels: int, plan: ScanPlan, d_state: int, channel_affinity: bool, scan_backend: str
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-5)
        self.affinity = ChannelAffinity(channels) if channel_affinity else NoChannelAffinity()
        self.ss2d = GroupedSS2D(channels, plan, d_state, scan_backend)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, C) tokens of an H x W grid to (B, L, C)."""
        u = self.norm(x)
        scale = self.skip_scale * self.affinity(u)  # both (B, 1, C), before they meet the tokens
        return self.proj(self.norm(self.ss2d(u, grid) * u * scale))


class OfficialBlock(nn.Module):
    """Mixer and convolutional FFN, each with a residual connection and drop path.

    Args: as :class:`groupmamba_mm.layers.ModulatedGroupMambaLayer`.
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
        self.mixer = OfficialMixer(channels, plan, d_state, channel_affinity, scan_backend)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.ffn = ConvFFN(channels, ffn_ratio)
        self.drop_path = StochasticDepth(drop_path, 'row')

    def forward(
        self, x: Tensor | fused.Residual, grid: tuple[int, int], is_last: bool = True
    ) -> Tensor | fused.Residual:
        """(B, L, C) tokens of an H x W grid to (B, L, C).

        Args:
            x: Tokens, or what the block before left to be added.
            grid: (H, W).
            is_last: False where another block follows: fused kernels then leave the last addition
                to its first norm.
        """
        tokens = x.tokens if isinstance(x, fused.Residual) else x
        ss2d = self.mixer.ss2d
        if ss2d.ssm.fuses(tokens, ss2d.plan):
            result = self._run_fused(x, tokens, grid)
            if result is not None:
                return result.materialize() if is_last else result
        x = x.materialize() if isinstance(x, fused.Residual) else x
        x = x + self.drop_path(self.mixer(x, grid))
        return x + self.drop_path(self.ffn(self.norm2(x), grid))

    def _run_fused(
        self, x: Tensor | fused.Residual, tokens: Tensor, grid: tuple[int, int]
    ) -> fused.Residual | None:
        """Run the fused kernels; None if they do not implement one of the submodules."""
        from groupmamba_mm.ops.blocks.official import AFFINITY_PARAMETERS, PARAMETERS, OfficialSpec

        kinds, names = _FUSED_PARTS, PARAMETERS
        if type(self.mixer.affinity) is not NoChannelAffinity:
            kinds, names = _FUSED_PARTS_WITH_AFFINITY, PARAMETERS + AFFINITY_PARAMETERS
        parts = fused.find_parts(self, kinds)
        if parts is None:
            return None
        ssm, norm = parts['mixer.ss2d.ssm'], parts['mixer.norm']
        spec = OfficialSpec(
            norm.normalized_shape[0],
            ssm.num_groups,
            parts['ffn.fc1'].out_features,
            ssm.dt_rank,
            ssm.d_state,
            direction_code(parts['mixer.ss2d'].plan[0]),
            parts['mixer.affinity.fc1'].out_features if names is not PARAMETERS else 0,
            norm.eps,
            parts['mixer.ss2d.out_norm'].eps,
            parts['norm2'].eps,
        )
        parameters = fused.find_parameters(parts, names, spec.shapes())
        if parameters is None:
            return None
        drops = fused.draw_drop_path(parts['drop_path'], tokens)
        return fused.run('official', spec, grid, x, drops, parameters)


#: The submodules of a block that the kernels implement.
_FUSED_PARTS = {
    'mixer': (OfficialMixer,),
    'mixer.norm': (nn.LayerNorm,),
    'mixer.affinity': (ChannelAffinity, NoChannelAffinity),
    'mixer.ss2d': (GroupedSS2D,),
    'mixer.ss2d.in_proj': (GroupedLinear,),
    'mixer.ss2d.conv2d': (GridDepthwiseConv,),
    'mixer.ss2d.ssm': (GroupedSSM,),
    'mixer.ss2d.out_norm': (GroupedLayerNorm,),
    'mixer.ss2d.out_proj': (GroupedLinear,),
    'mixer.proj': (nn.Linear,),
    'norm2': (nn.LayerNorm,),
    'ffn': (ConvFFN,),
    'ffn.fc1': (nn.Linear,),
    'ffn.dwconv': (GridDepthwiseConv,),
    'ffn.fc2': (nn.Linear,),
    'drop_path': (StochasticDepth,),
}
_FUSED_PARTS_WITH_AFFINITY = {
    **_FUSED_PARTS,
    'mixer.affinity.fc1': (nn.Linear,),
    'mixer.affinity.fc2': (nn.Linear,),
}
