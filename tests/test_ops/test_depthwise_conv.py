"""Depthwise convolutions in Triton against PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F

from groupmamba_mm.ops.selective_scan import (
    DIRECTIONS,
    MIRRORED_DIRECTIONS,
    group_from_scan_order,
    group_to_scan_order,
)
from groupmamba_mm.ops.selective_scan.directions import direction_code
from tests.kernel_testing import TOLERANCE, assert_near, gpu, grid_reference, needs_triton, randn

pytestmark = [needs_triton, pytest.mark.usefixtures('nan_buffers')]


@pytest.fixture
def kernels():
    """The kernels' module, which imports Triton."""
    from groupmamba_mm.ops.depthwise_conv import kernels

    return kernels


def strided(tensor, between=1):
    """The same values as one part of a wider projection, with NaN around them.

    With tokens between the images, rows are at no even distance: such inputs are copied.
    """
    batch, length, channels = tensor.shape
    wide = torch.full(
        (batch, length + between, channels + 32),
        float('nan'),
        dtype=tensor.dtype,
        device=tensor.device,
    )
    view = wide[:, :length, 16 : 16 + channels]
    return view.copy_(tensor)


def pad(tensor, groups, lanes, value):
    """(B, L, G * d) to (B, L, G * lanes), ``value`` in the padded lanes of each group."""
    tensor = tensor.unflatten(-1, (groups, -1))
    return F.pad(tensor, (0, lanes - tensor.shape[-1]), value=value).flatten(-2)


def unpad(tensor, groups, width):
    """The true lanes, after a look whether the padded ones are zeros."""
    tensor = tensor.unflatten(-1, (groups, -1))
    assert (tensor[..., width:] == 0).all()
    return tensor[..., :width].flatten(-2)


def causal_reference(x, weight, bias, grid, directions):
    """(B, L, C) to (B, L, C): scan order, PyTorch's own convolution, and back."""
    unfold = (len(directions), -1)
    x = group_to_scan_order(x.unflatten(-1, unfold), grid, directions).flatten(2)
    p = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))  # (B, L, C) -> (B, C, L + K - 1)
    p = F.conv1d(p, weight, bias, groups=len(bias)).transpose(1, 2)  # (B, C, L) -> (B, L, C)
    return group_from_scan_order(F.silu(p).unflatten(-1, unfold), grid, directions).flatten(2)


def check_conv(
    kernels,
    device,
    dtype,
    batch,
    grid,
    groups,
    width,
    lanes,
    view,
    taps,
    forward,
    backward,
    reference,
):
    """Outputs and gradients of one convolution against its reference, twice the same."""
    length, channels = grid[0] * grid[1], groups * width
    x = randn(0, device, dtype, batch, length, channels)
    dy = randn(1, device, dtype, batch, length, channels)
    weight = randn(2, device, torch.float32, channels, 1, *taps)
    bias = randn(3, device, torch.float32, channels)
    truth = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = reference(*truth)
    expected.backward(dy.double())

    # a projection onto padded lanes may write anything there; the gradient of a later one is zero
    x, dy = pad(x, groups, lanes, float('nan')), pad(dy, groups, lanes, 0.0)
    if view:
        x, dy = strided(x, between=0), strided(dy)
    by_tap = kernels.by_tap(weight)
    y = forward(x, by_tap, bias)
    tolerance = TOLERANCE[dtype]
    assert y.is_contiguous() and y.dtype == dtype
    assert_near('y', unpad(y, groups, width), expected.detach(), tolerance)

    dy_before = dy.clone()
    dx_into = strided(torch.zeros_like(x), between=0) if view else None
    wanted = {'activation': torch.empty_like(y)} if len(taps) == 2 else {}
    dx, dweight, dbias, *dx_sum = backward(x, dy, by_tap, bias, dx=dx_into, **wanted)
    assert dx_into is None or dx is dx_into
    assert torch.equal(dy, dy_before)
    assert all(torch.equal(activation, y) for activation in wanted.values())
    assert dweight.dtype == dbias.dtype == torch.float32 and dx.dtype == dtype
    assert_near('dx', unpad(dx, groups, width), truth[0].grad, tolerance)
    assert_near('dweight', dweight, truth[1].grad.flatten(1), tolerance)
    assert_near('dbias', dbias, truth[2].grad, tolerance)
    if dx_sum:
        assert_near('sum of dx', dx_sum[0], truth[0].grad.sum((0, 1)), tolerance)

    given = {
        name: torch.empty(t.numel(), device=device)
        for name, t in zip(('dweight', 'dbias', 'dx_sum'), (dweight, dbias, *dx_sum))
    }  # as they lie in a block's
    again = backward(x, dy, by_tap, bias, **given)
    assert all(t.data_ptr() == g.data_ptr() for t, g in zip(again[1:], given.values()))
    for name, first, second in zip(
        ('dx', 'dweight', 'dbias', 'sum of dx'), (dx, dweight, dbias, *dx_sum), again
    ):
        assert torch.equal(first.flatten(), second.flatten()), f'{name} differs between two runs'


