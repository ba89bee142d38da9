"""What a command loads for the GPU while it reads its config."""

import importlib
import threading

import pytest
import torch

from groupmamba_mm.engine import warm_up

LAUNCHERS = {
    'LOCAL_RANK': 'torchrun',
    'SLURM_LOCALID': 'Slurm',
    'OMPI_COMM_WORLD_LOCAL_RANK': 'MPI',
}


@pytest.fixture
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize('has_gpu', [True, False])
def test_it_loads_where_it_will_be_used(has_gpu, no_launcher, monkeypatch):
    cache = importlib.import_module('triton.runtime.cache')
    is_hashed, devices, done = threading.Event(), [], threading.Event()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(cache, 'triton_key', is_hashed.set)
    monkeypatch.setattr(
        warm_up, '_load_libraries', lambda device: (devices.append(device), done.set())
    )
    monkeypatch.setenv('SLURM_LOCALID', '6')
    warm_up.warm_up_ahead()
    for event in (is_hashed, done):
        assert event.wait(10 if has_gpu else 0.2) == has_gpu
    assert devices == [torch.device('cuda', 2)] * has_gpu


@pytest.mark.parametrize('name', LAUNCHERS, ids=LAUNCHERS.values())
def test_each_process_knows_its_number(name, no_launcher, monkeypatch):
    assert warm_up.local_rank() == 0
    monkeypatch.setenv(name, '3')
    assert warm_up.local_rank() == 3


def test_no_random_number_is_drawn():
    state = torch.get_rng_state()
    warm_up._load_libraries(torch.device('cpu'))
    assert torch.equal(torch.get_rng_state(), state)
