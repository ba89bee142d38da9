"""Fixtures of all tests."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
if workers > 1:  # they share the cores, as do the commands that they run
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
        os.environ['OMP_NUM_THREADS'] = str(torch.get_num_threads())

if not torch.cuda.is_available():  # kernels are interpreted; Triton reads this when imported
    os.environ.setdefault('TRITON_INTERPRET', '1')

if importlib.util.find_spec('mmengine'):  # tools/compatibility.py runs tests without
    from tests.openmmlab import no_scope_or_logger_of_another_test  # noqa: F401, a fixture

REPO = Path(__file__).resolve().parents[1]
sys.path.append(str(REPO / 'tools'))  # as it is for a script in it


def pytest_collection_modifyitems(items):
    """Tests for a GPU say so where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='needs a CUDA GPU'))


#: Small models of both families with ragged widths, fast enough for fp64 and loops.
SMALL = {
    'paper': dict(
        family='paper',
        stem_channels=6,
        embed_dims=(8, 12, 16, 20),
        depths=(1, 1, 2, 1),
        ffn_ratios=(2, 2, 1, 1),
    ),
    'official': dict(
        family='official',
        stem_channels=6,
        embed_dims=(8, 12, 20, 28),
        depths=(1, 1, 2, 1),
        ffn_ratios=(2, 2, 1, 1),
    ),
}


def load_tool(path):
    """The script ``tools/<path>`` as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPO / 'tools' / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def nothing_is_frozen():
    """Commands keep what is alive from the garbage collector, which here is another test's."""
    yield
    gc.unfreeze()


@pytest.fixture(params=sorted(SMALL))
def small_arch(request):
    """A small arch dict of each family."""
    return SMALL[request.param]


@pytest.fixture(scope='session')
def parity():
    """Tensors computed by the authors' code; see README, 'Tests'."""
    path = os.environ.get('GROUPMAMBA_PARITY_FIXTURE')
    if not path:
        pytest.skip('GROUPMAMBA_PARITY_FIXTURE does not name the parity fixture')
    return torch.load(path, weights_only=True)


@pytest.fixture
def one_thread():
    """For tests that more threads slow down many times over beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomize(module, seed=0):
    """Fill every parameter and buffer with values that make each of them matter."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=gen).to(tensor)
            if name.endswith('running_var'):
                tensor.copy_(0.5 + noise.abs())
            elif name.endswith('dt_proj_bias'):
                tensor.copy_(noise - 2)
            elif name.endswith('affinity.fc1.bias'):
                tensor.copy_(10 + noise)  # the one hidden unit's ReLU would else often be dead
            elif tensor.dim() > 1 and not name.endswith(('A_log', '.bias')):
                fan_in = tensor.shape[-1] if tensor.dim() < 4 else tensor[0].numel()
                tensor.copy_(noise / fan_in**0.5)
            elif name.endswith(('weight', 'D', 'skip_scale')):
                tensor.copy_(1 + 0.3 * noise)
            else:
                tensor.copy_(0.3 * noise)
    return module


class RunsCode:
    """Pickles as a call of ``os.system``.

    Args:
        marker: A file that the call would make.
    """

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


@pytest.fixture
def no_tf32():
    """fp32 proper in products and convolutions, which is a setting on a GPU."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [module.allow_tf32 for module in settings]
    for module in settings:
        module.allow_tf32 = False
    yield
    for module, value in zip(settings, before):
        module.allow_tf32 = value
