"""The choice of the backend: what is picked, what is refused, what is said."""

import functools
import importlib
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from groupmamba_mm import GroupMamba
from groupmamba_mm.backbones.kernels import _runs_kernels
from groupmamba_mm.errors import BackendError, ConfigError, UserError
from groupmamba_mm.layers.ssm import GroupedSSM
from groupmamba_mm.ops import backend as backend_module
from groupmamba_mm.ops import explain_backend, resolve_backend, selective_scan, self_test
from groupmamba_mm.ops.backend import BACKEND_NAMES, Choice, check_backend, choose_backend
from groupmamba_mm.ops.selective_scan import BACKENDS
from tests import fakes
from tests.kernel_testing import INTERPRETED

CPU = torch.device('cpu')
GPU = torch.device('cuda', 0)
ARCH = dict(family='paper', stem_channels=4, embed_dims=(8, 16), depths=(1, 1), ffn_ratios=(1, 1))


def clear():
    backend_module._choose.cache_clear()
    backend_module.import_problem.cache_clear()
    backend_module._logged.clear()
    self_test.check_kernels.cache_clear()


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No memory of earlier choices, and no variables of the person who runs the tests."""
    for name in (backend_module.VARIABLE, 'TRITON_INTERPRET'):
        monkeypatch.delenv(name, raising=False)
    clear()
    yield
    clear()


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have a GPU; its facts can be changed."""
    facts = SimpleNamespace(
        capability=(9, 0), failure=None, triton=None, tests=0, shared_memory=227 * 1024
    )

    def check_kernels(device):
        facts.tests += 1
        return facts.failure

    @functools.lru_cache
    def import_problem(module):
        return facts.triton if module == 'triton' else f'{module} is not installed'

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: facts.capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Some GPU')
    monkeypatch.setattr(
        torch.cuda,
        'get_device_properties',
        lambda device: SimpleNamespace(shared_memory_per_block_optin=facts.shared_memory),
    )
    monkeypatch.setattr(backend_module, 'check_kernels', check_kernels)
    monkeypatch.setattr(backend_module, 'import_problem', import_problem)
    monkeypatch.setattr(backend_module, '_versions', lambda *modules: ', '.join(modules))
    return facts


def test_auto_is_torch_on_a_cpu():
    assert resolve_backend('auto', CPU) == 'torch'
    assert 'the tensors are on cpu' in choose_backend('auto', CPU).reason


