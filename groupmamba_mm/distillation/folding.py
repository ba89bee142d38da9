"""Convolutions of a frozen network in one with the BatchNorm and ReLU that follow them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from groupmamba_mm.layers import is_watched
from groupmamba_mm.ops.backend import resolve_backend

#: Channels of a group that the kernel for groups takes at least.
_LEAST_CHANNELS = 16


class FoldedConv(nn.Module):
    """A convolution and a BatchNorm in eval mode as one convolution in bf16.

    On a GPU a convolution of single pixels is a matrix product, and a grouped one runs in
    :func:`groupmamba_mm.ops.grouped_conv.grouped_conv` where the kernels run.

    Args:
        conv: The convolution.
        norm: The BatchNorm.
        relu: Whether ReLU follows.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, relu: bool) -> None:
        super().__init__()
        # in fp32, and rounded once
        weight, bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        self.weight, self.bias = (
            nn.Parameter(tensor.to(torch.bfloat16), requires_grad=False)
            for tensor in (weight, bias)
        )
        self.options = conv.stride, conv.padding, conv.dilation, conv.groups
        self.relu = relu
        single = ((1, 1), (0, 0), (1, 1), 1)
        self.is_product = conv.kernel_size == (1, 1) and self.options == single
        self.register_buffer('packed', None, persistent=False)
        if (
            conv.groups > 1
            and conv.kernel_size == (3, 3)
            and self.options[:3] in (((s, s), (1, 1), (1, 1)) for s in conv.stride)
            and min(weight.shape[1], weight.shape[0] // conv.groups) >= _LEAST_CHANNELS
        ):
            # not at the top: Triton is not everywhere
            from groupmamba_mm.ops.grouped_conv import packed_weight

            self.packed = packed_weight(self.weight, conv.groups)

    def forward(self, image: Tensor) -> Tensor:
        """Convolve.

        Args:
            image: (B, C, H, W).

        Returns:
            (B, C', H', W') in bf16.
        """
        image = image.to(self.weight.dtype)
        if self.is_product and image.is_cuda:
            return self._multiply(image)
        if self.packed is not None and resolve_backend('auto', image.device) == 'triton':
            from groupmamba_mm.ops.grouped_conv import grouped_conv

            return grouped_conv(image, self.packed, self.bias, self.options[0][0], self.relu)
        result = F.conv2d(image, self.weight, self.bias, *self.options)
        return result.relu_() if self.relu else result

    def _multiply(self, image: Tensor) -> Tensor:
        # (B, C, H, W) -> (B * H * W, C), of a channels-last image without a copy
        pixels = image.permute(0, 2, 3, 1)
        rows, weight = pixels.reshape(-1, pixels.shape[-1]), self.weight.flatten(1)
        if self.relu:
            rows = torch._addmm_activation(self.bias, rows, weight.t())
        else:
            rows = F.linear(rows, weight, self.bias)
        return rows.unflatten(0, pixels.shape[:-1]).permute(0, 3, 1, 2)


def fold_norms(network: nn.Module) -> None:
    """Fold BatchNorms into the convolutions before them, in timm's layers of both.

    Args:
        network: In eval mode, changed in place. Layers that somebody watches by hooks, or of other
            kinds, stay as they are.
    """
    try:
        from timm.layers import BatchNormAct2d, ConvNormAct
    except ImportError:
        return  # then no layer is timm's
    for layer in network.modules():
        if not (
            isinstance(layer, ConvNormAct)
            and type(layer.conv) is nn.Conv2d
            and layer.conv.padding_mode == 'zeros'
            and type(layer.bn) is BatchNormAct2d
            and layer.bn.track_running_stats
            and layer.bn.affine
            and type(layer.bn.drop) is nn.Identity
            and not any(map(is_watched, (layer.conv, layer.bn, layer.bn.act)))
        ):
            continue
        relu = type(layer.bn.act) is nn.ReLU
        layer.conv = FoldedConv(layer.conv, layer.bn, relu)
        layer.bn = nn.Identity() if relu else layer.bn.act
