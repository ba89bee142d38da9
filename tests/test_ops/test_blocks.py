"""Blocks as operators, beside what tests/test_layers/test_fused.py shows of whole models."""

import importlib

import pytest
import torch

from groupmamba_mm.ops.selective_scan.directions import DIRECTIONS, direction_code
from tests.kernel_testing import needs_triton, randn

pytestmark = needs_triton

GRID = (2, 2)
FAMILIES = ('official', 'paper')


def make_block(family, device='cpu', affinity=1, dtype=torch.float32, branch=True):
    """Module, specification, and the tensors that a block gets."""
    module = importlib.import_module(f'groupmamba_mm.ops.blocks.{family}')
    if family == 'official':
        spec = module.OfficialSpec(
            12, 4, 24, 1, 1, direction_code(DIRECTIONS), affinity, 1e-5, 1e-5, 1e-6
        )
    else:
        spec = module.PaperSpec(
            12, 4, 6, 3, 6, 24, 1, 1, direction_code(DIRECTIONS), affinity, 1e-5, 1e-5, 1e-6
        )
    parameters = [
        0.3 * randn(i, device, torch.float32, *shape) for i, shape in enumerate(spec.shapes())
    ]
    tokens = randn(100, device, torch.float32, 2, 4, 12)
    branch = randn(101, device, dtype, 2, 4, 16) if branch else None
    drops = [
        None if t is None else torch.tensor([0.0, 2.0], device=device) for t in (branch, tokens)
    ]
    return module, spec, (tokens, branch, *drops, parameters)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize(
    'options', [dict(), dict(affinity=0, branch=False), dict(dtype=torch.bfloat16)], ids=str
)
def test_operator_passes_opcheck(device, family, options):
    """But for its comparison of all outputs with a traced run's: between the packed matrices are
    gaps that nobody writes. What is compared is in test_operator_gives_what_eager_code_does."""
    from groupmamba_mm.ops.blocks import operators

    _, spec, (tokens, branch, *drops, parameters) = make_block(family, device, **options)
    leaves = [t if t is None else t.requires_grad_() for t in (tokens, branch, *parameters)]
    arguments = (
        family,
        [*map(float, spec)],
        *GRID,
        options.get('dtype', torch.float32),
        True,
        *leaves[:2],
        *drops,
        leaves[2:],
    )
    torch.library.opcheck(
        operators._block,
        arguments,
        test_utils=('test_schema', 'test_autograd_registration', 'test_faketensor'),
    )


@pytest.mark.parametrize('family', FAMILIES)
def test_operator_gives_what_eager_code_does(device, family):
    from groupmamba_mm.ops.blocks import operators, run_block

    _, spec, (tokens, branch, *drops, parameters) = make_block(family, device)
    leaves = [t.requires_grad_() for t in (tokens, branch, *parameters)]
    eager = run_block(family, spec, GRID, torch.float32, tokens, branch, *drops, parameters)
    traced = operators._block(
        family, [*map(float, spec)], *GRID, torch.float32, True, tokens, branch, *drops, parameters
    )[:2]
    weights = [randn(200 + i, device, torch.float32, *t.shape) for i, t in enumerate(eager)]
    results = [
        [*outputs, *torch.autograd.grad(outputs, leaves, weights)] for outputs in (eager, traced)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('affinity', [0, 1])
@pytest.mark.parametrize('branch', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_what_is_kept_is_what_is_said_to_be(family, affinity, branch, dtype):
    """The operator's lists have no None: which tensors there are has to be known."""
    module, spec, tensors = make_block(family, 'meta', affinity, dtype, branch)
    outputs = module.forward(spec, GRID, dtype, True, *tensors)
    assert [t is not None for t in outputs] == module.saves(spec, branch, dtype, tensors[0].device)
    if family == 'paper':
        assert outputs[0] is None or branch


@pytest.mark.parametrize('family', FAMILIES)
def test_nothing_is_kept_without_a_backward_pass(family):
    module, spec, tensors = make_block(family, 'meta')
    assert len(module.forward(spec, GRID, torch.float32, False, *tensors)) == 2


@pytest.mark.parametrize('family', FAMILIES)
def test_specification_survives_the_operators_list_of_floats(family):
    from groupmamba_mm.ops.blocks import operators

    module, spec, _ = make_block(family)
    again = operators._spec(module, [*map(float, spec)])
    assert again == spec and [*map(type, again)] == [*map(type, spec)]


def test_what_runs_group_by_group():
    from groupmamba_mm.ops.blocks.paper import choose_kernels

    _, spec, _ = make_block('paper')
    cpu = torch.device('cpu')

    def choose(width, dtype=torch.bfloat16):
        return tuple(choose_kernels(spec._replace(channels=4 * width), dtype, cpu))

    assert [choose(width) for width in (24, 48, 92, 190, 200, 300)] == [
        (False, False),
        (False, True),
        (True, True),
        (True, True),
        (True, False),
        (False, False),
    ]
    assert choose(92, torch.float32) == (False, False)
