"""Fused LayerNorms and channel affinity against PyTorch in fp64: outputs and every gradient."""

import itertools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('triton')

from groupmamba_mm.ops.integers import round_up
from groupmamba_mm.ops.norm.kernels import (
    add_norm_backward,
    add_norm_forward,
    affinity_backward,
    affinity_forward,
    scaled_norm_backward,
    scaled_norm_forward,
)
from tests.kernel_testing import differentiable, gpu

pytestmark = pytest.mark.usefixtures('nan_buffers')

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {FP32: 1e-5, FP16: 1e-3, BF16: 5e-3}
#: (images, tokens, channels, groups): ragged, one token, several tiles of a program, a last tile
#: that is not full
SIZES = [
    (2, 1, 64, 1),
    (2, 49, 64, 1),
    (1, 19, 348, 1),
    (1, 21, 348, 4),
    (1, 17, 424, 4),
    (1, 49, 96, 4),
    (1, 5, 1012, 4),
    (2, 5, 1012, 1),
]


def add_layer_norm(
    x,
    branch,
    branch_scale,
    weight,
    bias,
    eps,
    groups,
    out_dtype,
    mean_of,
    stream_dtype=None,
    wants_rounded=False,
):
    """Stream (None without a branch), normed tokens, mean or None, rounded stream or None."""
    channels = weight.shape[0]

    def forward(x, branch, weight, bias):
        outputs = add_norm_forward(
            x,
            branch,
            branch_scale,
            weight,
            bias,
            eps,
            groups,
            round_up(channels),
            out_dtype,
            mean_of,
            stream_dtype,
            wants_rounded,
        )
        return outputs, (x if outputs[0] is None else outputs[0], weight)

    def backward(saved, of_stream, of_normed, of_mean, of_rounded):
        of_mean = None if of_mean is None else of_mean.contiguous()
        width, dtype = (0, None) if branch is None else (branch.shape[2], branch.dtype)
        grad_x, grad_branch, sums = add_norm_backward(
            saved[0],
            branch_scale,
            saved[1],
            of_stream,
            of_rounded,
            of_normed,
            of_mean,
            eps,
            groups,
            mean_of,
            x.shape[2],
            width,
            dtype,
        )
        return grad_x, grad_branch, sums[0], sums[1]

    return differentiable(forward, backward, x, branch, weight, bias)


def layer_norm(x, weight, bias, eps, groups, out_dtype, mean_of):
    """Normed tokens, mean or None."""
    stream, normed, mean, rounded = add_layer_norm(
        x, None, None, weight, bias, eps, groups, out_dtype, mean_of
    )
    assert stream is None and rounded is None
    return normed, mean


def scaled_layer_norm(y, residual, multiplier, scale, weight, bias, eps, out_dtype):
    def forward(*tensors):
        return scaled_norm_forward(*tensors, eps, round_up(weight.shape[0]), out_dtype), tensors

    def backward(saved, of_normed):
        *grads, sums = scaled_norm_backward(*saved[:5], of_normed, eps)
        return (*grads, sums[0], sums[1])

    return differentiable(forward, backward, y, residual, multiplier, scale, weight, bias)


def channel_affinity(mean, *parameters):
    def backward(saved, of_output):
        grads = [None if p is None else torch.empty_like(p) for p in parameters]
        return affinity_backward(*saved, of_output.contiguous(), grads), *grads

    return differentiable(
        lambda *tensors: (affinity_forward(*tensors), tensors), backward, mean, *parameters
    )


class Maker:
    """Random leaves on the device, each with a fp64 twin of the same values."""

    def __init__(self, seed=0):
        self.gen = torch.Generator().manual_seed(seed)
        self.leaves = {}

    def __call__(self, name, *shape, dtype=FP32, shift=0.0, std=1.0, grad=True):
        value = (torch.randn(*shape, generator=self.gen) * std + shift).to(dtype)
        self.leaves[name] = (
            value.to(DEVICE, copy=True).requires_grad_(grad),
            value.double().requires_grad_(grad),
        )
        return self.leaves[name]

    def params(self, channels):
        return self('weight', channels, shift=1.0), self('bias', channels)


