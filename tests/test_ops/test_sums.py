"""Sums of parts and of columns against torch."""
import pytest
import torch

from tests.kernel_truth import needs_triton

pytestmark = [needs_triton, pytest.mark.usefixtures('nan_buffers')]

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.mark.parametrize('shape, dim', [
    ((1, 3), 0), ((7, 2, 5), 0), ((300, 33), 0), ((3, 4, 17), 1), ((2, 270, 3, 6), 1), ((0, 4), 0),
    ((2, 0, 3), 1), ((0, 3, 4), 1), ((5, 0), 0),
], ids=str)
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


@pytest.mark.parametrize('shape', [(1, 1), (130, 5), (67, 70), (0, 3)], ids=str)
@pytest.mark.parametrize('layout', ['dense', 'padded rows', 'transposed'])
def test_sum_of_columns(shape, layout):
    from groupmamba_mm.ops.sums import column_sums
    x = torch.randn(shape, device=DEVICE)
    if layout == 'padded rows':
        x = torch.randn(shape[0], shape[1] + 3, device=DEVICE)[:, :shape[1]]
    elif layout == 'transposed':
        x = torch.randn(shape[::-1], device=DEVICE).t()
    torch.testing.assert_close(column_sums(x), x.sum(0), atol=1e-5, rtol=1e-5)
    assert column_sums(x, torch.bfloat16).dtype == torch.bfloat16
