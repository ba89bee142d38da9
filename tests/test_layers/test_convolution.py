"""The depthwise convolution on the grid, as a layer."""

import pytest
import torch
import torch.nn.functional as F

from groupmamba_mm.layers import GridDepthwiseConv


@pytest.mark.parametrize('grid', [(1, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_it_is_the_convolution_of_the_map(grid, dtype):
    """Also of one token, where only the middle tap sees more than zeros."""
    torch.manual_seed(0)
    layer = GridDepthwiseConv(6).to(dtype)
    tokens = torch.randn(5, grid[0] * grid[1], 6, dtype=dtype, requires_grad=True)
    map_ = tokens.detach().unflatten(1, grid).permute(0, 3, 1, 2).requires_grad_()
    weight, bias = (p.detach().clone().requires_grad_() for p in layer.parameters())
    y = layer(tokens, grid)
    expected = F.conv2d(map_, weight, bias, padding=1, groups=6)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient.unflatten(1, grid).permute(0, 3, 1, 2))
    close = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, expected.permute(0, 2, 3, 1).flatten(1, 2), **close)
    torch.testing.assert_close(tokens.grad, map_.grad.permute(0, 2, 3, 1).flatten(1, 2), **close)
    torch.testing.assert_close(layer.weight.grad, weight.grad, **close)
    torch.testing.assert_close(layer.bias.grad, bias.grad, **close)


def test_one_token_keeps_its_type_under_autocast():
    """What follows would else run in fp32, at twice the memory."""
    layer = GridDepthwiseConv(6)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(torch.randn(2, 1, 6, dtype=torch.bfloat16), (1, 1)).dtype == torch.bfloat16
