"""The selective scan against its sequential reference, finite differences and bad input."""

from functools import partial

import pytest
import torch

from groupmamba_mm.ops import DIRECTIONS, MIRRORED_DIRECTIONS, register_direction, selective_scan
from groupmamba_mm.ops.selective_scan import directions, from_scan_order, to_scan_order
from groupmamba_mm.ops.selective_scan.recurrence import recurrence

ALL = (*DIRECTIONS, *MIRRORED_DIRECTIONS)
GRIDS = [(1, 1), (1, 7), (7, 1), (7, 7), (7, 9), (5, 13), (16, 17), (3, 100)]


def make_inputs(batch, grid, width, groups, d_state, dtype=torch.float32, dt_scale=0.1, seed=0):
    """Random arguments with decays from weak to strong, in the public shapes."""
    gen = torch.Generator().manual_seed(seed)
    length, channels = grid[0] * grid[1], groups * width

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    x = rand(batch, length, channels)
    dt = torch.nn.functional.softplus(rand(batch, length, channels)) * dt_scale
    A = -torch.exp(rand(channels, d_state))
    B, C = rand(batch, length, groups, d_state), rand(batch, length, groups, d_state)
    D = rand(channels)
    return [t.to(dtype) for t in (x, dt, A, B, C, D)]


def visits(name, height, width):
    """Positions in the order of a direction."""
    columns = range(width)[::-1] if name.endswith('-mirrored') else range(width)
    if name.startswith(('left-right', 'right-left')):
        order = [i * width + j for i in range(height) for j in columns]
    else:
        order = [i * width + j for j in columns for i in range(height)]
    return order[::-1] if name.startswith(('right-left', 'bottom-top')) else order


def loop(x, dt, A, B, C, D, grid, directions):
    """Token by token and channel by channel, straight from Eq. 1-2; independent of the package."""
    batch, _length, channels = x.shape
    height, width = grid
    group_width = channels // len(directions)
    y = torch.zeros_like(x)
    for c in range(channels):
        group = c // group_width
        order = visits(directions[group], height, width)
        state = x.new_zeros(batch, A.shape[1])
        for t in order:
            state = (
                torch.exp(dt[:, t, c, None] * A[c]) * state
                + dt[:, t, c, None] * B[:, t, group] * x[:, t, c, None]
            )
            y[:, t, c] = (C[:, t, group] * state).sum(-1) + D[c] * x[:, t, c]
    return y


