"""Weights packed for the kernels, and gradients back, against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from groupmamba_mm.ops.selective_scan.directions import DIRECTIONS, direction_code
from tests.kernel_testing import needs_triton, randn

pytestmark = [needs_triton, pytest.mark.usefixtures('nan_buffers')]


def round_up(n):
    return -(-n // 8) * 8


def grouped(weight, parts, out_stored, in_stored, rows, columns):
    """(G, parts * O, I) to (rows, columns): all groups of the first part, then those of the next,
    each in a block of its own."""
    weight = weight.unflatten(1, (parts, -1))
    weight = F.pad(weight, (0, in_stored - weight.shape[3], 0, out_stored - weight.shape[2]))
    packed = torch.cat([torch.block_diag(*weight[:, part]) for part in range(parts)])
    return F.pad(packed, (0, columns - packed.shape[1], 0, rows - packed.shape[0]))


def make_packing(width):
    """One matrix of each kind, of parameters of odd sizes, and rows of other gradients.

    Returns:
        The packing, parameters, and what each of them has to look like, in the matrices' order.
    """
    from groupmamba_mm.ops.blocks import packing

    stored, total = round_up(width), 2 * width
    shapes = [
        (2, 2 * width, width),
        (2, width, width),
        (5, total),
        (5,),
        (total, 1, 3, 3),
        (2, 3, width),
        (total,),
    ]
    columns = round_up(total)
    matrices = (
        packing.block_diagonal(0, 2, 2, width, width, stored, width, columns),
        packing.block_diagonal(1, 2, 1, width, width, width, stored, 2 * stored),
        packing.dense(2, 5, total, 8, columns),
        packing.vector(3, 5, 8),
        packing.taps(4, 9, total, total),
        packing.vector(6, total, columns, in_fp32=True),
    )
    row = 4 * width + 1
    rows = [
        packing.Rows(5, 2, 0, 3, width, width, row),
        packing.Rows(6, 2, 3 * width, 1, width, 0, row),
        packing.Rows(3, 1, 2 * row, 1, 5, 0, 0),
        packing.Rows(4, 1, 2 * row + 5, 9, total, total, 0),
    ]
    references = [
        (0, lambda t: grouped(t, 2, stored, width, 4 * stored, columns)),
        (1, lambda t: grouped(t, 1, width, stored, columns, 2 * stored)),
        (2, lambda t: F.pad(t, (0, columns - total, 0, 3))),
        (3, lambda t: F.pad(t, (0, 3))),
        (4, lambda t: t.flatten(1).t()),
        (6, lambda t: F.pad(t, (0, columns - total))),
    ]
    made = packing.Packing(
        matrices, rows, 2 * row + 5 + 9 * total, [torch.Size(shape).numel() for shape in shapes]
    )
    return made, shapes, references


@pytest.mark.parametrize('width', [3, 8, 87, 106])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_weights_are_packed_as_plain_pytorch_does(device, width, dtype):
    packing, shapes, references = make_packing(width)
    parameters = [randn(i, device, torch.float32, *shape) for i, shape in enumerate(shapes)]
    matrices = packing.views(*packing.pack(parameters, dtype))
    for number, (matrix, (parameter, reference)) in enumerate(zip(matrices, references)):
        in_fp32 = number >= 4
        assert matrix.dtype == (torch.float32 if in_fp32 else dtype)
        expected = reference(parameters[parameter]).contiguous()
        if not in_fp32 and device == 'cpu' and dtype == torch.bfloat16:
            # the interpreter cuts off what bf16 cannot hold
            torch.testing.assert_close(matrix.float(), expected, atol=0, rtol=2**-7)
            assert torch.equal(matrix == 0, expected == 0)
        else:
            assert torch.equal(matrix, expected.to(matrix.dtype)), number
        assert matrix.data_ptr() % 16 == 0


@pytest.mark.parametrize('width', [3, 8, 87, 106])
def test_gradients_come_back(device, width):
    """Those of packed matrices as autograd gets them from plain PyTorch's packing."""
    packing, shapes, references = make_packing(width)
    leaves = [
        randn(i, device, torch.float32, *shape).requires_grad_() for i, shape in enumerate(shapes)
    ]
    low = randn(50, device, torch.float32, packing.sizes[0])
    rows = randn(51, device, torch.float32, packing.rows_size)
    grads = torch.full((packing.total + 3,), float('nan'), device=device)
    packing.unpack(low, rows, grads[:-3])
    assert grads[-3:].isnan().all()
    got = [t.view(shape) for t, shape in zip(grads[:-3].split(packing.numels), shapes)]
    matrices = packing.views(low, torch.empty(packing.sizes[1], device=device))
    for parameter, reference in references[:3]:
        leaf = leaves[parameter]
        (expected,) = torch.autograd.grad(reference(leaf), leaf, matrices[parameter])
        assert torch.equal(got[parameter], expected), parameter
    row = 4 * width + 1
    of_groups = rows[: 2 * row].view(2, row)
    assert torch.equal(got[5], of_groups[:, : 3 * width].view(2, 3, width))
    assert torch.equal(got[6].view(2, width), of_groups[:, 3 * width : 4 * width])
    assert torch.equal(got[3], rows[2 * row : 2 * row + 5])
    assert torch.equal(got[4].flatten(), rows[2 * row + 5 :])