def check_grid(kernels, device, dtype, batch, grid, groups, width, lanes, view, act):
    check_conv(
        kernels,
        device,
        dtype,
        batch,
        grid,
        groups,
        width,
        lanes,
        view,
        (3, 3),
        lambda x, w, b: kernels.grid_conv_forward(x, w, b, grid, act, groups),
        lambda x, dy, w, b, **kw: kernels.grid_conv_backward(x, dy, w, b, grid, act, groups, **kw),
        lambda x, w, b: grid_reference(x, w, b, grid, act),
    )


def check_causal(kernels, device, dtype, batch, grid, directions, width, lanes, view, taps):
    rest = (grid, direction_code(directions), len(directions))
    check_conv(
        kernels,
        device,
        dtype,
        batch,
        grid,
        len(directions),
        width,
        lanes,
        view,
        (taps,),
        lambda x, w, b: kernels.causal_conv_forward(x, w, b, *rest),
        lambda x, dy, w, b, **kw: kernels.causal_conv_backward(x, dy, w, b, *rest, **kw),
        lambda x, w, b: causal_reference(x, w, b, grid, directions),
    )


@pytest.mark.parametrize(
    'dtype, batch, grid, groups, width, lanes, view, act',
    [
        (torch.float32, 2, (4, 7), 1, 24, 24, False, 'gelu'),
        (torch.float32, 1, (1, 1), 1, 3, 3, False, 'silu'),
        (torch.float32, 1, (1, 9), 1, 1, 1, False, 'gelu'),
        (torch.float32, 2, (3, 1), 1, 16, 16, True, 'none'),
        (torch.float32, 1, (2, 10), 1, 5, 5, True, 'silu'),
        (torch.float32, 2, (3, 5), 2, 7, 8, True, 'silu'),
        (torch.bfloat16, 1, (2, 4), 1, 87, 87, False, 'gelu'),
        (torch.bfloat16, 1, (3, 7), 2, 29, 32, True, 'silu'),
        (torch.float16, 1, (4, 3), 1, 12, 12, False, 'silu'),
        (torch.float32, 1, (3, 14), 1, 64, 64, False, 'gelu'),  # strips that divide the map evenly
        (torch.float32, 1, (2, 5), 3, 23, 24, True, 'gelu'),  # a block of channels across groups
    ],
)
def test_grid_conv_matches_pytorch(
    kernels, device, dtype, batch, grid, groups, width, lanes, view, act
):
    check_grid(kernels, device, dtype, batch, grid, groups, width, lanes, view, act)


@pytest.mark.parametrize(
    'dtype, batch, grid, directions, width, lanes, view, taps',
    [
        (torch.float32, 1, (5, 9), DIRECTIONS, 8, 8, False, 3),
        (torch.float32, 1, (1, 1), DIRECTIONS[2:], 3, 3, False, 4),
        (torch.float32, 1, (1, 7), DIRECTIONS, 2, 2, False, 4),
        (torch.float32, 1, (6, 1), DIRECTIONS, 5, 16, True, 3),
        (torch.float32, 2, (2, 3), DIRECTIONS[2:], 7, 8, True, 4),
        (torch.float32, 1, (3, 4), DIRECTIONS[1:2], 4, 4, False, 1),
        (torch.float32, 2, (3, 5), MIRRORED_DIRECTIONS, 4, 4, False, 4),
        (torch.float32, 1, (9, 5), MIRRORED_DIRECTIONS, 2, 8, True, 3),
        (torch.bfloat16, 1, (4, 5), DIRECTIONS[1:3], 20, 24, True, 3),
    ],
)
def test_causal_conv_matches_pytorch(
    kernels, device, dtype, batch, grid, directions, width, lanes, view, taps
):
    check_causal(kernels, device, dtype, batch, grid, directions, width, lanes, view, taps)


