"""The layers of both families, from channels-last tokens to channels-last tokens."""

from . import kernel_cases  # noqa: F401  (registers them)
from .channel_affinity import ChannelAffinity, NoChannelAffinity
from .convolution import CausalConv1d, GridDepthwiseConv
from .embedding import Downsample, NormedDownsample, OfficialStem, PaperStem
from .ffn import FFN, ConvFFN, GroupedFFN
from .fused import is_watched
from .grouped import GroupedLayerNorm, GroupedLinear, grouped_linear
from .initialization import init_parameters
from .norms import TokenNorm
from .official_layer import GroupedSS2D, OfficialBlock, OfficialMixer
from .paper_layer import GroupedMamba1d, GroupedVSSS, ModulatedGroupMambaLayer
from .scan_plan import ScanPlan, make_scan_plan
from .ssm import GroupedSSM
from .summary import ClassBlock, PoolNorm

__all__ = [
    'CausalConv1d',
    'ChannelAffinity',
    'ClassBlock',
    'ConvFFN',
    'Downsample',
    'FFN',
    'GridDepthwiseConv',
    'GroupedFFN',
    'GroupedLayerNorm',
    'GroupedLinear',
    'GroupedMamba1d',
    'GroupedSS2D',
    'GroupedSSM',
    'GroupedVSSS',
    'ModulatedGroupMambaLayer',
    'NoChannelAffinity',
    'NormedDownsample',
    'OfficialBlock',
    'OfficialMixer',
    'OfficialStem',
    'PaperStem',
    'PoolNorm',
    'ScanPlan',
    'TokenNorm',
    'grouped_linear',
    'init_parameters',
    'is_watched',
    'make_scan_plan',
]