@pytest.mark.parametrize('family', ['official', 'paper'])
@pytest.mark.parametrize('by_groups', [False, True])
def test_each_parameter_of_a_block_has_one_source_of_its_gradient(family, by_groups):
    """A matrix or a row, or a kernel of its own: then it is not among those packed."""
    from groupmamba_mm.ops.blocks import official, paper

    if family == 'official':
        spec = official.OfficialSpec(
            348, 4, 1392, 6, 1, direction_code(DIRECTIONS), 21, 1e-5, 1e-5, 1e-6
        )
        packing = official.packing_of(spec)
        own = {0, 1, 3, 4, 14, 15, 16, 18, 19, 20, 22, 23, 24, 25, 26, 27}
    else:
        spec = paper.PaperSpec(
            424, 4, 212, 3, 212, 848, 7, 1, direction_code(DIRECTIONS), 26, 1e-5, 1e-5, 1e-6
        )
        packing = paper.packing_of(spec, paper.Kernels(by_groups, by_groups))
        own = {0, 1, 3, 4, 11, 12, 13, 17, 18, 20, 22, 23, 24, 25, 26}
        own |= set() if by_groups else {15}
    gathered = [m.parameter for m in packing.matrices if m.has_gradient]
    gathered += [r.parameter for r in packing.rows]
    assert len(set(gathered)) == len(gathered)
    assert set(gathered).isdisjoint(own)
    assert set(gathered) | own == set(range(len(spec.shapes())))
    assert packing.numels == tuple(shape.numel() for shape in spec.shapes())


def test_weights_that_changed_or_moved_are_seen(device):
    packing, shapes, _ = make_packing(3)
    parameters = [randn(i, device, torch.float32, *shape) for i, shape in enumerate(shapes)]
    before = packing.pack(parameters, torch.float32)[0]
    parameters[2].mul_(2)
    doubled = packing.views(*packing.pack(parameters, torch.float32))[2]
    assert torch.equal(doubled, 2 * packing.views(before, before)[2])
    parameters[2] = parameters[2].clone().mul_(2)
    moved = packing.views(*packing.pack(parameters, torch.float32))[2]
    assert torch.equal(moved, 2 * doubled)


def test_tables_of_memory_that_is_gone_do_not_pile_up(device, monkeypatch):
    from groupmamba_mm.ops.blocks import packing as module

    monkeypatch.setattr(module, '_MOST_TABLES', 3)
    packing, shapes, _ = make_packing(3)
    kept = []
    for _ in range(5):
        kept.append([randn(0, device, torch.float32, *shape) for shape in shapes])
        packing.pack(kept[-1], torch.float32)
        assert len(packing._tables) <= 3
