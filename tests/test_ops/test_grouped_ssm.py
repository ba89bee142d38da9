"""The fused scan: Triton kernels against plain PyTorch in fp64, outputs and every gradient.

The same tests run on a GPU, or at the same small sizes in Triton's interpreter; what only a GPU can
do in reasonable time carries the marker ``gpu``.
"""

import pytest
import torch

from groupmamba_mm.ops import DIRECTIONS, MIRRORED_DIRECTIONS, grouped_ssm
from groupmamba_mm.ops.selective_scan.directions import direction_code
from tests.kernel_testing import gpu, needs_triton

pytestmark = [needs_triton, pytest.mark.usefixtures('nan_buffers')]

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

#: Allowed error, as norm of the difference over norm of the truth. The interpreter truncates to
#: bf16 where a GPU rounds.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 5e-3 if DEVICE == 'cuda' else 1e-2,
}


def make_inputs(
    batch,
    grid,
    channels,
    stored=None,
    d_state=1,
    groups=4,
    gated=True,
    norm=True,
    conv='none',
    dtype=torch.float32,
    seed=0,
):
    """Arguments by name, in sizes as a trained layer has them; rows padded to ``stored``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    stored = stored or channels
    dt_rank = -(-channels // 16)
    xz = torch.zeros(batch, grid[0] * grid[1], 2 if gated else 1, groups, stored)
    xz[..., :channels] = draw(*xz.shape[:-1], channels)
    total = groups * channels
    tensors = dict(
        xz=xz.flatten(2),
        x_proj_weight=draw(groups, dt_rank + 2 * d_state, channels) / channels**0.5,
        dt_proj_weight=0.3 * draw(groups, channels, dt_rank),
        dt_proj_bias=draw(groups, channels) - 4,
        A_log=0.5 * draw(groups, channels, d_state),
        D=1 + 0.1 * draw(total),
    )
    if norm:
        tensors.update(norm_weight=1 + 0.1 * draw(total), norm_bias=0.1 * draw(total))
    if conv != 'none':
        shape = (total, 1, 3, 3) if conv == 'grid' else (total, 1, 3)
        tensors.update(conv_weight=0.3 * draw(*shape), conv_bias=0.1 * draw(total))
    return {
        name: t.to(DEVICE, dtype if name == 'xz' else torch.float32) for name, t in tensors.items()
    }


def run(tensors, backend, dtype=None, **options):
    """Output and gradients by name, with a fixed gradient of the output, zero in padded lanes."""
    leaves = {
        name: t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
        for name, t in tensors.items()
    }
    y = grouped_ssm(**leaves, backend=backend, **options)
    channels = leaves['dt_proj_bias'].shape[1]
    groups = leaves['dt_proj_bias'].shape[0]
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    gradient.unflatten(-1, (groups, -1))[..., channels:] = 0
    y.backward(gradient.to(tensors['xz'].dtype).to(y.dtype))
    return {'y': y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def assert_near(results, truth, tolerance, floor=1e-6):
    """Relative errors within the tolerance. The gradient of A_log vanishes for one token and for
    large dt, as a difference of numbers of size one for each token: the floor is for that."""
    for name, expected in truth.items():
        got = results[name].double()
        scale = expected.norm().item()
        error = (got - expected).norm().item()
        assert error <= tolerance * scale + floor, f'{name}: {error / max(scale, 1e-30):.1e}'


def check(grid, directions=DIRECTIONS, **options):
    tensors = make_inputs(options.pop('batch', 1), grid, groups=len(directions), **options)
    scan = dict(grid=grid, directions=directions, gated=options.get('gated', True))
    tolerance = TOLERANCE[options.get('dtype', torch.float32)]
    if 'conv_weight' in tensors and options.get('dtype') == torch.bfloat16:
        # its output is stored in bf16: rounding that, and nothing else, of the fp64 reference moves
        # the gradient of dt_proj by up to 7.6e-3 at these sizes
        tolerance = max(tolerance, 1e-2)
    assert_near(
        run(tensors, 'triton', **scan), run(tensors, 'torch', torch.float64, **scan), tolerance
    )


@pytest.mark.parametrize(
    'grid, options',
    [
        ((3, 5), dict(channels=6)),
        ((3, 5), dict(channels=6, stored=8, batch=2, conv='grid')),
        ((5, 4), dict(channels=5, stored=8, conv='causal', norm=False)),
        ((1, 1), dict(channels=4)),
        ((7, 1), dict(channels=4, norm=False, gated=False)),
        ((2, 3), dict(channels=4, d_state=3)),
        ((2, 3), dict(channels=20, dtype=torch.bfloat16)),
        ((2, 3), dict(channels=4, dtype=torch.float16)),
        ((4, 3), dict(channels=4, directions=('bottom-top', 'left-right'))),
        ((3, 4), dict(channels=4, directions=MIRRORED_DIRECTIONS)),
        ((2, 3), dict(channels=5, conv='causal', norm=False, directions=MIRRORED_DIRECTIONS)),
        ((3, 2), dict(channels=133, stored=136, norm=False, directions=('top-bottom',))),
    ],
    ids=str,
)
def test_agrees_with_plain_pytorch(grid, options):
    check(grid, **options)


def test_sequence_cut_into_segments(monkeypatch):
    from groupmamba_mm.ops.grouped_ssm import launch

    monkeypatch.setattr(launch, 'SHORTEST_SEGMENT', 20)
    tensors = make_inputs(1, (11, 7), 4, d_state=2, groups=1)
    scan = launch.Scan(11, 7, 1, 4, 4, 1, 2, 0, 1e-5, True)
    assert scan.segments(1, training=True)[1] > 2
    options = dict(grid=(11, 7), directions=('right-left',))
    assert_near(
        run(tensors, 'triton', **options), run(tensors, 'torch', torch.float64, **options), 1e-5
    )


@pytest.mark.parametrize('change', ['strong decay', 'large dt', 'tiny dt'])
def test_extreme_parameters(change):
    tensors = make_inputs(1, (4, 9), 4, groups=1)
    if change == 'strong decay':
        tensors['A_log'] += 6  # products of the decays underflow to zero
    else:
        tensors['dt_proj_bias'] += 30 if change == 'large dt' else -9
    options = dict(grid=(4, 9), directions=('top-bottom',))
    # large dt: 144 numbers of size one, each rounded at 6e-8, add up to next to nothing
    assert_near(
        run(tensors, 'triton', **options),
        run(tensors, 'torch', torch.float64, **options),
        1e-5,
        floor=1e-5 if change == 'large dt' else 1e-6,
    )


def test_large_weights(monkeypatch):
    """The branches that they take, at a size that the interpreter can do."""
    from groupmamba_mm.ops.grouped_ssm import launch

    monkeypatch.setattr(launch, 'LARGE_WEIGHTS', 1)
    scan = launch.Scan(2, 3, 4, 4, 4, 1, 2, 0, 1e-5, True)
    constants = scan.constants(torch.float32, has_room=True, training=True)
    assert constants['RELOAD_WEIGHTS'] and constants['DOT'] == launch.DOT_TF32X3
    check((2, 3), channels=4, d_state=2, conv='causal')


@pytest.fixture
def split_groups(monkeypatch):
    """Groups as narrow as the interpreter can do take the way of wide ones, in tiles of 4."""
    from groupmamba_mm.ops.grouped_ssm import launch

    narrow = launch.SHORTEST_SIDE
    monkeypatch.setattr(launch, 'WIDEST_WHOLE', narrow)
    monkeypatch.setattr(launch, 'WIDEST_WHOLE_BACKWARD', narrow)
    monkeypatch.setattr(launch, 'TILE_CHANNELS', narrow)
    monkeypatch.setattr(
        launch, 'PROJECT_BACKWARD_TILE', dict(launch.PROJECT_BACKWARD_TILE, BD=narrow)
    )
    return narrow


@pytest.mark.parametrize(
    'grid, options',
    [
        ((3, 5), dict(more=1, conv='causal')),
        ((3, 2), dict(more=4, gated=False, batch=2)),
        ((2, 3), dict(more=1, d_state=3, directions=('bottom-top', 'left-right'))),
        ((2, 5), dict(more=13, dtype=torch.bfloat16, directions=('right-left',))),
        ((2, 3), dict(more=2, dtype=torch.float16, d_state=3, directions=('top-bottom',))),
        ((1, 1), dict(more=1)),
    ],
    ids=str,
)
def test_split_groups(split_groups, grid, options):
    from groupmamba_mm.ops.grouped_ssm import launch

    channels = split_groups + options['more']
    stored = launch.round_up(channels)
    assert launch.Scan(*grid, 4, channels, stored, 1, 1, 0, 1e-5, False).tiles(False) > 1
    options = {name: value for name, value in options.items() if name != 'more'}
    check(grid, channels=channels, stored=stored, norm=False, **options)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('conv', ['none', 'causal'])
def test_groups_that_are_split_in_one_pass_only(split_groups, monkeypatch, dtype, conv):
    from groupmamba_mm.ops.grouped_ssm import launch

    monkeypatch.setattr(launch, 'WIDEST_WHOLE_BACKWARD', 2 * split_groups)
    monkeypatch.setattr(launch, 'SHORTEST_SEGMENT', 8)
    channels = split_groups + 1
    scan = launch.Scan(5, 7, 1, channels, channels, 1, 2, 0, 1e-5, False)
    assert (scan.tiles(False), scan.tiles(True)) == (2, 1)
    check((5, 7), ('right-left',), channels=channels, d_state=2, norm=False, dtype=dtype, conv=conv)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_split_groups_cut_into_segments(split_groups, monkeypatch, dtype):
    from groupmamba_mm.ops.grouped_ssm import launch

    monkeypatch.setattr(launch, 'SHORTEST_SEGMENT', 8)
    channels = split_groups + 1
    scan = launch.Scan(5, 7, 1, channels, channels, 1, 2, 0, 1e-5, False)
    assert scan.segments(1, training=True)[1] > 2
    check((5, 7), ('right-left',), channels=channels, d_state=2, norm=False, dtype=dtype)


def test_split_groups_write_every_element_the_same_twice(split_groups, monkeypatch):
    tensors = make_inputs(
        1, (2, 3), split_groups + 1, stored=2 * split_groups, norm=False, dtype=torch.bfloat16
    )
    options = dict(grid=(2, 3), directions=DIRECTIONS)
    first, second = (run(tensors, 'triton', **options) for _ in range(2))
    monkeypatch.undo()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_near(first, run(tensors, 'torch', torch.float64, **options), TOLERANCE[torch.bfloat16])
    for name, groups in dict(y=(4,), xz=(2, 4)).items():
        padding = first[name].unflatten(-1, (*groups, -1))[..., split_groups + 1 :]
        assert padding.eq(0).all()


@pytest.mark.parametrize(
    'channels, dt_rank, has_room, reloads',
    [(87, 6, False, False), (87, 6, True, False), (380, 12, False, True), (380, 12, True, False)],
)
def test_gpus_with_less_shared_memory_reload_large_weights(
    monkeypatch, channels, dt_rank, has_room, reloads
):
    from groupmamba_mm.ops.grouped_ssm import launch

    monkeypatch.setitem(launch._DOT, torch.bfloat16, launch.DOT_BF16)  # as on a GPU
    scan = launch.Scan(
        7, 7, 4, channels, channels, dt_rank, 1, direction_code(DIRECTIONS), 1e-5, True
    )
    constants = scan.constants(torch.bfloat16, has_room, training=True, backward=True)
    assert constants['RELOAD_WEIGHTS'] == reloads
    assert not reloads or constants['STAGES'] == 1


def test_channels_that_do_not_lie_side_by_side():
    """As PyTorch's own depthwise convolution leaves them on a GPU."""
    tensors = make_inputs(2, (3, 4), 6, gated=False)
    tensors['xz'] = tensors['xz'].transpose(1, 2).contiguous().transpose(1, 2)
    options = dict(grid=(3, 4), directions=DIRECTIONS, gated=False)
    leaf = tensors['xz'].clone(memory_format=torch.preserve_format)
    assert leaf.stride(-1) != 1
    y = grouped_ssm(**{**tensors, 'xz': leaf.requires_grad_()}, backend='triton', **options)
    y.square().sum().backward()
    truth = {name: t.double() for name, t in tensors.items()}
    expected = grouped_ssm(
        **{**truth, 'xz': truth['xz'].requires_grad_()}, backend='torch', **options
    )
    expected.square().sum().backward()
    assert_near(
        {'y': y.detach(), 'xz': leaf.grad}, {'y': expected.detach(), 'xz': truth['xz'].grad}, 1e-5
    )


