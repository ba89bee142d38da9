"""The first convolution in its form for GPUs, against torch's own."""

import pytest
import torch

from groupmamba_mm.layers.embedding import ImageConv


@pytest.mark.parametrize('size', [(8, 12), (7, 10), (9, 9), (1, 2)])
@pytest.mark.parametrize('channels', [3, 4])
def test_over_blocks_of_pixels(size, channels):
    torch.manual_seed(0)
    conv = ImageConv(channels, 5).double()
    image = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.conv2d(image, conv.weight, stride=2, padding=3)
    result = conv.over_blocks(image)
    torch.testing.assert_close(result, expected)
    gradient = torch.randn_like(expected)
    leaves = (image, conv.weight)
    torch.testing.assert_close(
        torch.autograd.grad(result, leaves, gradient),
        torch.autograd.grad(expected, leaves, gradient),
    )


def test_a_cpu_takes_the_convolution_itself(monkeypatch):
    conv = ImageConv(3, 4)
    monkeypatch.setattr(conv, 'over_blocks', None)
    assert conv(torch.randn(1, 3, 9, 8)).shape == (1, 4, 5, 4)
