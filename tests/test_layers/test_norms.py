"""The norms outside the blocks: in kernels they give what PyTorch's own give, in its precisions."""

import pytest
import torch
from torch import nn

pytest.importorskip('triton')

from groupmamba_mm.layers.norms import ConvNormReLU, TokenNorm
from tests.kernel_testing import INTERPRETED, TOLERANCE, assert_near, randn

DEVICE = 'cpu' if INTERPRETED else 'cuda'
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize('before_product', [False, True])
@pytest.mark.parametrize('dtype', [FP32, BF16])
def test_precision_of_a_token_norm_under_autocast(dtype, before_product):
    """As autocast's norm on a GPU, fp32 whatever comes in, unless a product would round it."""
    norm = TokenNorm(16, 1e-5, 'triton', before_product).to(DEVICE)
    x = randn(0, DEVICE, dtype, 2, 9, 16)
    with torch.autocast(DEVICE, BF16):
        y = norm(x)
    assert y.dtype == (BF16 if before_product else FP32)
    expected = nn.functional.layer_norm(x.double(), (16,), eps=1e-5)
    assert_near('y', y, expected, TOLERANCE[y.dtype])


def test_without_autocast_a_token_norm_keeps_the_precision():
    norm = TokenNorm(16, 1e-5, 'triton').to(DEVICE)
    for dtype in (FP32, BF16):
        assert norm.to(dtype)(randn(0, DEVICE, dtype, 1, 4, 16)).dtype == dtype


def layers(scan_backend):
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    return ConvNormReLU(*convs, scan_backend=scan_backend).to(DEVICE)


def test_convolutions_with_norms_are_those_of_torch():
    image = randn(0, DEVICE, FP32, 2, 3, 9, 7).contiguous(memory_format=torch.channels_last)
    fused, plain = layers('triton'), layers('torch')
    torch.testing.assert_close(fused(image), plain(image), rtol=1e-4, atol=1e-5)
    for (name, one), other in zip(fused.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(fused.eval()(image), plain.eval()(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('watched', [1, 2])
def test_a_hook_on_a_norm_or_its_activation_is_called(watched):
    model, seen = layers('triton'), []
    model[watched].register_forward_hook(lambda *args: seen.append(args))
    model(randn(0, DEVICE, FP32, 2, 3, 9, 7))
    assert len(seen) == 1
