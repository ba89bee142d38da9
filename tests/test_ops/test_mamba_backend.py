"""mamba-ssm and causal-conv1d: our layouts around fakes, and the real kernels on a GPU."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from groupmamba_mm import GroupMamba
from groupmamba_mm.layers import GroupedMamba1d
from groupmamba_mm.ops import DIRECTIONS, backend, causal_conv1d_silu, selective_scan
from groupmamba_mm.ops.causal_conv1d import LIBRARY_TAPS
from tests import fakes
from tests.conftest import randomize
from tests.test_ops.test_selective_scan import make_inputs

NAMES = ['x', 'dt', 'A', 'B', 'C', 'D']


@pytest.fixture
def libraries(monkeypatch):
    """The fakes, on any device and in any dtype."""
    fakes.install(monkeypatch)
    fakes.mamba_runs_anywhere(monkeypatch)
    yield
    monkeypatch.undo()
    backend._choose.cache_clear()
    backend.import_problem.cache_clear()


def scan_and_gradients(inputs, grid, directions, name, skip=True):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = selective_scan(
        *(leaves if skip else leaves[:5]), grid=grid, directions=directions, backend=name
    )
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad((y * weight).sum(), leaves if skip else leaves[:5])
    return [y, *grads]


@pytest.mark.parametrize('grid', [(1, 1), (1, 7), (7, 1), (7, 9), (5, 13)])
@pytest.mark.parametrize('width', [1, 3])
@pytest.mark.parametrize('d_state', [1, 3])
def test_scan_and_gradients_match_the_reference(libraries, grid, width, d_state):
    inputs = make_inputs(2, grid, width, 4, d_state, torch.float64)
    got = scan_and_gradients(inputs, grid, DIRECTIONS, 'mamba_ssm')
    expected = scan_and_gradients(inputs, grid, DIRECTIONS, 'reference')
    for name, ours, theirs in zip(['y', *NAMES], got, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize('directions', [('left-right',), ('bottom-top', 'left-right')])
def test_few_groups_and_no_skip(libraries, directions):
    inputs = make_inputs(1, (3, 5), 4, len(directions), 2, torch.float64)
    run = partial(scan_and_gradients, inputs, (3, 5), directions, skip=False)
    for ours, theirs in zip(run('mamba_ssm'), run('reference')):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_half_precision_is_scanned_in_fp32(libraries):
    inputs = make_inputs(1, (4, 6), 2, 4, 1, torch.bfloat16)
    run = partial(selective_scan, *inputs, grid=(4, 6), directions=DIRECTIONS)
    y = run(backend='mamba_ssm')
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, run(backend='torch'))


@pytest.mark.parametrize('taps', [1, 2, 3, 4, 5])
@pytest.mark.parametrize('channels', [8, 12, 3])
@pytest.mark.parametrize('length', [1, 2, 9])
def test_convolution_and_gradients(libraries, monkeypatch, taps, channels, length):
    calls = []
    import causal_conv1d

    run = causal_conv1d.causal_conv1d_fn
    monkeypatch.setattr(
        causal_conv1d,
        'causal_conv1d_fn',
        lambda *args, **kwargs: (calls.append(1), run(*args, **kwargs))[1],
    )
    gen = torch.Generator().manual_seed(0)
    rand = partial(torch.randn, generator=gen, dtype=torch.float64)
    inputs = [rand(2, length, channels), rand(channels, 1, taps), rand(channels)]
    grad = rand(2, length, channels)
    results = []
    for name in ('mamba_ssm', 'torch'):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = causal_conv1d_silu(*leaves, backend=name)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    x, weight, bias = inputs
    plain = F.silu(
        F.conv1d(x.transpose(1, 2), weight, bias, padding=taps - 1, groups=channels)[..., :length]
    ).transpose(1, 2)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(results[0][0], plain)
    assert len(calls) == (taps in LIBRARY_TAPS)


def test_convolution_takes_a_view(libraries):
    x = torch.randn(2, 5, 24)[..., 3:11]
    weight, bias = torch.randn(8, 1, 3), torch.randn(8)
    torch.testing.assert_close(
        causal_conv1d_silu(x, weight, bias, backend='mamba_ssm'),
        causal_conv1d_silu(x, weight, bias),
    )


@pytest.mark.parametrize('conv', [True, False])
def test_models_are_the_same(libraries, monkeypatch, small_arch, conv):
    fakes.install(monkeypatch, causal_conv1d=conv)
    image = torch.randn(2, 3, 20, 33, dtype=torch.float64)
    models = [
        randomize(GroupMamba(arch=small_arch, d_state=2, scan_backend=name).double())
        for name in ('mamba_ssm', 'torch')
    ]
    outputs = [model(image)[0] for model in models]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_compiled_around_the_library(libraries):
    torch._dynamo.reset()
    layer = GroupedMamba1d(16, (DIRECTIONS,), 1, 'mamba_ssm')
    tokens = torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        got = torch.compile(layer, backend='eager')(tokens, (2, 3))
        torch.testing.assert_close(got, layer(tokens, (2, 3)))


# the real kernels


def need(package):
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    backend.import_problem.cache_clear()
    problem = backend.import_problem(package)
    if problem is not None:
        pytest.skip(problem)


def error_of(got, expected):
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.gpu
@pytest.mark.parametrize('grid', [(1, 1), (7, 9), (16, 17), (60, 70)])
@pytest.mark.parametrize('d_state', [1, 4])
def test_real_scan(grid, d_state):
    need('mamba_ssm')
    inputs = [t.cuda() for t in make_inputs(2, grid, 87, 4, d_state)]
    got = scan_and_gradients(inputs, grid, DIRECTIONS, 'mamba_ssm')
    expected = scan_and_gradients([t.double() for t in inputs], grid, DIRECTIONS, 'torch')
    for name, ours, theirs in zip(['y', *NAMES], got, expected):
        assert error_of(ours, theirs) < 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize('dtype,limit', [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize('channels', [128, 12])
@pytest.mark.parametrize('length', [1, 2, 49, 3136])
def test_real_convolution(channels, length, dtype, limit):
    need('causal_conv1d')
    gen = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(shape, generator=gen).cuda()
        for shape in ((2, length, channels), (channels, 1, 3), (channels,), (2, length, channels))
    )
    x, grad = x.to(dtype), grad.to(dtype)
    results = []
    for name, kind in (('mamba_ssm', None), ('torch', torch.float64)):
        leaves = [t.clone().to(kind or t.dtype).requires_grad_() for t in (x, weight, bias)]
        y = causal_conv1d_silu(*leaves, backend=name)
        results.append([y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
    for ours, theirs in zip(*results):
        assert error_of(ours, theirs) < limit


@pytest.mark.gpu
@pytest.mark.parametrize('autocast', [False, True])
def test_real_models(small_arch, autocast):
    need('mamba_ssm')
    image = torch.randn(2, 3, 64, 96, device='cuda')
    outputs = []
    for name in ('mamba_ssm', 'torch'):
        model = randomize(GroupMamba(arch=small_arch, scan_backend=name)).cuda()
        with torch.autocast('cuda', torch.bfloat16, enabled=autocast):
            y = model(image)[0].float()
        y.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        outputs.append(y.detach())
    assert error_of(outputs[0], outputs[1].double()) < (5e-2 if autocast else 1e-3)