@pytest.mark.parametrize('backend', ['torch', 'reference'])
@pytest.mark.parametrize('grid', [(1, 1), (2, 5), (7, 3)])
def test_against_a_loop(backend, grid):
    inputs = make_inputs(2, grid, 3, 8, 2, torch.float64)
    y = selective_scan(*inputs, grid=grid, directions=ALL, backend=backend)
    torch.testing.assert_close(y, loop(*inputs, grid, ALL), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('width', [1, 3, 87])
@pytest.mark.parametrize('d_state', [1, 4])
def test_torch_backend_matches_reference_in_fp32(grid, width, d_state):
    inputs = make_inputs(2, grid, width, 4, d_state)
    run = partial(selective_scan, grid=grid, directions=DIRECTIONS)
    expected = run(*(t.double() for t in inputs), backend='reference')
    error = (run(*inputs, backend='torch') - expected).norm() / expected.norm()
    assert error < 1e-5


@pytest.mark.parametrize('length', [15, 16, 17, 255, 256, 257, 300, 4097])
def test_recurrence_at_chunk_boundaries(length):
    gen = torch.Generator().manual_seed(length)
    a = torch.rand(2, length, 5, generator=gen, dtype=torch.float64)
    b = torch.randn(2, length, 5, generator=gen, dtype=torch.float64)
    h, expected = torch.zeros(2, 5, dtype=torch.float64), []
    for t in range(length):
        h = a[:, t] * h + b[:, t]
        expected.append(h)
    torch.testing.assert_close(recurrence(a, b), torch.stack(expected, 1))


@pytest.mark.parametrize('direction', DIRECTIONS)
@pytest.mark.parametrize('grid,width', [((2, 3), 3), ((5, 4), 1), ((1, 1), 2), ((3, 7), 1)])
def test_gradients_against_finite_differences(direction, grid, width):
    inputs = make_inputs(1, grid, width, 1, 2, torch.float64, dt_scale=0.5)
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(
        lambda *args: selective_scan(*args, grid=grid, directions=(direction,), backend='torch'),
        inputs,
    )


@pytest.mark.parametrize('grid,width', [((16, 5), 87), ((33, 2), 3), ((1, 50), 1)])
def test_all_gradients_match_reference(grid, width):
    inputs = make_inputs(2, grid, width, 4, 2, torch.float64)
    weight = torch.randn_like(inputs[0])
    grads = {}
    for backend in ('torch', 'reference'):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = selective_scan(*leaves, grid=grid, directions=DIRECTIONS, backend=backend)
        grads[backend] = torch.autograd.grad((y * weight).sum(), leaves)
    for name, ours, expected in zip(
        ['x', 'dt', 'A', 'B', 'C', 'D'], grads['torch'], grads['reference']
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9, msg=name)


def test_strong_decay_underflows_to_zero_without_nan():
    x, dt, A, B, C, D = make_inputs(1, (20, 20), 4, 4, 1)
    leaves = [t.requires_grad_() for t in (x, dt * 1e4, A, B, C, D)]
    y = selective_scan(*leaves, grid=(20, 20), directions=DIRECTIONS)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.isfinite(t).all() for t in (y, *grads))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_state_is_fp32_at_least_and_dtype_is_kept(dtype):
    inputs = make_inputs(1, (40, 50), 2, 4, 1, dtype, dt_scale=1e-3)
    y = selective_scan(*inputs, grid=(40, 50), directions=DIRECTIONS)
    assert y.dtype == dtype
    exact = selective_scan(*(t.double() for t in inputs), grid=(40, 50), directions=DIRECTIONS)
    # all that is lost is the rounding of the output: a bf16 state would be off by far more
    rounding = torch.finfo(dtype).eps
    assert (y.double() - exact).abs().max() <= max(
        rounding, 1e-5 if dtype != torch.float64 else 1e-13
    ) * exact.abs().max()


def test_autocast_does_not_lower_the_precision_of_the_state():
    inputs = make_inputs(1, (10, 11), 2, 4, 1)
    expected = selective_scan(*inputs, grid=(10, 11), directions=DIRECTIONS)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = selective_scan(*inputs, grid=(10, 11), directions=DIRECTIONS)
    assert torch.equal(y, expected)


@pytest.mark.parametrize('direction', ALL)
@pytest.mark.parametrize('grid', GRIDS)
def test_scan_order_visits_the_grid_and_comes_back(direction, grid):
    tokens = torch.arange(grid[0] * grid[1])[None, :, None]
    order = to_scan_order(tokens, grid, direction)
    assert torch.equal(from_scan_order(order, grid, direction), tokens)
    assert order.flatten().tolist() == visits(direction, *grid)


@pytest.fixture
def snake(monkeypatch):
    """A direction that turns at the end of each row."""
    monkeypatch.setattr(directions, '_registry', dict(directions._registry))

    def order(height, width):
        positions = torch.arange(height * width).view(height, width)
        positions[1::2] = positions[1::2].flip(1)
        return positions.flatten()

    register_direction('snake', order)
    return order


@pytest.mark.parametrize('grid', [(1, 1), (3, 4), (4, 3)])
def test_a_direction_of_ones_own(snake, grid):
    """As if the image had been brought into that order, and read row by row."""
    x, dt, A, B, C, D = make_inputs(2, grid, 3, 1, 2, torch.float64)
    y = selective_scan(x, dt, A, B, C, D, grid=grid, directions=('snake',), backend='torch')
    order = snake(*grid)
    ahead = [t[:, order] for t in (x, dt)], [t[:, order] for t in (B, C)]
    expected = loop(*ahead[0], A, *ahead[1], D, grid, ('left-right',))
    torch.testing.assert_close(y[:, order], expected, rtol=1e-12, atol=1e-12)