@pytest.mark.parametrize('dtype', [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('d_state', [1, 16])
def test_auto_is_triton_on_a_good_gpu(gpu, dtype, d_state):
    assert resolve_backend('auto', GPU, dtype, d_state) == 'triton'
    assert 'Some GPU' in choose_backend('auto', GPU, dtype, d_state).reason


@pytest.mark.parametrize(
    'call', [dict(width=506, dt_rank=16), dict(width=380, dt_rank=12, d_state=16), dict(groups=17)]
)
def test_sizes_that_an_h100_can_do(gpu, call):
    assert resolve_backend('auto', GPU, **call) == 'triton'


@pytest.mark.parametrize(
    'groups, has_norm, name', [(4, True, 'triton'), (1, True, 'torch'), (1, False, 'triton')]
)
def test_a_layer_tells_its_size(gpu, groups, has_norm, name):
    layer = GroupedSSM(1520, groups, dt_rank=48 // groups, has_norm=has_norm)
    assert layer.resolve_backend(SimpleNamespace(device=GPU, dtype=torch.bfloat16)) == name


@pytest.mark.parametrize(
    'facts,call,reason',
    [
        (dict(capability=(7, 5)), {}, r'capability 7\.5\) is older than the capability 8\.0'),
        (dict(triton='triton is not installed'), {}, 'not installed; run `pip install triton`'),
        (
            dict(failure='scan, grad of A, is off'),
            {},
            'self-test .* failed .*: scan, grad of A, is',
        ),
        ({}, dict(d_state=17), 'd_state up to 16, got 17'),
        ({}, dict(dtype=torch.float64), 'no fp64'),
        ({}, dict(groups=18), 'up to 17 groups, got 18'),
        (
            {},
            dict(width=1520, dt_rank=48),
            'need 896 KB .* of 1520 channels .* 227 KB; more groups',
        ),
        (dict(shared_memory=99 * 1024), dict(width=380, dt_rank=12), 'need 128 KB .* has 99 KB'),
    ],
)
def test_what_the_kernels_cannot_do_falls_back_loudly_or_raises(gpu, caplog, facts, call, reason):
    vars(gpu).update(facts)
    with caplog.at_level(logging.INFO, 'groupmamba_mm'):
        choice = choose_backend('auto', GPU, **call)
    assert choice.name == 'torch'
    assert re.search(reason, choice.reason)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and choice.reason in record.getMessage()
    with pytest.raises(BackendError, match=f"'triton'.*cannot run: .*{reason}.*use 'torch'"):
        choose_backend('triton', GPU, **call)
    assert issubclass(BackendError, RuntimeError) and issubclass(BackendError, UserError)


@pytest.mark.parametrize('name', ['auto', 'triton'])
def test_a_cuda_tensor_without_a_gpu_is_no_crash(name):
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    if name == 'auto':
        assert resolve_backend('auto', GPU) == 'torch'
    else:
        with pytest.raises(BackendError, match='PyTorch sees no CUDA device|not installed'):
            resolve_backend('triton', GPU)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    pytest.importorskip('triton')
    with pytest.raises(BackendError, match='the tensors are on cpu .*TRITON_INTERPRET=1'):
        resolve_backend('triton', CPU)
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert resolve_backend('triton', CPU) == 'triton'


def test_auto_never_interprets(gpu, monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert resolve_backend('auto', GPU) == 'torch'
    assert resolve_backend('auto', CPU) == 'torch'
    assert gpu.tests == 0


@pytest.mark.parametrize('backend', ['auto', 'triton', 'torch'])
@pytest.mark.parametrize(
    'variable, value', [(None, None), ('TRITON_INTERPRET', '1'), (backend_module.VARIABLE, 'torch')]
)
def test_kernels_are_compiled_ahead_where_they_run(gpu, monkeypatch, backend, variable, value):
    """Not where the interpreter does, whose functions nobody can compile."""
    model = GroupMamba(arch=ARCH, scan_backend=backend)
    if variable is not None:
        monkeypatch.setenv(variable, value)
    runs = (
        backend != 'torch'
        and variable != 'TRITON_INTERPRET'
        and (variable is None or backend == 'triton')
    )
    assert _runs_kernels(model) == runs
    gpu.capability = (7, 5)
    assert not _runs_kernels(model)


def test_missing_mamba_ssm_names_the_command(monkeypatch):
    fakes.install(monkeypatch, mamba_ssm=False)
    with pytest.raises(
        BackendError,
        match='mamba_ssm is not installed; run `pip install mamba-ssm --no-build-isolation',
    ):
        resolve_backend('mamba_ssm', GPU)


@pytest.mark.parametrize(
    'call,reason',
    [
        (dict(device=CPU), 'needs a CUDA device, the tensors are on cpu'),
        (dict(device=GPU, dtype=torch.float64), 'no fp64'),
        (dict(device=GPU, d_state=257), 'd_state up to 256, got 257'),
    ],
)
def test_what_mamba_ssm_cannot_do_raises(monkeypatch, call, reason):
    fakes.install(monkeypatch)
    assert resolve_backend('mamba_ssm', GPU) == 'mamba_ssm'
    with pytest.raises(BackendError, match=reason):
        resolve_backend('mamba_ssm', **call)


def test_a_broken_package_is_told_from_a_missing_one(monkeypatch, tmp_path):
    (tmp_path / 'broken_gm_package.py').write_text('import no_such_gm_extension')
    (tmp_path / 'broken_gm_build.py').write_text('raise OSError("undefined symbol: _ZN3\\nmore")')
    monkeypatch.syspath_prepend(tmp_path)
    problem = backend_module.import_problem
    assert problem('no_such_gm_extension') == 'no_such_gm_extension is not installed'
    assert 'cannot be imported (No module named' in problem('broken_gm_package')
    assert problem('broken_gm_build').endswith('(OSError: undefined symbol: _ZN3)')


def test_a_triton_without_what_the_kernels_use_is_told(monkeypatch):
    triton = pytest.importorskip('triton')
    monkeypatch.setattr(triton, '__version__', '3.3.1')
    monkeypatch.delattr(triton, 'knobs')
    backend_module.import_problem.cache_clear()
    problem = backend_module.import_problem('triton')
    backend_module.import_problem.cache_clear()
    assert problem == 'triton 3.3.1 is older than 3.4, which torch 2.8 brings'


def test_variable_replaces_auto_only(monkeypatch):
    monkeypatch.setenv(backend_module.VARIABLE, 'reference')
    assert choose_backend('auto', CPU) == Choice(
        'reference', "environment variable GROUPMAMBA_BACKEND is 'reference'"
    )
    assert resolve_backend('torch', CPU) == 'torch'
    monkeypatch.setenv(backend_module.VARIABLE, 'auto')
    assert resolve_backend('auto', CPU) == 'torch'
    monkeypatch.setenv(backend_module.VARIABLE, '')
    assert resolve_backend('auto', CPU) == 'torch'


def test_variable_is_validated(monkeypatch):
    monkeypatch.setenv(backend_module.VARIABLE, 'cuda')
    with pytest.raises(ConfigError, match=r"GROUPMAMBA_BACKEND is 'cuda'; choose from \('auto', "):
        resolve_backend('auto', CPU)
    monkeypatch.setenv(backend_module.VARIABLE, 'mamba_ssm')
    with pytest.raises(BackendError, match="GROUPMAMBA_BACKEND is 'mamba_ssm'. cannot run"):
        resolve_backend('auto', CPU)


def test_variable_reaches_a_model(monkeypatch):
    model = GroupMamba(arch=ARCH)
    seen = []
    run = BACKENDS['reference']
    monkeypatch.setitem(BACKENDS, 'reference', lambda *args: (seen.append(1), run(*args))[1])
    monkeypatch.setenv(backend_module.VARIABLE, 'reference')
    model(torch.rand(1, 3, 8, 8))
    assert len(seen) == 2


@pytest.mark.parametrize('name', BACKEND_NAMES)
def test_names_are_accepted_where_a_model_is_built(name):
    assert check_backend(name) == name
    GroupMamba(arch=ARCH, scan_backend=name)


def test_choices_are_remembered_and_said_once(gpu, caplog):
    with caplog.at_level(logging.INFO, 'groupmamba_mm'):
        for dtype in (torch.float32, torch.bfloat16) * 3:
            choose_backend('auto', GPU, dtype)
        for _ in range(3):
            choose_backend('auto', CPU)
    assert gpu.tests == 2  # one for each dtype; check_kernels itself remembers too
    assert len(caplog.records) == 2
    assert all(record.levelno == logging.INFO for record in caplog.records)


def test_warning_is_visible_without_any_logging_set_up():
    script = (
        'import torch\n'
        'from groupmamba_mm.ops import backend\n'
        'backend._triton_problem = lambda *args: "no luck"\n'
        'backend.choose_backend("auto", torch.device("cuda", 0))\n'
        'backend.choose_backend("auto", torch.device("cpu"))\n'
    )
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1:] == ["scan backend 'torch': no luck"]


def test_explanation_names_all(gpu, monkeypatch):
    text = explain_backend()
    assert "'auto' on cuda:0 (Some GPU, capability 9.0), d_state 1" in text
    assert 'is triton, because' in text and 'GROUPMAMBA_BACKEND is not set' in text
    assert re.search(r'mamba_ssm: no, mamba_ssm is not installed; run', text)
    for name in ('torch', 'reference', 'triton'):
        assert re.search(rf'^  {name}: yes', text, re.MULTILINE)
    assert f'torch {torch.__version__}' in text
    gpu.failure = 'wrong'
    clear()
    assert re.search(r'^  triton: no, the self-test .*: wrong', explain_backend(), re.MULTILINE)
    monkeypatch.setenv(backend_module.VARIABLE, 'cuda')
    assert 'is an error: environment variable' in explain_backend()


def test_explanation_on_this_machine():
    text = explain_backend('triton', 'cpu', d_state=20, dtype=torch.bfloat16)
    assert text.startswith("scan backend 'triton' on cpu, d_state 20, bfloat16\n  is an error: ")
    assert 'd_state up to 16, got 20' in text
    with pytest.raises(ValueError, match="unknown scan backend 'cuda'"):
        explain_backend('cuda')


@pytest.mark.parametrize('family', ['paper', 'official'])
def test_compiles_to_one_graph(family):
    torch._dynamo.reset()
    model = GroupMamba(arch=dict(ARCH, family=family)).eval()
    image = torch.rand(1, 3, 8, 12)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(image), model(image))


def test_error_of_a_compiled_model_has_the_reason():
    torch._dynamo.reset()

    def run(x):
        return x + len(resolve_backend('mamba_ssm', x.device))

    with pytest.raises(Exception, match='mamba-ssm needs a CUDA device'):
        torch.compile(run, backend='eager', fullgraph=True)(torch.zeros(1))


def test_the_scan_alone_has_no_triton():
    x = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="no backend 'triton'.*groupmamba_mm.ops.grouped_ssm"):
        selective_scan(
            x,
            x,
            torch.zeros(1, 1),
            x[..., None],
            x[..., None],
            grid=(1, 1),
            directions=('left-right',),
            backend='triton',
        )


# the self-test


def right(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator).to(device)
    leaf = x.clone().requires_grad_()
    y = leaf * 2
    y.sum().backward()
    yield 'double (3, 5), output', y.detach(), x.double() * 2
    yield 'double (3, 5), gradient', leaf.grad.bfloat16(), torch.full_like(x, 2)


def careless(device):
    """Draws from the global generator and leaves another thread's modes alone."""
    assert not torch.is_autocast_enabled('cpu') and not torch.is_inference_mode_enabled()
    x = torch.randn(4)
    yield 'same', x, x


def test_self_test_passes_and_disturbs_nothing(monkeypatch):
    monkeypatch.setattr(self_test, 'CASES', (right, careless))
    state = torch.get_rng_state()
    with torch.autocast('cpu', torch.bfloat16), torch.inference_mode():
        assert self_test.check_kernels(CPU) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('mode', ['fake', 'compile', 'device'])
def test_self_test_is_real_inside_of_other_modes(monkeypatch, mode):
    monkeypatch.setattr(self_test, 'CASES', (right,))
    if mode == 'fake':
        with torch._subclasses.FakeTensorMode():
            assert self_test.check_kernels(CPU) is None
    elif mode == 'device':
        with torch.device('meta'):
            assert self_test.check_kernels(CPU) is None
    else:
        check = torch.compiler.assume_constant_result(lambda: str(self_test.check_kernels(CPU)))
        run = torch.compile(lambda x: x + len(check()), backend='eager', fullgraph=True)
        assert run(torch.zeros(1)).item() == len('None')


@pytest.mark.parametrize(
    'result,expected',
    [
        (
            lambda x: (x * 1.1, x),
            r'off \(4,\) of shape \(4,\) in torch.float32 is off by 1.0e-01 of '
            'its norm, allowed are 5e-02',
        ),
        (lambda x: (x * float('nan'), x), 'is off by nan'),
        (lambda x: (x[:2], x), r'has shape \(2,\) instead of \(4,\)'),
        (lambda x: 1 / 0, 'wrong raised ZeroDivisionError: division by zero'),
    ],
)
def test_self_test_names_what_is_wrong(monkeypatch, result, expected):

    def wrong(device):
        got, right = result(torch.ones(4))
        yield 'off (4,)', got, right

    monkeypatch.setattr(self_test, 'CASES', (right, wrong))
    assert re.search(expected, self_test.check_kernels(CPU))


def test_self_test_runs_once_for_a_device(monkeypatch):
    runs = []

    def count(device):
        runs.append(device)
        yield 'nothing', torch.zeros(1), torch.zeros(1)

    monkeypatch.setattr(self_test, 'CASES', (count,))
    for _ in range(3):
        assert self_test.check_kernels(CPU) is None
    assert runs == [CPU]


def test_a_test_of_nothing_is_no_pass(monkeypatch):
    monkeypatch.setattr(self_test, 'CASES', ())
    assert self_test.check_kernels(CPU) == 'there is no case to test'


@pytest.mark.parametrize('error, passes', [(1e-4, True), (1e-2, False)])
def test_self_test_measures_what_nearly_vanishes_by_the_largest(monkeypatch, error, passes):
    def case(device):
        x = torch.ones(4)
        yield 'output', x, x
        yield 'gradient', 1e-6 * x + error * x, 1e-6 * x

    monkeypatch.setattr(self_test, 'CASES', (case,))
    assert (self_test.check_kernels(CPU) is None) == passes


def test_every_set_of_kernels_has_a_case():
    names = [case.__name__ for case in self_test.CASES]
    assert names == [
        'OfficialBlock of 64 channels',
        'OfficialBlock of 348 channels',
        'ModulatedGroupMambaLayer of 96 channels',
        'ModulatedGroupMambaLayer of 384 channels',
    ]


@pytest.mark.parametrize('family', ['OfficialBlock', 'ModulatedGroupMambaLayer'])
@pytest.mark.parametrize('is_wrong', [False, True])
def test_case_of_a_block(monkeypatch, family, is_wrong):
    """A narrow one, as the interpreter has time for; a kernel whose bias is doubled is found."""
    pytest.importorskip('triton')
    from groupmamba_mm.layers import kernel_cases

    monkeypatch.setenv('TRITON_INTERPRET', '1')
    monkeypatch.setattr(kernel_cases, '_GRID', (3, 2))
    case = kernel_cases._case(getattr(kernel_cases, family), 12, 2)
    monkeypatch.setattr(self_test, 'CASES', (case,))
    if INTERPRETED:  # which cuts off what bf16 cannot hold, where a GPU rounds to nearest
        monkeypatch.setattr(self_test, 'TOLERANCE', 7e-2)
    if is_wrong:
        module = importlib.import_module(
            'groupmamba_mm.ops.blocks.' + ('official' if family == 'OfficialBlock' else 'paper')
        )
        right_norm = module.add_norm_forward
        monkeypatch.setattr(
            module,
            'add_norm_forward',
            lambda x, branch, scale, weight, bias, *rest, **options: right_norm(
                x, branch, scale, weight, 2 * bias, *rest, **options
            ),
        )
    device = CPU if INTERPRETED else torch.device('cuda', 0)
    problem = self_test.check_kernels(device)
    assert (problem is not None) == is_wrong, problem
    assert not is_wrong or re.match(f'{family} of 12 channels, .* is off by', problem)


@pytest.mark.gpu
def test_this_gpu_gets_the_kernels():
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    if torch.cuda.get_device_capability() < backend_module.TRITON_MIN_CAPABILITY:
        pytest.skip('the GPU is too old for the kernels')
    assert self_test.check_kernels(torch.device('cuda', torch.cuda.current_device())) is None
    assert resolve_backend('auto', torch.device('cuda', torch.cuda.current_device())) == 'triton'
