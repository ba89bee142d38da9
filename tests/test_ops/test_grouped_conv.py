"""The grouped convolution of inference against PyTorch's in fp64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('triton')

from groupmamba_mm.ops.grouped_conv import grouped_conv, packed_weight
from tests.kernel_testing import TOLERANCE, assert_near, randn

pytestmark = pytest.mark.usefixtures('nan_buffers')


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(
    ('size', 'groups', 'c_in', 'c_out'),
    [
        ((1, 1, 1), 2, 16, 16),
        ((3, 5, 8), 3, 24, 40),
        ((2, 9, 7), 2, 112, 112),  # RegNetY-16GF's groups
        ((1, 4, 33), 1, 80, 144),  # more channels than a tile
    ],
)
def test_grouped_conv(size, groups, c_in, c_out, stride, relu, device):
    batch, height, width = size
    x = randn(0, device, torch.bfloat16, batch, groups * c_in, height, width)
    weight = randn(1, device, torch.bfloat16, groups * c_out, c_in, 3, 3) / (3 * c_in**0.5)
    bias = randn(2, device, torch.bfloat16, groups * c_out)
    y = grouped_conv(x, packed_weight(weight, groups), bias, stride, relu)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, 1, 1, groups)
    assert_near('y', y, F.relu(expected) if relu else expected, TOLERANCE[torch.bfloat16])
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_value_that_is_not_finite_stays_so(device):
    x = torch.zeros(1, 32, 3, 3, dtype=torch.bfloat16, device=device)
    x[0, 20, 1, 1] = float('nan')
    weight = torch.ones(32, 16, 3, 3, dtype=torch.bfloat16, device=device)
    y = grouped_conv(x, packed_weight(weight, 2), weight[:, 0, 0, 0] * 0, relu=True)
    assert y[:, 16:].isnan().all() and (y[:, :16] == 0).all()
