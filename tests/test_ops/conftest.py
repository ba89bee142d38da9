"""Fixtures of the kernels' tests."""
import pytest

from tests.kernel_truth import INTERPRETED


@pytest.fixture
def device():
    """Where the kernels run: a GPU, or the CPU in the interpreter."""
    return 'cpu' if INTERPRETED else 'cuda'
