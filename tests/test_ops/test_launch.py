"""How kernels are launched, or only noted."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernel_testing import gpu, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize(
    'tensor, row, is_copied',
    [
        (torch.zeros(2, 3, 4), 4, False),
        (torch.zeros(2, 3, 8)[..., 2:6], 8, False),
        (torch.zeros(2, 3, 8)[..., ::2], 4, True),
        (torch.zeros(2, 4, 3).transpose(1, 2), 4, True),
        (torch.zeros(2, 5, 4)[:, :3], 4, True),
        (torch.zeros(1, 5, 4)[:, :3], 4, False),
        (torch.zeros(2, 1, 8)[..., :4], 8, False),
        (torch.zeros(3, 1).expand(2, 3, 1), 1, True),
        (torch.zeros(2, 3, 4, 5)[:, :, 2], 20, False),
        (torch.zeros(1, 1, 4), 4, False),
    ],
    ids=str,
)
def test_rows_lie_at_one_distance(tensor, row, is_copied):
    from groupmamba_mm.ops.launch import rows_of

    found, distance = rows_of(tensor)
    assert distance == row and (found is not tensor) == is_copied
    flat = torch.as_strided(
        found,
        (tensor.shape[0] * tensor.shape[1], tensor.shape[2]),
        (distance, 1),
        found.storage_offset(),
    )
    assert torch.equal(flat.view(tensor.shape), tensor)


def test_no_tensor_has_no_rows():
    from groupmamba_mm.ops.launch import rows_of

    assert rows_of(None) == (None, 0)


def test_launches_are_noted_and_do_not_run():
    from groupmamba_mm.ops.launch import Launch
    from groupmamba_mm.ops.sums import _sum_parts, sum_parts
    from groupmamba_mm.ops.tracing import noted, noting_launches, shared_memory

    parts, out = torch.ones(5, 3), torch.zeros(3)
    with noting_launches(1234) as outer:
        with noting_launches(99) as inner:
            assert shared_memory() == 99
            sum_parts(parts, out=out)
        assert shared_memory() == 1234
        sum_parts(parts, dtype=torch.bfloat16)
    assert noted() is None and not out.any()
    constants = (('ROWS', 16), ('COLUMNS', 16), ('num_warps', 1))
    kinds = (torch.float32, torch.float32, 'i32', 'i32')
    assert inner[0] == Launch(_sum_parts, kinds, constants)
    # and the plans of sums of other sizes
    assert len(set(inner)) == len(inner) == 8 and {launch.kinds for launch in inner} == {kinds}
    assert {launch.kinds[1] for launch in outer} == {torch.bfloat16}


def test_tensors_without_data_are_not_launched_for():
    from groupmamba_mm.ops.sums import column_sums

    assert column_sums(torch.zeros(2, 3, 4, device='meta')).shape == (4,)
    with FakeTensorMode():
        assert column_sums(torch.zeros(2, 3, 4)).shape == (4,)


@pytest.mark.parametrize(
    'number, kind',
    [
        (1, 'i32'),
        (2**31 - 1, 'i32'),
        (2**31, 'i64'),
        (-(2**31), 'i32'),
        (0.5, 'fp32'),
        (None, None),
        (torch.zeros(1, dtype=torch.float16), torch.float16),
    ],
)
def test_kinds_of_arguments(number, kind):
    from groupmamba_mm.ops import launch

    assert launch._kind(number) == kind


@pytest.fixture
def versions(monkeypatch):
    """Of kernels, as if none had been launched."""
    from groupmamba_mm.ops import launch

    monkeypatch.setattr(launch, '_versions', {})
    return launch._versions


@pytest.mark.parametrize('dummy', [pytest.param(None, marks=gpu)])
def test_a_kernel_is_compiled_once_for_all_sizes(versions, dummy):
    from groupmamba_mm.ops.sums import sum_parts

    for shape in ((5, 3), (5, 3), (1, 16), (16, 1), (7, 160)):
        parts = torch.randn(shape, device='cuda')
        torch.testing.assert_close(sum_parts(parts), parts.sum(0))
    assert len(versions) == 1


@pytest.mark.parametrize('dummy', [pytest.param(None, marks=gpu)])
def test_each_precision_and_alignment_has_a_version(versions, dummy):
    from groupmamba_mm.ops.sums import sum_parts

    parts, memory = torch.randn(5, 64, device='cuda'), torch.zeros(72, device='cuda')
    for shift in (0, 1, 2, 4, 0):
        torch.testing.assert_close(sum_parts(parts, out=memory[shift : shift + 64]), parts.sum(0))
    assert len(versions) == 2  # aligned to 16 bytes, or not
    sum_parts(parts, dtype=torch.bfloat16)
    assert len(versions) == 3


@pytest.mark.parametrize('dummy', [pytest.param(None, marks=gpu)])
def test_launches_follow_the_stream(dummy):
    from groupmamba_mm.ops.sums import sum_parts

    parts, stream = torch.ones(300, 64, device='cuda'), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        parts.mul_(2)
        total = sum_parts(parts)
    stream.synchronize()
    assert (total == 600).all()
