"""How a classifier's backbone ends: from the last stage's tokens to one vector an image."""

from torch import Tensor, nn

from .ffn import FFN
from .official_layer import OfficialMixer
from .scan_plan import ScanPlan


class PoolNorm(nn.Module):
    """The paper's family: global average pooling, then LN.

    Args: as :class:`ClassBlock`; all but ``channels`` are without effect here.
    """

    def __init__(
        self,
        channels: int,
        plan: ScanPlan,
        ffn_ratio: float,
        d_state: int,
        channel_affinity: bool,
        scan_backend: str,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, C)."""
        return self.norm(x.mean(dim=1))


class ClassBlock(nn.Module):
    """The released model: one block updates the mean token alone, then norm4.

    c = c + norm1(mixer(c)), c = c + ffn(norm2(c)). The mixer sees a 1 x 1 grid: its scan has one
    step from a zero state, so that its ``A_log`` has no influence and a gradient of zero.

    Args:
        channels: Number of channels C.
        plan: The directions of the groups.
        ffn_ratio: Hidden width of the FFN over C.
        d_state: State size N.
        channel_affinity: False leaves the channel affinity out.
        scan_backend: See :func:`groupmamba_mm.ops.backend.choose_backend`.
    """

    def __init__(
        self,
        channels: int,
        plan: ScanPlan,
        ffn_ratio: float,
        d_state: int,
        channel_affinity: bool,
        scan_backend: str,
    ) -> None:
        super().__init__()
        self.mixer = OfficialMixer(channels, plan, d_state, channel_affinity, scan_backend)
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.ffn = FFN(channels, ffn_ratio)
        self.norm4 = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, C)."""
        token = x.mean(dim=1, keepdim=True)
        token = token + self.norm1(self.mixer(token, (1, 1)))
        token = token + self.ffn(self.norm2(token))
        return self.norm4(token).squeeze(1)