def test_empty_batch():
    tensors = make_inputs(0, (3, 4), 6, stored=8, conv='grid')
    results = run(tensors, 'triton', grid=(3, 4), directions=DIRECTIONS)
    assert results['y'].shape == (0, 12, 32)
    assert not any(t.any() for t in results.values())


def test_same_bits_twice():
    tensors = make_inputs(2, (3, 4), 6, stored=8, conv='grid')
    options = dict(grid=(3, 4), directions=DIRECTIONS)
    first, second = (run(tensors, 'triton', **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_padded_lanes_are_written():
    tensors = make_inputs(1, (3, 5), 5, stored=8, conv='grid')
    options = dict(grid=(3, 5), directions=DIRECTIONS)
    truth = run(tensors, 'torch', torch.float64, **options)
    results = run(tensors, 'triton', **options)
    assert_near(results, truth, 1e-5)
    assert results['y'].unflatten(-1, (4, 8))[..., 5:].eq(0).all()
    assert results['xz'].unflatten(-1, (2, 4, 8))[..., 5:].eq(0).all()


def test_operator_passes_opcheck():
    from groupmamba_mm.ops.grouped_ssm.operators import grouped_ssm_op

    t = {
        name: tensor.requires_grad_()
        for name, tensor in make_inputs(1, (2, 2), 4, groups=1, conv='grid').items()
    }
    args = (
        t['xz'],
        t['x_proj_weight'],
        t['dt_proj_weight'],
        t['dt_proj_bias'],
        t['A_log'],
        t['D'],
        t['norm_weight'],
        t['norm_bias'],
        t['conv_weight'],
        t['conv_bias'],
    )
    torch.library.opcheck(grouped_ssm_op, (*args, 0, 2, 2, True, 1e-5, True))


def test_operator_of_split_groups_passes_opcheck(split_groups):
    from groupmamba_mm.ops.grouped_ssm.operators import grouped_ssm_op

    t = {
        name: tensor.requires_grad_()
        for name, tensor in make_inputs(1, (2, 2), split_groups + 1, groups=1, norm=False).items()
    }
    args = (
        t['xz'],
        t['x_proj_weight'],
        t['dt_proj_weight'],
        t['dt_proj_bias'],
        t['A_log'],
        t['D'],
        None,
        None,
        None,
        None,
    )
    torch.library.opcheck(grouped_ssm_op, (*args, 0, 2, 2, True, 1e-5, True))


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(grid=(3, 3)), r'L = 9 tokens of the grid \(3, 3\)'),
        (dict(directions=DIRECTIONS[:2]), '2 directions for 4 groups'),
        (dict(directions=('left',) * 4), "unknown scan direction 'left'"),
        (dict(D=torch.zeros(3)), r'D must have shape \(16,\), got \(3,\)'),
        (dict(norm_bias=None), 'come in pairs'),
        (dict(conv_weight=torch.zeros(3, 1, 3, 3), conv_bias=torch.zeros(3)), '16 channels, got 3'),
        (dict(backend='cuda'), "unknown backend 'cuda'"),
        (dict(xz=torch.zeros(1, 6, 20)), 'xz has 20 channels; 8 times at least 4'),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = dict(make_inputs(1, (2, 3), 4), grid=(2, 3), directions=DIRECTIONS)
    with pytest.raises(ValueError, match=message):
        grouped_ssm(**{**arguments, **change})


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    'grid, options',
    [
        pytest.param(grid, options, marks=gpu)
        for grid, options in [
            ((56, 56), dict(batch=2, channels=16, conv='grid')),
            ((28, 28), dict(batch=2, channels=32, conv='grid')),
            ((14, 14), dict(batch=2, channels=87, stored=88, conv='grid')),
            ((14, 14), dict(batch=2, channels=106, stored=112, conv='grid')),
            ((7, 7), dict(batch=3, channels=112, conv='grid')),
            ((56, 57), dict(batch=2, channels=48, conv='causal', norm=False)),
            ((28, 29), dict(batch=2, channels=92, stored=96, conv='causal', norm=False)),
            ((14, 15), dict(batch=2, channels=184, conv='causal', norm=False)),
            ((7, 7), dict(batch=2, channels=506, stored=512, conv='causal', norm=False)),
            ((200, 336), dict(channels=16, conv='grid')),
            ((17, 63), dict(channels=16, d_state=16)),
            ((17, 63), dict(channels=72, d_state=16, norm=False)),
        ]
    ],
    ids=str,
)
def test_full_sizes(grid, options, dtype):
    for conv in {'none', options.get('conv', 'none')}:
        check(grid, dtype=dtype, **dict(options, conv=conv))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    'grid, channels',
    [pytest.param((28, 28), 32, marks=gpu), pytest.param((100, 168), 16, marks=gpu)],
)
def test_agrees_with_mamba_ssm(grid, channels, dtype):
    interface = pytest.importorskip('mamba_ssm.ops.selective_scan_interface')
    from groupmamba_mm.ops.selective_scan import selective_scan

    assert interface is not None
    t = make_inputs(2, grid, channels, gated=False, norm=False, dtype=dtype)
    low, B, C = torch.einsum(
        'blgi,goi->blgo', t['xz'].float().unflatten(-1, (4, -1)), t['x_proj_weight']
    ).split([-(-channels // 16), 1, 1], -1)
    dt = torch.nn.functional.softplus(
        torch.einsum('blgr,gcr->blgc', low, t['dt_proj_weight']) + t['dt_proj_bias']
    )
    theirs = selective_scan(
        t['xz'].float(),
        dt.flatten(2),
        -t['A_log'].exp().flatten(0, 1),
        B,
        C,
        t['D'],
        grid=grid,
        directions=DIRECTIONS,
        backend='mamba_ssm',
    )
    ours = grouped_ssm(**t, grid=grid, directions=DIRECTIONS, gated=False, backend='triton')
    assert_near({'y': ours}, {'y': theirs.double()}, TOLERANCE[dtype])