def wide(channels, padded):
    """The width of an input, padded if asked for, and then always wider than C."""
    return round_up(channels + 1) if padded else channels


def close(name, actual, expected, tolerance):
    """Relative norm error, and finite."""
    actual = actual.detach().cpu().double()
    assert actual.shape == expected.shape, name
    error = (actual - expected.detach()).norm() / expected.detach().norm().clamp_min(1e-30)
    assert error < tolerance, f'{name}: relative error {error:.1e}'


def compare(maker, outputs, references, tolerances, seed=1):
    """Outputs and the gradients of all leaves, for random gradients of the outputs."""
    gen = torch.Generator().manual_seed(seed)
    grads = []
    for (name, reference), output, tolerance in zip(references.items(), outputs, tolerances):
        channels = reference.shape[-1]
        close(name, output[..., :channels], reference, tolerance)
        assert not output[..., channels:].any(), f'{name}: tail'
        grads.append(torch.randn(output.shape, generator=gen).to(output.dtype))
        if output.dim() == 3:
            assert output.is_contiguous(), name
    leaves = [(n, a, r) for n, (a, r) in maker.leaves.items() if a.requires_grad]
    actual = torch.autograd.grad(outputs, [a for _, a, _ in leaves], [g.to(DEVICE) for g in grads])
    expected = torch.autograd.grad(
        list(references.values()),
        [r for _, _, r in leaves],
        [g.double()[..., : r.shape[-1]] for g, r in zip(grads, references.values())],
    )
    for (name, leaf, _), a, e in zip(leaves, actual, expected):
        assert a.dtype == leaf.dtype, name
        close('gradient of ' + name, a, e, max(max(tolerances), TOLERANCE[leaf.dtype]))
        assert torch.equal(a.cpu()[e == 0], torch.zeros_like(a.cpu()[e == 0])), name  # padding
    return [*outputs, *actual]


def reference_norm(x, weight, bias, eps, groups):
    x = x.unflatten(-1, (groups, -1))
    return F.layer_norm(x, x.shape[-1:], eps=eps).flatten(2) * weight + bias


def check_layer_norm(size, mean_of=0, dtype=FP32, out_dtype=FP32, padded=False):
    batch, length, channels, groups = size
    maker = Maker()
    x = maker('x', batch, length, wide(channels, padded), dtype=dtype, shift=0.5)
    weight, bias = maker.params(channels)
    normed, mean = layer_norm(x[0], weight[0], bias[0], 1e-5, groups, out_dtype, mean_of)
    assert normed.shape == (batch, length, round_up(channels)) and normed.dtype == out_dtype
    tokens = x[1][..., :channels]
    references = {'normed': reference_norm(tokens, weight[1], bias[1], 1e-5, groups)}
    if mean_of:
        references['mean'] = (tokens if mean_of == 1 else references['normed']).mean(1)
        assert mean.dtype == FP32
    else:
        assert mean is None
    outputs = [normed, mean][: len(references)]
    return compare(maker, outputs, references, [TOLERANCE[out_dtype], TOLERANCE[FP32]])


