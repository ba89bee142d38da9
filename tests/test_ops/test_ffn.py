"""FFNs and projections of groups in Triton against PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('triton')

import triton
import triton.language as tl

from groupmamba_mm.ops.depthwise_conv.kernels import by_tap
from groupmamba_mm.ops.ffn.conv import _parts_of_batch, conv_ffn_backward, conv_ffn_forward
from groupmamba_mm.ops.ffn.groups import (
    group_linear_backward,
    group_linear_forward,
    residual_ffn_backward,
    residual_ffn_forward,
)
from groupmamba_mm.ops.ffn.plain import plain_ffn_backward, plain_ffn_forward
from groupmamba_mm.ops.kernel_functions import activate
from groupmamba_mm.ops.sums import column_sums
from tests.kernel_testing import (
    INTERPRETED,
    TOLERANCE,
    assert_near,
    differentiable,
    gpu,
    grid_reference,
    randn,
)

pytestmark = pytest.mark.usefixtures('nan_buffers')


@triton.jit
def _gelu_at(p, value, slope, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    v, s = activate(tl.load(p + at), 'gelu', DTYPE)
    tl.store(value + at, v)
    tl.store(slope + at, s)


def conv_ffn(x, in_weight, in_bias, conv_weight, conv_bias, weight, bias, grid, keep_hidden):
    def forward(*tensors):
        x, in_weight, in_bias, conv_weight, conv_bias, weight, bias = tensors
        middle = (x, in_weight, in_bias, by_tap(conv_weight), conv_bias, weight)
        y, hidden = conv_ffn_forward(*middle, bias, grid)
        return y, (middle, hidden if keep_hidden else None)

    def backward(saved, dy):
        (*middle, weight), hidden = saved
        dy = dy.contiguous()
        din_weight, dweight = torch.empty_like(middle[1]), torch.empty_like(weight)
        # of fewer channels than there are, if the others are padding
        din_bias, dtaps, dconv_bias = (
            torch.empty(t.numel(), device=t.device) for t in (in_bias, conv_weight, conv_bias)
        )
        dx = conv_ffn_backward(
            dy, hidden, *middle, weight, grid, din_weight, dweight, din_bias, dtaps, dconv_bias
        )
        return (
            dx,
            din_weight,
            din_bias,
            dtaps.view(conv_weight.shape),
            dconv_bias,
            dweight,
            column_sums(dy),
        )

    return differentiable(
        forward, backward, x, in_weight, in_bias, conv_weight, conv_bias, weight, bias
    )


def plain_ffn(x, in_weight, in_bias, weight, bias, keep_hidden):
    def forward(*tensors):
        y, hidden = plain_ffn_forward(*tensors, keep_hidden)
        assert (hidden is not None) == keep_hidden
        return y, (tensors[:4], hidden)

    def backward(saved, dy):
        (x, in_weight, in_bias, weight), hidden = saved
        dy = dy.contiguous()
        din_weight, dweight = torch.empty_like(in_weight), torch.empty_like(weight)
        dx, din_bias = plain_ffn_backward(
            dy, hidden, x, in_weight, in_bias, weight, din_weight, dweight
        )
        return dx, din_weight, din_bias, dweight, column_sums(dy)

    return differentiable(forward, backward, x, in_weight, in_bias, weight, bias)


def group_linear(x, weight, *sizes):
    def backward(saved, dy):
        dweight = torch.empty(weight.shape, device=weight.device)
        return group_linear_backward(dy, *saved, *sizes, dweight), dweight

    return differentiable(
        lambda *tensors: (group_linear_forward(*tensors, *sizes), tensors), backward, x, weight
    )


def residual_group_ffn(x, branch, norm_weight, norm_bias, eps, in_weight, in_bias, weight, bias):
    def forward(x, branch, norm_weight, norm_bias, *ffn):
        y, *kept = residual_ffn_forward(x, branch, norm_weight, norm_bias, eps, *ffn, True)
        return y, (kept, norm_weight, ffn)

    def backward(saved, dy):
        kept, norm_weight, ffn = saved
        groups, hidden, width = in_weight.shape
        parts = (hidden * width, hidden, weight.shape[1] * hidden)
        vectors = torch.empty(3, norm_weight.shape[0], device=dy.device)
        rows = torch.empty(groups, sum(parts), device=dy.device)
        ds = residual_ffn_backward(dy, *kept, norm_weight, eps, *ffn[:3], vectors, rows)
        of_in_weight, of_in_bias, of_weight = rows.split(parts, dim=1)
        dbranch = F.pad(ds, (0, branch.shape[2] - ds.shape[2]))
        return (
            ds,
            dbranch,
            vectors[0],
            vectors[1],
            of_in_weight.reshape(in_weight.shape),
            of_in_bias,
            of_weight.reshape(weight.shape),
            vectors[2].view(bias.shape),
        )

    return differentiable(
        forward, backward, x, branch, norm_weight, norm_bias, in_weight, in_bias, weight, bias
    )


def ffn_inputs(device, dtype, batch, grid, channels, outputs):
    """Tokens, then weight and bias of the first layer, the convolution and the last layer."""
    shapes = (
        (batch, grid[0] * grid[1], outputs),
        (channels, outputs),
        (channels,),
        (channels, 1, 3, 3),
        (channels,),
        (outputs, channels),
        (outputs,),
    )
    return [
        randn(i, device, torch.float32 if i in (3, 4) else dtype, *shape).requires_grad_()
        for i, shape in enumerate(shapes)
    ]


def plain_ffn_inputs(device, dtype, batch, length, inputs, channels, outputs, biases=None):
    """Tokens, then weight and bias of both layers, the biases in a dtype of their own if given."""
    shapes = (
        (batch, length, inputs),
        (channels, inputs),
        (channels,),
        (outputs, channels),
        (outputs,),
    )
    dtypes = (dtype, dtype, biases or dtype, dtype, biases or dtype)
    return [
        randn(i, device, dt, *shape).requires_grad_()
        for i, (dt, shape) in enumerate(zip(dtypes, shapes))
    ]


def check_operator(operator, reference, inputs, dtype, tolerance=None):
    """Output and all gradients; the output's gradient has a stride of zero, as a mean's has."""
    tolerance = tolerance or TOLERANCE[dtype]
    truth = [t.detach().double().requires_grad_() for t in inputs]
    expected, y = reference(*truth), operator(*inputs)
    assert y.dtype == dtype
    assert_near('y', y.detach(), expected.detach(), tolerance)
    dy = randn(9, y.device, dtype, y.shape[0], 1, y.shape[2]).expand_as(y)
    exact = torch.autograd.grad(expected, truth, dy.double())
    for i, gradient in enumerate(torch.autograd.grad(y, inputs, dy)):
        assert gradient.dtype == inputs[i].dtype
        assert_near(f'gradient of argument {i}', gradient, exact[i], tolerance)


@pytest.mark.parametrize('keep_hidden', [False, True])
@pytest.mark.parametrize(
    'dtype, batch, grid, channels, outputs',
    [
        (torch.float32, 2, (3, 5), 12, 3),
        (torch.float32, 1, (1, 1), 1, 1),
        (torch.bfloat16, 2, (4, 3), 32, 8),
    ],
)
def test_conv_ffn(device, dtype, batch, grid, channels, outputs, keep_hidden):
    def reference(x, in_weight, in_bias, conv_weight, conv_bias, weight, bias):
        h = F.linear(x, in_weight, in_bias)
        return F.linear(grid_reference(h, conv_weight, conv_bias, grid, 'gelu'), weight, bias)

    check_operator(
        lambda *args: conv_ffn(*args, grid, keep_hidden),
        reference,
        ffn_inputs(device, dtype, batch, grid, channels, outputs),
        dtype,
    )


@pytest.mark.parametrize('keep_hidden', [False, True])
@pytest.mark.parametrize('images', [1, 2])
def test_conv_ffn_backward_in_parts(device, images, keep_hidden, monkeypatch):
    """Three images, one or two at once: the gradients are those of all of them."""
    from groupmamba_mm.ops.ffn import conv

    inputs = ffn_inputs(device, torch.float32, 3, (3, 5), 12, 3)
    dy = randn(7, device, torch.float32, 3, 15, 3)
    whole = torch.autograd.grad(conv_ffn(*inputs, (3, 5), keep_hidden), inputs, dy)
    monkeypatch.setattr(conv, '_PART', images * 15 * 12 * 4)
    parts = list(_parts_of_batch(torch.empty(3, 15, 12)))
    assert [len(range(3)[part]) for part in parts] == ([1, 1, 1] if images == 1 else [2, 1])
    parts = torch.autograd.grad(conv_ffn(*inputs, (3, 5), keep_hidden), inputs, dy)
    for i, (got, expected) in enumerate(zip(parts, whole)):
        assert_near(f'gradient of argument {i}', got, expected.double(), 1e-6)


@pytest.mark.parametrize('images', [1, 3])
def test_conv_ffn_of_padded_channels(device, images, monkeypatch):
    """The gradients that lie as the parameters do, without what is padding."""
    from groupmamba_mm.ops.ffn import conv

    monkeypatch.setattr(conv, '_PART', images * 15 * 16 * 4)
    inputs = [t.detach() for t in ffn_inputs(device, torch.float32, 3, (3, 5), 10, 4)]
    dy = randn(7, device, torch.float32, 3, 15, 4)
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(conv_ffn(*leaves, (3, 5), True), leaves, dy)
    x, in_weight, in_bias, conv_weight, conv_bias, weight, bias = inputs
    in_weight, weight = F.pad(in_weight, (0, 0, 0, 6)), F.pad(weight, (0, 6))
    in_bias, conv_bias = F.pad(in_bias, (0, 6)), F.pad(conv_bias, (0, 6))
    taps = F.pad(by_tap(conv_weight), (0, 6))
    _y, hidden = conv_ffn_forward(x, in_weight, in_bias, taps, conv_bias, weight, bias, (3, 5))
    got = [
        torch.empty_like(in_weight),
        torch.empty_like(weight),
        *(torch.empty(n, device=device) for n in (10, 90, 10)),
    ]
    dx = conv_ffn_backward(dy, hidden, x, in_weight, in_bias, taps, conv_bias, weight, (3, 5), *got)
    assert not got[0][10:].any() and not got[1][:, 10:].any()
    got = [dx, got[0][:10], got[2], got[3].view(10, 1, 3, 3), got[4], got[1][:, :10]]
    for i, (ours, theirs) in enumerate(zip(got, expected)):
        assert_near(f'gradient of argument {i}', ours, theirs.double(), 1e-6)


def check_plain_ffn(device, dtype, sizes, keep_hidden, biases=None):
    check_operator(
        lambda *args: plain_ffn(*args, keep_hidden),
        lambda x, in_weight, in_bias, *rest: F.linear(
            F.gelu(F.linear(x, in_weight, in_bias)), *rest
        ),
        plain_ffn_inputs(device, dtype, *sizes, biases),
        dtype,
    )


@pytest.mark.parametrize('dtype, tolerance', [('fp32', 3e-7), ('fp16', 1.5e-6)])
def test_gelu_and_its_gradient_are_right_at_every_point(device, dtype, tolerance):
    size = torch.cat([torch.linspace(0, 20, 4093), torch.tensor([1e3, 1e18, 1e30])])
    p = torch.cat([size, -size]).to(device)
    value, slope = torch.empty_like(p), torch.empty_like(p)
    _gelu_at[(1,)](p, value, slope, DTYPE=getattr(tl, 'float' + dtype[2:]), COUNT=p.numel())
    truth = p.double().requires_grad_()
    F.gelu(truth).sum().backward()
    for got, wanted in ((value, F.gelu(truth)), (slope, truth.grad)):
        assert ((got - wanted).abs() / wanted.abs().clamp(min=1)).max() < tolerance


@pytest.mark.parametrize('keep_hidden', [False, True])
@pytest.mark.parametrize('sizes', [(2, 70, 24, 72, 40), (1, 130, 264, 136, 8)])
def test_plain_ffn_with_biases_of_higher_precision(device, sizes, keep_hidden):
    check_plain_ffn(device, torch.bfloat16, sizes, keep_hidden, torch.float32)


@pytest.mark.parametrize('keep_hidden', [False, True])
@pytest.mark.parametrize(
    'dtype, sizes',
    [
        (torch.float32, (2, 63, 12, 72, 4)),
        (torch.bfloat16, (1, 1, 1, 1, 1)),
        (torch.bfloat16, (2, 70, 24, 72, 40)),  # tiles that no tensor fills
        (torch.float16, (1, 130, 16, 128, 96)),
        (torch.bfloat16, (1, 130, 264, 136, 8)),  # wider than what goes into one kernel
    ],
)
def test_plain_ffn(device, dtype, sizes, keep_hidden):
    check_plain_ffn(device, dtype, sizes, keep_hidden)


@pytest.mark.parametrize('sizes', [(2, 70, 24, 72, 40), (1, 130, 96, 64, 8)])
def test_whole_ffn_in_one_kernel(device, sizes, monkeypatch):
    from groupmamba_mm.ops.ffn import hidden

    if not hidden.fits(torch.empty(1, dtype=torch.bfloat16, device=device), 96):
        pytest.skip('the GPU has less shared memory than the kernel takes')
    monkeypatch.setattr(hidden, '_PROGRAMS', 2)  # no more are wanted
    calls = []
    run = hidden._run
    monkeypatch.setattr(hidden, '_run', lambda *args: calls.append(len(args)) or run(*args))
    check_plain_ffn(device, torch.bfloat16, sizes, keep_hidden=False)
    assert calls == [6, 5]  # with the last bias, and the backward pass


def check_group_linear(
    device, dtype, batch, length, groups, width, channels, parts, stored, padding=0
):
    def reference(x, weight):
        x = x[..., : groups * width].unflatten(-1, (groups, width))
        y = torch.einsum('blgi,gpci->blpgc', x, weight.unflatten(1, (parts, channels)))
        return F.pad(y, (0, stored - channels)).flatten(2)

    inputs = [
        randn(0, device, dtype, batch, length, groups * width + padding).requires_grad_(),
        randn(1, device, dtype, groups, parts * channels, width).requires_grad_(),
    ]

    def aligned(x, weight):
        return group_linear(x, F.pad(weight, (0, -width % 8)), width, parts, stored)

    check_operator(
        lambda x, weight: group_linear(x, weight, width, parts, stored), reference, inputs, dtype
    )
    check_operator(aligned, reference, inputs, dtype)


@pytest.mark.parametrize(
    'dtype, sizes',
    [
        (torch.bfloat16, (2, 9, 3, 5, 7, 2, 8, 1)),
        (torch.bfloat16, (2, 70, 2, 24, 72, 2, 72)),
        (torch.bfloat16, (1, 130, 3, 11, 21, 3, 24, 7)),
        (torch.float16, (1, 1, 4, 16, 16, 1, 16)),
    ],
)
def test_group_linear(device, dtype, sizes):
    check_group_linear(device, dtype, *sizes)


@pytest.mark.parametrize('kib, widest', [(227, 256), (163, 256), (99, 160)])
def test_projections_that_fit_into_shared_memory(monkeypatch, kib, widest):
    from groupmamba_mm.ops.ffn import groups

    monkeypatch.setattr(groups, 'shared_memory', lambda device: kib * 1024)
    assert [
        width
        for width in range(8, 300, 8)
        if groups.fits_projection(torch.bfloat16, width, torch.device('cpu'))
    ] == list(range(8, widest + 1, 8))


@pytest.mark.parametrize('fits, widest', [('fits_ffn', 192), ('fits_projection', 256)])
def test_what_has_kernels_of_groups(fits, widest):
    from groupmamba_mm.ops.ffn import groups

    cpu, fits = torch.device('cpu'), getattr(groups, fits)
    for dtype in (torch.bfloat16, torch.float16):
        assert fits(dtype, widest, cpu) and not fits(dtype, widest + 1, cpu)
    assert not fits(torch.float32, 8, cpu)


def test_group_linear_without_tokens(device):
    x = torch.zeros(0, 4, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(2, 6, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = group_linear(x, weight, 8, 2, 8)
    y.sum().backward()
    assert y.shape == (0, 4, 32)
    assert x.grad.shape == x.shape and (weight.grad == 0).all()


def residual_ffn_inputs(
    device, dtype, batch, length, groups, width, hidden, stream=None, padding=0, biases=None
):
    """Tokens, branch, then weight and bias of the norm and of the layers of all groups.

    The layers' weights are as large as trained ones: sums of large ones leave what fp16 holds.
    """
    channels = groups * width
    shapes = (
        (batch, length, channels),
        (batch, length, channels + padding),
        (channels,),
        (channels,),
        (groups, hidden, width),
        (groups, hidden),
        (groups, width, hidden),
        (groups, width),
    )
    dtypes = (
        stream or dtype,
        dtype,
        torch.float32,
        torch.float32,
        dtype,
        biases or dtype,
        dtype,
        biases or dtype,
    )
    drawn = [randn(i, device, dt, *shape) for i, (dt, shape) in enumerate(zip(dtypes, shapes))]
    return [
        (t / t.shape[2] ** 0.5 if t.dim() == 3 and i > 1 else t).requires_grad_()
        for i, t in enumerate(drawn)
    ]


def check_residual_ffn(device, dtype, *sizes, is_aligned=False, **options):
    def reference(x, branch, norm_weight, norm_bias, in_weight, in_bias, weight, bias):
        s = (x + branch[..., : x.shape[-1]]).unflatten(-1, (in_weight.shape[0], -1))
        n = F.layer_norm(s, s.shape[-1:], eps=1e-5).flatten(2) * norm_weight + norm_bias
        h = F.gelu(torch.einsum('blgi,gci->blgc', n.view_as(s), in_weight) + in_bias)
        return (s + torch.einsum('blgc,goc->blgo', h, weight) + bias).flatten(2)

    def operator(x, branch, norm_weight, norm_bias, in_weight, *rest):
        if is_aligned:
            in_weight = F.pad(in_weight, (0, -in_weight.shape[2] % 8))
        return residual_group_ffn(x, branch, norm_weight, norm_bias, 1e-5, in_weight, *rest)

    # three tensors are rounded one after the other, which the interpreter does downwards
    tolerance = 1.5e-2 if INTERPRETED and dtype == torch.bfloat16 else TOLERANCE[dtype]
    inputs = residual_ffn_inputs(device, dtype, *sizes, **options)
    check_operator(operator, reference, inputs, dtype, tolerance)
    with torch.no_grad():
        y, *kept = residual_ffn_forward(*inputs[:4], 1e-5, *inputs[4:], False)
        assert kept == [None, None]
        assert_near('y, nothing kept', y, reference(*(t.double() for t in inputs)), tolerance)


@pytest.mark.parametrize(
    'dtype, sizes, options',
    [
        (torch.bfloat16, (2, 9, 3, 5, 7), {}),
        (torch.bfloat16, (2, 70, 2, 24, 72), {}),  # blocks and tiles that no tensor fills
        (torch.bfloat16, (1, 130, 3, 11, 24), dict(stream=torch.float32, padding=7)),
        (torch.float16, (1, 1, 4, 16, 16), dict(stream=torch.float32)),
        (torch.bfloat16, (2, 9, 3, 5, 7), dict(is_aligned=True)),
        (torch.bfloat16, (1, 130, 3, 11, 24), dict(is_aligned=True, biases=torch.float32)),
        (torch.float16, (1, 3, 1, 180, 16), dict(biases=torch.float32)),  # nearly the widest
    ],
)
def test_residual_ffn(device, dtype, sizes, options):
    check_residual_ffn(device, dtype, *sizes, **options)


@pytest.mark.parametrize('programs', [1, 7, 1000])
def test_residual_ffn_by_any_number_of_programs(device, programs, monkeypatch):
    from groupmamba_mm.ops.ffn import groups

    monkeypatch.setattr(groups, '_PROGRAMS', programs)
    check_residual_ffn(device, torch.bfloat16, 3, 180, 2, 16, 80)


def test_residual_ffn_without_tokens(device):
    inputs = residual_ffn_inputs(device, torch.bfloat16, 0, 4, 2, 8, 16)
    residual_group_ffn(*inputs[:4], 1e-5, *inputs[4:]).sum().backward()
    assert inputs[0].grad.shape == inputs[0].shape
    assert all((t.grad == 0).all() for t in inputs)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_ffns_repeat_bit_by_bit(device, dtype):
    def gradients(operator, inputs, *rest):
        y = operator(*inputs, *rest)
        return y, *torch.autograd.grad(y, inputs, randn(9, device, y.dtype, *y.shape))

    cases = [
        (conv_ffn, ffn_inputs(device, dtype, 2, (3, 5), 12, 4), (3, 5), False),
        (plain_ffn, plain_ffn_inputs(device, dtype, 2, 70, 8, 24, 8), False),
    ]
    if dtype != torch.float32:
        cases.append(
            (
                lambda *t: residual_group_ffn(*t[:4], 1e-5, *t[4:]),
                residual_ffn_inputs(device, dtype, 2, 70, 2, 8, 16),
            )
        )
    for case in cases:
        assert all(torch.equal(a, b) for a, b in zip(gradients(*case), gradients(*case)))


@pytest.mark.parametrize(
    'dtype, sizes',
    [
        pytest.param(torch.bfloat16, (8, 3136, 96, 768, 96), marks=gpu),
        pytest.param(torch.float16, (2, 777, 192, 1536, 192), marks=gpu),
        pytest.param(torch.bfloat16, (2, 8449, 192, 384, 192), marks=gpu),  # all in one kernel
        pytest.param(torch.bfloat16, (4, 4225, 128, 1000, 120), marks=gpu),
        pytest.param(torch.bfloat16, (3, 61, 256, 520, 256), marks=gpu),
        pytest.param(torch.bfloat16, (4, 196, 368, 768, 368), marks=gpu),
    ],
)
@pytest.mark.parametrize('keep_hidden', [False, True])
def test_plain_ffn_at_full_size(device, dtype, sizes, keep_hidden):
    check_plain_ffn(device, dtype, sizes, keep_hidden)


@pytest.mark.parametrize(
    'dtype, sizes',
    [
        pytest.param(torch.bfloat16, (8, 3136, 4, 32, 64, 2, 64), marks=gpu),
        pytest.param(torch.bfloat16, (128, 196, 4, 92, 184, 2, 184), marks=gpu),
        pytest.param(torch.bfloat16, (16, 196, 4, 124, 248, 2, 248), marks=gpu),
        pytest.param(torch.float16, (16, 49, 4, 190, 380, 2, 384), marks=gpu),
        pytest.param(torch.bfloat16, (16, 49, 4, 253, 506, 2, 512, 4), marks=gpu),
    ],
)
def test_group_linear_at_full_size(device, dtype, sizes):
    check_group_linear(device, dtype, *sizes)


@pytest.mark.parametrize(
    'dtype, sizes',
    [
        pytest.param(torch.bfloat16, (8, 3136, 4, 32, 64), marks=gpu),
        pytest.param(torch.float16, (4, 777, 4, 48, 96), marks=gpu),
        pytest.param(torch.bfloat16, (128, 196, 4, 92, 184), marks=gpu),
        pytest.param(torch.bfloat16, (16, 196, 4, 124, 248), marks=gpu),
        pytest.param(torch.bfloat16, (16, 49, 4, 190, 380), marks=gpu),
    ],
)
@pytest.mark.parametrize('is_aligned', [False, True])
def test_residual_ffn_at_full_size(device, dtype, sizes, is_aligned):
    check_residual_ffn(
        device,
        dtype,
        *sizes,
        stream=torch.float32,
        is_aligned=is_aligned,
        biases=torch.float32 if is_aligned else None,
    )  # as in the blocks
