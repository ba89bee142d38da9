"""Fixtures of the kernels' tests."""

import importlib

import pytest
import torch

from groupmamba_mm.ops.backend import import_problem
from tests.kernel_testing import INTERPRETED

#: Modules that remember how they cut up work.
PLANNERS = (
    'blocks.official',
    'blocks.paper',
    'depthwise_conv.kernels',
    'grouped_ssm.launch',
    'norm.batch_norm',
    'norm.kernels',
    'sums',
)


def forget_plans():
    """Empty every cache of these modules."""
    if import_problem('triton') is not None:
        return
    for name in PLANNERS:
        for value in vars(importlib.import_module(f'groupmamba_mm.ops.{name}')).values():
            if hasattr(value, 'cache_clear'):
                value.cache_clear()


@pytest.fixture(autouse=True)
def fresh_plans():
    """How work is cut up is remembered by its sizes: not across tests that change the constants."""
    forget_plans()
    yield
    forget_plans()


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