def check_add(
    size,
    mean_of=0,
    dtype=FP32,
    branch_dtype=FP32,
    out_dtype=FP32,
    padded=False,
    scaled=False,
    stream_dtype=None,
    wants_rounded=False,
):
    batch, length, channels, groups = size
    maker = Maker()
    x = maker('x', batch, length, channels, dtype=dtype, shift=0.5)
    branch = maker('branch', batch, length, wide(channels, padded), dtype=branch_dtype)
    scale = maker('branch_scale', batch, grad=False) if scaled else (None, None)
    weight, bias = maker.params(channels)
    stream, normed, mean, rounded = add_layer_norm(
        x[0],
        branch[0],
        scale[0],
        weight[0],
        bias[0],
        1e-6,
        groups,
        out_dtype,
        mean_of,
        stream_dtype,
        wants_rounded,
    )
    stream_dtype = stream_dtype or dtype
    assert stream.dtype == stream_dtype and normed.dtype == out_dtype
    assert normed.shape == (batch, length, round_up(channels))
    added = branch[1][..., :channels]
    references = {'stream': x[1] + (added if scale[1] is None else added * scale[1][:, None, None])}
    references['normed'] = reference_norm(references['stream'], weight[1], bias[1], 1e-6, groups)
    if mean_of:
        references['mean'] = references['stream' if mean_of == 1 else 'normed'].mean(1)
    outputs = [stream, normed, mean][: len(references)]
    worst = max(TOLERANCE[stream_dtype], TOLERANCE[out_dtype])
    tolerances = [TOLERANCE[stream_dtype], worst, TOLERANCE[stream_dtype]][: len(references)]
    if wants_rounded:
        assert rounded.dtype == out_dtype
        outputs.append(rounded)
        references['rounded'] = references['stream']
        tolerances.append(worst)
    else:
        assert rounded is None
    return compare(maker, outputs, references, tolerances)


def check_scaled(
    batch,
    length,
    channels,
    dtype=FP32,
    out_dtype=FP32,
    padded=False,
    residual=True,
    multiplier=True,
):
    maker = Maker()
    y = maker('y', batch, length, wide(channels, padded), dtype=dtype)
    r = maker('residual', batch, length, channels) if residual else (None, None)
    m = (
        maker('multiplier', batch, length, wide(channels, padded), dtype=dtype, shift=0.5)
        if multiplier
        else (None, None)
    )
    scale = maker('scale', batch, channels, shift=1.0)
    weight, bias = maker.params(channels)
    normed = scaled_layer_norm(y[0], r[0], m[0], scale[0], weight[0], bias[0], 1e-5, out_dtype)
    assert normed.shape == (batch, length, round_up(channels)) and normed.dtype == out_dtype
    w = y[1][..., :channels]
    w = w if r[1] is None else w + r[1]
    w = w if m[1] is None else w * m[1][..., :channels]
    w = w * scale[1][:, None]
    references = {'normed': reference_norm(w, weight[1], bias[1], 1e-5, 1)}
    return compare(maker, [normed], references, [TOLERANCE[out_dtype]])