@pytest.mark.parametrize('programs, rows', [(1, 8), (10**6, 2)])
def test_work_can_be_split_in_any_way(kernels, device, monkeypatch, programs, rows):
    """Several images in a program (1), or each image cut into short pieces (10**6)."""
    monkeypatch.setattr(kernels, 'PROGRAMS', programs)
    monkeypatch.setattr(kernels, 'MIN_ROWS', rows)
    check_grid(kernels, device, torch.float32, 2, (5, 3), 1, 16, 16, False, 'gelu')
    check_causal(kernels, device, torch.float32, 2, (5, 3), DIRECTIONS[1:3], 5, 8, False, 4)
    check_causal(kernels, device, torch.float32, 2, (5, 3), MIRRORED_DIRECTIONS, 5, 8, False, 4)


def test_fewer_parameters_than_channels(kernels, device):
    """Behind those of the parameters' gradients are channels of padding, with taps of zero."""
    x, dy = (randn(i, device, torch.float32, 2, 6, 16) for i in range(2))
    taps, bias = randn(2, device, torch.float32, 9, 16), randn(3, device, torch.float32, 16)
    taps[:, 10:] = bias[10:] = 0
    dx, *whole = kernels.grid_conv_backward(x, dy, taps, bias, (2, 3), 'gelu')
    fewer = [torch.empty(n, device=device) for n in (90, 10, 10)]
    again, *_ = kernels.grid_conv_backward(
        x, dy, taps, bias, (2, 3), 'gelu', dweight=fewer[0], dbias=fewer[1], dx_sum=fewer[2]
    )
    assert torch.equal(again, dx)
    for name, got, expected in zip(('dweight', 'dbias', 'sum of dx'), fewer, whole):
        assert torch.equal(got, expected[:10].flatten()), name


def test_empty_batch(kernels, device):
    x = torch.empty(0, 6, 4, device=device)
    taps, bias = torch.ones(9, 4, device=device), torch.ones(4, device=device)
    assert kernels.grid_conv_forward(x, taps, bias, (2, 3), 'gelu').shape == x.shape
    dx, *sums = kernels.grid_conv_backward(x, x, taps, bias, (2, 3), 'gelu')
    assert dx.shape == x.shape and not any(t.any() for t in sums)
    scan = ((2, 3), direction_code(DIRECTIONS[:2]), 2)
    assert kernels.causal_conv_forward(x, taps[:3], bias, *scan).shape == x.shape
    dx, *sums = kernels.causal_conv_backward(x, x, taps[:3], bias, *scan)
    assert dx.shape == x.shape and not any(t.any() for t in sums)


@pytest.mark.parametrize(
    'dtype, batch, grid, groups, width, lanes, view, act',
    [
        pytest.param(torch.bfloat16, 2, (200, 336), 1, 64, 64, False, 'gelu', marks=gpu),
        pytest.param(torch.bfloat16, 8, (56, 56), 1, 512, 512, False, 'gelu', marks=gpu),
        pytest.param(torch.float32, 4, (28, 57), 1, 256, 256, True, 'silu', marks=gpu),
        pytest.param(torch.bfloat16, 128, (14, 14), 1, 1392, 1392, False, 'gelu', marks=gpu),
        pytest.param(torch.bfloat16, 128, (14, 14), 4, 87, 88, True, 'silu', marks=gpu),
        pytest.param(torch.float16, 128, (7, 7), 4, 112, 112, True, 'silu', marks=gpu),
    ],
)
def test_grid_conv_at_full_size(
    kernels, device, dtype, batch, grid, groups, width, lanes, view, act
):
    check_grid(kernels, device, dtype, batch, grid, groups, width, lanes, view, act)


@pytest.mark.parametrize(
    'dtype, batch, grid, width, lanes, view, taps',
    [
        pytest.param(torch.bfloat16, 2, (200, 336), 32, 32, False, 3, marks=gpu),
        pytest.param(torch.bfloat16, 128, (14, 14), 174, 176, True, 3, marks=gpu),
        pytest.param(torch.bfloat16, 8, (56, 56), 48, 48, True, 3, marks=gpu),
        pytest.param(torch.float16, 128, (7, 7), 380, 384, True, 3, marks=gpu),
        pytest.param(torch.float32, 16, (28, 57), 64, 64, True, 4, marks=gpu),
    ],
)
def test_causal_conv_at_full_size(kernels, device, dtype, batch, grid, width, lanes, view, taps):
    check_causal(kernels, device, dtype, batch, grid, DIRECTIONS, width, lanes, view, taps)