def test_a_direction_that_is_none(snake):
    with pytest.raises(ValueError, match="'snake' is there already"):
        register_direction('snake', snake)
    with pytest.raises(ValueError, match='does not visit each of the 3 tokens'):
        register_direction('first', lambda height, width: torch.zeros(height * width))
    with pytest.raises(ValueError, match="do not know the scan direction 'snake'"):
        directions.direction_code(('left-right', 'snake'))


def _bad(**changes):
    names = ['x', 'dt', 'A', 'B', 'C', 'D']
    call = dict(zip(names, make_inputs(1, (2, 3), 2, 4, 1)))
    call.update(grid=(2, 3), directions=DIRECTIONS)
    call.update(changes)
    return selective_scan(**call)


@pytest.mark.parametrize(
    'changes,message',
    [
        (dict(x=torch.zeros(6, 8)), r'x must be a tensor of shape \(B, L, C\), got \(6, 8\)'),
        (dict(grid=(3, 3)), r'grid \(3, 3\) has 9 tokens but x has L = 6'),
        (dict(dt=torch.zeros(1, 6, 7)), r'dt must have shape \(B, L, C\) = \(1, 6, 8\)'),
        (dict(A=torch.zeros(8)), r'A must be a tensor of shape \(C, N\), got \(8,\)'),
        (dict(B=torch.zeros(1, 6, 4, 2)), r'B must have shape .* = \(1, 6, 4, 1\)'),
        (dict(D=torch.zeros(4)), r'D must have shape \(C,\) = \(8,\)'),
        (dict(directions=('diagonal',)), "unknown scan direction 'diagonal'; choose from"),
        (dict(directions=()), 'non-empty sequence'),
        (dict(directions=DIRECTIONS[:3]), '8 channels cannot be divided into 3 groups'),
        (dict(backend='cuda'), "unknown scan backend 'cuda'; choose from"),
        (dict(C=torch.zeros(1, 6, 4, 1, device='meta')), 'C is on meta but x is on cpu'),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        _bad(**changes)


def test_integers_are_refused():
    with pytest.raises(TypeError, match='dt must be a floating-point tensor, got torch.int64'):
        _bad(dt=torch.zeros(1, 6, 8, dtype=torch.int64))


def traced(run):
    """A function as torch.compile records it, and the nodes of each of its graphs."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    return torch.compile(run, backend=aot_autograd(fw_compiler=keep), fullgraph=True), graphs


def test_compiled_on_a_cpu_the_graph_does_not_grow_with_the_length():
    """Each recurrence is one operator: its steps written out took Inductor's C++ minutes."""

    def run(*inputs, grid):
        options = dict(directions=('left-right', 'bottom-top'), backend='torch')
        return selective_scan(*inputs, grid=grid, **options)

    nodes = []
    for grid in ((2, 3), (40, 41)):
        inputs = [t.double().requires_grad_() for t in make_inputs(1, grid, 3, 2, 2)]
        compiled, graphs = traced(partial(run, grid=grid))
        found, wanted = compiled(*inputs), run(*inputs, grid=grid)
        torch.testing.assert_close(found, wanted)
        weight = torch.rand_like(wanted)
        for one, other in zip(
            torch.autograd.grad((found * weight).sum(), inputs),
            torch.autograd.grad((wanted * weight).sum(), inputs),
        ):
            torch.testing.assert_close(one, other)
        operators = [graph.count('groupmamba_mm.recurrence_of_decays.default') for graph in graphs]
        assert operators == [1, 1]  # forward and backward
        nodes.append([len(graph) for graph in graphs])
    assert nodes[0] == nodes[1]


def test_the_operator_of_the_recurrence_is_whole():
    a, b = (torch.rand(2, 37, 3, 2).transpose(1, 2).contiguous().transpose(1, 2) for _ in range(2))
    operator = torch.ops.groupmamba_mm.recurrence_of_decays.default
    torch.testing.assert_close(operator(a, b), recurrence(a.contiguous(), b.contiguous()))
    torch.library.opcheck(operator, (a.contiguous(), b.contiguous()))
