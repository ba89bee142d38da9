"""Fused BatchNorm and ReLU, and LayerNorm of tokens, against PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('triton')

from groupmamba_mm.ops.norm import batch_norm
from groupmamba_mm.ops.norm.batch_norm import batch_norm_relu
from groupmamba_mm.ops.norm.layer_norm import layer_norm
from tests.kernel_testing import TOLERANCE, assert_near, gpu, randn

pytestmark = pytest.mark.usefixtures('nan_buffers')

#: (B, C, H, W): few rows, fewer than a tile, ragged, channels that are no power of two
SIZES = [(1, 32, 5, 1), (2, 5, 3, 3), (3, 24, 17, 19), (2, 64, 40, 33)]
DTYPES = [torch.float32, torch.bfloat16]


def everything(run, inputs, grad):
    """The output, and the gradients of the inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@pytest.mark.parametrize('few_programs', [False, True])
@pytest.mark.parametrize('of_batch', [True, False])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', SIZES)
def test_batch_norm_relu(size, dtype, of_batch, few_programs, device, monkeypatch):
    if few_programs:  # several tiles each
        monkeypatch.setattr(batch_norm, '_PROGRAMS', 3)
        monkeypatch.setattr(batch_norm, '_VALUES', 128)
    channels = size[1]
    x = randn(0, device, dtype, *size) * 2 + 5
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = 1 + 0.3 * randn(1, device, torch.float32, 2, channels)
    averages = 5 + randn(2, device, torch.float32, channels), 1 + torch.rand(channels).to(device)
    grad = randn(3, device, dtype, *size)
    running = [t.clone() for t in averages]
    got = everything(
        lambda *leaves: batch_norm_relu(*leaves, *running, of_batch, 0.1, 1e-5),
        (x, weight, bias),
        grad,
    )
    expected_running = [t.double() for t in averages]
    expected = everything(
        lambda x, w, b: F.relu(F.batch_norm(x, *expected_running, w, b, of_batch, 0.1, 1e-5)),
        (x.double(), weight.double(), bias.double()),
        grad.double(),
    )
    for name, one, other in zip(('y', 'dx', 'dweight', 'dbias'), got, expected):
        assert_near(name, one, other, TOLERANCE[dtype] if name in ('y', 'dx') else 1e-5)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(running, expected_running):
        assert_near('running average', one, other, 1e-5)


def test_a_mean_far_from_zero_costs_no_digits(device):
    x = 1000 + 0.1 * randn(0, device, torch.float32, 4, 8, 32, 32)
    weight, bias = torch.ones(8, device=device), torch.full((8,), 5.0, device=device)
    running = torch.zeros(8, device=device), torch.ones(8, device=device)
    y = batch_norm_relu(x, weight, bias, *running, True, 1.0, 1e-5)
    expected = F.relu(F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True))
    assert_near('y', y, expected, 1e-3)  # the mean itself is rounded to fp32
    assert_near('running average', running[1], x.double().var((0, 2, 3)), 1e-4)


def test_batch_norm_is_repeatable_and_keeps_nan(device):
    x = randn(0, device, torch.float32, 2, 16, 33, 20)
    weight = torch.ones(16, device=device, requires_grad=True)
    state = torch.zeros(16, device=device), torch.ones(16, device=device)
    results = []
    for _ in range(2):
        weight.grad = None
        y = batch_norm_relu(x, weight, state[0], state[0].clone(), state[1].clone(), True, 0.1, 0)
        y.square().sum().backward()
        results.append((y.detach(), weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results))
    x[0, 3, 0, 0] = float('nan')
    y = batch_norm_relu(x, weight, state[0], *state, True, 0.1, 1e-5)
    assert y[:, 3].isnan().all() and not y[:, :3].isnan().any()


@pytest.mark.parametrize('out_dtype', DTYPES)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', [(2, 1, 16), (1, 19, 348), (2, 21, 64)])
def test_layer_norm(size, dtype, out_dtype, device):
    x = randn(0, device, dtype, *size)
    weight, bias = 1 + 0.3 * randn(1, device, torch.float32, 2, size[2])
    grad = randn(3, device, out_dtype, *size)
    got = everything(lambda *leaves: layer_norm(*leaves, 1e-6, out_dtype), (x, weight, bias), grad)
    expected = everything(
        lambda x, w, b: F.layer_norm(x, x.shape[2:], w, b, 1e-6),
        (x.double(), weight.double(), bias.double()),
        grad.double(),
    )
    assert got[0].dtype == out_dtype
    assert_near('y', got[0], expected[0], TOLERANCE[out_dtype])
    assert_near('dx', got[1], expected[1], TOLERANCE[dtype])
    for name, one, other in zip(('dweight', 'dbias'), got[2:], expected[2:]):
        assert_near(name, one, other, 1e-5)


@pytest.mark.parametrize('size', [pytest.param((128, 32, 112, 112), marks=gpu)])
def test_batch_norm_of_a_whole_batch(size, device):
    x = randn(0, device, torch.bfloat16, *size).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    norm = torch.nn.BatchNorm2d(size[1]).to(device)
    own = [norm.running_mean.clone(), norm.running_var.clone()]
    grad = randn(1, device, torch.bfloat16, *size)
    y = batch_norm_relu(x, norm.weight, norm.bias, *own, True, 0.1, 1e-5)
    expected = norm(x).relu()
    assert_near('y', y, expected.double(), 1e-2)
    grads = [torch.autograd.grad(out, (x, norm.weight, norm.bias), grad) for out in (y, expected)]
    for one, other in zip(*grads):
        assert_near('gradient', one, other.double(), 1e-2)
    assert_near('running average', own[1], norm.running_var.double(), 1e-4)
