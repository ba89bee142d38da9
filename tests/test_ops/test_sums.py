"""Sums of parts and of columns against torch."""

import pytest
import torch

from tests.kernel_testing import needs_triton

pytestmark = [needs_triton, pytest.mark.usefixtures('nan_buffers')]

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.mark.parametrize(
    'shape, dim',
    [
        ((1, 3), 0),
        ((7, 2, 5), 0),
        ((300, 33), 0),
        ((3, 4, 17), 1),
        ((2, 270, 3, 6), 1),
        ((0, 4), 0),
        ((2, 0, 3), 1),
        ((0, 3, 4), 1),
        ((5, 0), 0),
    ],
    ids=str,
)
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_sum_of_parts(shape, dim, dtype):
    from groupmamba_mm.ops.sums import sum_parts

    parts = torch.randn(shape, device=DEVICE)
    total = sum_parts(parts, dim, dtype)
    expected = parts.double().sum(dim)
    assert total.dtype == (dtype or torch.float32)
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype is None else dict(atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(total.double(), expected, **tolerance)
    assert torch.equal(total, sum_parts(parts, dim, dtype))


def test_sum_of_parts_into_memory_of_the_caller():
    from groupmamba_mm.ops.sums import sum_parts

    parts, memory = torch.randn(5, 3, 7, device=DEVICE), torch.zeros(30, device=DEVICE)
    total = sum_parts(parts, out=memory[4:25])
    assert total.data_ptr() == memory[4:].data_ptr()
    torch.testing.assert_close(memory[4:25].view(3, 7), parts.sum(0))
    assert not memory[:4].any() and not memory[25:].any()


@pytest.mark.parametrize('programs', [1, 40, 10**6])
@pytest.mark.parametrize('shape, dim', [((300, 33), 0), ((3, 40, 170), 1)], ids=str)
def test_sum_of_parts_by_any_number_of_programs(shape, dim, programs, monkeypatch):
    from groupmamba_mm.ops import sums

    monkeypatch.setattr(sums, '_PROGRAMS', programs)
    parts = torch.randn(shape, device=DEVICE)
    torch.testing.assert_close(sums.sum_parts(parts, dim), parts.sum(dim), atol=1e-5, rtol=1e-5)


def test_tiles_of_parts_are_few():
    """Each is a version to compile, whatever the images' sizes are."""
    from groupmamba_mm.ops.sums import _plan_parts

    for batch, width in ((1, 40), (2, 5000), (64, 4000)):
        assert len({str(_plan_parts(batch, count, width)[1]) for count in range(1, 3000, 7)}) <= 2


def make_columns(shape, layout, dtype):
    batch, length, channels = shape
    if layout == 'padded rows':
        return torch.randn(batch, length, channels + 3, device=DEVICE).to(dtype)[..., :channels]
    if layout == 'transposed':
        return torch.randn(batch, channels, length, device=DEVICE).to(dtype).transpose(1, 2)
    if layout == 'images apart':
        return torch.randn(batch, length + 2, channels, device=DEVICE).to(dtype)[:, :length]
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize(
    'shape', [(1, 1, 1), (2, 65, 5), (1, 67, 70), (3, 1, 9), (0, 4, 3), (2, 0, 3)], ids=str
)
@pytest.mark.parametrize('layout', ['dense', 'padded rows', 'transposed', 'images apart'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_sum_of_columns(shape, layout, dtype):
    from groupmamba_mm.ops.sums import column_sums

    x = make_columns(shape, layout, dtype)
    total, expected = column_sums(x), x.double().sum((0, 1))
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(total, column_sums(x))
    memory = torch.zeros(shape[2] + 2, device=DEVICE)
    assert torch.equal(column_sums(x, out=memory[1:-1]), total)
    assert torch.equal(memory[1:-1], total) and not memory[0] and not memory[-1]


@pytest.mark.parametrize('programs', [1, 10**6])
def test_sum_of_columns_by_any_number_of_programs(programs, monkeypatch):
    from groupmamba_mm.ops import sums

    monkeypatch.setattr(sums, '_PROGRAMS', programs)
    x = torch.randn(2, 150, 70, device=DEVICE)
    torch.testing.assert_close(sums.column_sums(x), x.sum((0, 1)), atol=1e-5, rtol=1e-5)
