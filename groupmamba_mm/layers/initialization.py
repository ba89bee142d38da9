"""The released recipe's initial values."""

import math

from torch import nn

from .grouped import GroupedLayerNorm, GroupedLinear
from .official_layer import OfficialMixer
from .ssm import GroupedSSM


def init_parameters(module: nn.Module) -> None:
    """Initialise every parameter below ``module`` as the released model does.

    Linear layers: truncated normal with std 0.02, zero bias. Convolutions: normal with std
    sqrt(2 / fan_out), fan_out counted within a group, zero bias. Norms and skip scale: one and
    zero. The SSM's own parameters: :meth:`GroupedSSM.reset_parameters`. The paper family's 1-D
    convolution, which the released model does not have, keeps PyTorch's default as in Mamba.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, GroupedLinear)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Conv2d):
            fan_out = layer.weight.shape[0] * layer.weight[0, 0].numel() // layer.groups
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, OfficialMixer):
            nn.init.ones_(layer.skip_scale)
        elif isinstance(
            layer, (nn.LayerNorm, nn.BatchNorm2d, GroupedLayerNorm, GroupedSSM, nn.Conv1d)
        ):
            layer.reset_parameters()