def check_affinity(batch, channels, skip):
    maker = Maker()
    hidden = max(1, channels // 16)
    mean = maker('mean', batch, channels)
    arguments = [
        maker('fc1_weight', hidden, channels, std=channels**-0.5),
        maker('fc1_bias', hidden, shift=1.0),
        maker('fc2_weight', channels, hidden, std=hidden**-0.5),
        maker('fc2_bias', channels),
    ]
    scale = maker('skip_scale', 1, shift=1.0) if skip else (None, 1.0)
    out = channel_affinity(mean[0], *(a for a, _ in arguments), scale[0])
    w1, b1, w2, b2 = (r for _, r in arguments)
    references = {'out': F.linear(F.relu(F.linear(mean[1], w1, b1)), w2, b2).sigmoid() * scale[1]}
    return compare(maker, [out], references, [TOLERANCE[FP32]])


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_layer_norm(size):
    check_layer_norm(size, mean_of=2)


@pytest.mark.parametrize(
    'mean_of, padded, groups', itertools.product([0, 1, 2], [False, True], [1, 2])
)
def test_layer_norm_variants(mean_of, padded, groups):
    check_layer_norm((2, 7, 44, groups), mean_of, padded=padded)


@pytest.mark.parametrize(
    'dtype, out_dtype', [(FP32, BF16), (BF16, BF16), (FP16, FP16), (BF16, FP32)]
)
def test_layer_norm_precisions(dtype, out_dtype):
    check_layer_norm((2, 5, 44, 2), 2, dtype, out_dtype, padded=True)


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_add_layer_norm(size):
    check_add(size, mean_of=1, scaled=True, padded=True)


@pytest.mark.parametrize(
    'mean_of, scaled, padded, groups',
    itertools.product([0, 1, 2], [False, True], [False, True], [1, 2]),
)
def test_add_layer_norm_variants(mean_of, scaled, padded, groups):
    check_add((2, 7, 44, groups), mean_of, scaled=scaled, padded=padded)


@pytest.mark.parametrize(
    'dtype, branch_dtype, out_dtype', [(FP32, BF16, BF16), (BF16, BF16, BF16), (FP32, FP16, FP16)]
)
def test_add_layer_norm_precisions(dtype, branch_dtype, out_dtype):
    check_add((2, 5, 44, 2), 1, dtype, branch_dtype, out_dtype, padded=True, scaled=True)


@pytest.mark.parametrize('mean_of, groups, out_dtype', [(0, 1, FP16), (1, 4, FP16), (2, 4, FP32)])
def test_stream_once_more_in_the_precision_of_products(mean_of, groups, out_dtype):
    check_add(
        (2, 21, 44, groups), mean_of, FP32, out_dtype, out_dtype, scaled=True, wants_rounded=True
    )


@pytest.mark.parametrize('branch_dtype', [FP16, FP32])
@pytest.mark.parametrize('padded, scaled', [(False, False), (True, False), (False, True)])
def test_stream_in_a_precision_of_its_own(branch_dtype, padded, scaled):
    check_add((2, 5, 44, 2), 1, FP32, branch_dtype, FP16, padded, scaled, stream_dtype=FP16)


@pytest.mark.parametrize('length, channels', [(1, 64), (49, 64), (21, 348), (5, 760), (63, 24)])
def test_scaled_layer_norm(length, channels):
    check_scaled(2, length, channels)


@pytest.mark.parametrize('channels', [2200, pytest.param(9000, marks=gpu)])
def test_rows_too_wide_to_load_ahead(channels):
    check_add((1, 3, channels, 1), mean_of=1, scaled=True, padded=True)
    check_scaled(1, 3, channels)


@pytest.mark.parametrize('residual, multiplier, padded', itertools.product([False, True], repeat=3))
def test_scaled_layer_norm_variants(residual, multiplier, padded):
    check_scaled(2, 7, 44, residual=residual, multiplier=multiplier, padded=padded)


@pytest.mark.parametrize('dtype', [BF16, FP16])
def test_scaled_layer_norm_precisions(dtype):
    check_scaled(2, 9, 44, dtype=dtype, out_dtype=dtype, padded=True)


@pytest.mark.parametrize(
    'batch, channels, skip', [(2, 64, True), (3, 348, False), (2, 1024, True), (1, 8, False)]
)
def test_channel_affinity(batch, channels, skip):
    check_affinity(batch, channels, skip)


@pytest.mark.parametrize('outputs', [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize('mean_of', [1, 2])
def test_gradients_of_some_outputs_only(outputs, mean_of):
    maker = Maker()
    x, branch = maker('x', 2, 5, 96), maker('branch', 2, 5, 96)
    weight, bias = maker.params(96)
    result = add_layer_norm(x[0], branch[0], None, weight[0], bias[0], 1e-5, 4, FP32, mean_of)
    stream = x[1] + branch[1]
    normed = reference_norm(stream, weight[1], bias[1], 1e-5, 4)
    expected = (stream, normed, (stream if mean_of == 1 else normed).mean(1))
    # a sum's gradient has strides of zero, a square's has not
    sum(result[i].sum() + result[i].square().sum() for i in outputs).backward()
    sum(expected[i].sum() + expected[i].square().sum() for i in outputs).backward()
    for name, (actual, reference) in maker.leaves.items():
        grad = torch.zeros_like(reference) if reference.grad is None else reference.grad
        close(name, actual.grad, grad, 1e-5)


def test_inputs_that_are_not_contiguous():
    maker = Maker()
    x, branch = maker('x', 2, 9, 96), maker('branch', 2, 9, 104)
    weight, bias = maker.params(96)
    turned = x[0].detach().transpose(1, 2).contiguous().transpose(1, 2)
    cut = branch[0][..., :96]
    expected = add_layer_norm(x[0], cut.contiguous(), None, weight[0], bias[0], 1e-5, 1, FP32, 1)
    actual = add_layer_norm(turned, cut, None, weight[0], bias[0], 1e-5, 1, FP32, 1)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)


def test_twice_the_same_bits():
    for check in (
        lambda: check_layer_norm((1, 33, 44, 4), 2),
        lambda: check_add((1, 33, 44, 1), 1, scaled=True),
        lambda: check_scaled(1, 33, 44),
        lambda: check_affinity(2, 64, True),
    ):
        assert all(torch.equal(a, b) for a, b in zip(check(), check()))


def test_gradients_into_memory_of_the_caller():
    """The rows of parameters' gradients, and a third: of a bias that was added to the stream."""
    stream, grad, of_normed = (torch.randn(2, 9, 44, device=DEVICE) for _ in range(3))
    weight, memory = torch.randn(44, device=DEVICE), torch.zeros(140, device=DEVICE)

    def run(**options):
        return add_norm_backward(
            stream, None, weight, grad, None, of_normed, None, 1e-5, 2, 0, 44, 0, FP32, **options
        )

    plain = run()
    *grads, _sums = run(wants_sum=True, sums=memory[4:136])
    assert torch.equal(grads[0], plain[0]) and grads[1] is None
    assert torch.equal(memory[4:92].view(2, 44), plain[2])
    close('sum', memory[92:136], grad.double().sum((0, 1)).cpu(), 1e-5)
    assert not memory[:4].any() and not memory[136:].any()
    scale = torch.ones(2, 44, device=DEVICE)
    expected = scaled_norm_backward(stream, None, None, scale, weight, of_normed, 1e-5)[-1]
    scaled_norm_backward(stream, None, None, scale, weight, of_normed, 1e-5, sums=memory[4:92])
    assert torch.equal(memory[4:92].view(2, 44), expected)


LARGE = [
    pytest.param(case, marks=gpu)
    for case in [
        (16, 3136, 64, 1),
        (2, 67200, 64, 1),
        (16, 784, 348, 4),
        (8, 196, 1012, 4),
        (3, 4209, 424, 1),
        (128, 49, 448, 1),
    ]
]


@pytest.mark.parametrize('size', LARGE, ids=str)
@pytest.mark.parametrize('branch_dtype', [FP32, BF16])
def test_large(size, branch_dtype):
    check_layer_norm(size, 1, out_dtype=branch_dtype)
    first, second = (
        check_add(
            size,
            2,
            FP32,
            branch_dtype,
            branch_dtype,
            padded=True,
            scaled=True,
            wants_rounded=branch_dtype == BF16,
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    check_scaled(*size[:3], branch_dtype, branch_dtype)


@pytest.mark.parametrize('dummy', [pytest.param(None, marks=gpu)])
def test_more_than_2_to_the_31_values(dummy):
    x = torch.randn(2, 2**21, 520, device=DEVICE, dtype=BF16)  # 4.4 GB
    weight, bias = torch.ones(520, device=DEVICE), torch.zeros(520, device=DEVICE)
    normed, mean = layer_norm(x, weight, bias, 1e-5, 1, BF16, 1)
    last = F.layer_norm(x[-1:, -100:].double(), (520,), eps=1e-5)
    close('normed', normed[-1:, -100:], last.cpu(), 5e-3)
    close('mean', mean, x.double().mean(1).cpu(), 1e-3)
