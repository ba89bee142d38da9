"""Fixtures of the kernels' tests."""
import pytest
import torch

from tests.kernel_truth import INTERPRETED


@pytest.fixture
def device():
    """Where the kernels run: a GPU, or the CPU in the interpreter."""
    return 'cpu' if INTERPRETED else 'cuda'


@pytest.fixture
def nan_buffers(monkeypatch):
    """New memory holds NaN, so that an element nobody wrote is noticed."""
    def filled(make):
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float('nan')) if tensor.is_floating_point() else tensor
        return wrapper

    monkeypatch.setattr(torch, 'empty', filled(torch.empty))
    monkeypatch.setattr(torch, 'empty_like', filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, 'new_empty', filled(torch.Tensor.new_empty))
