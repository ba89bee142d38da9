"""Kernels compiled by worker processes, without a GPU."""

import json
import os
import shutil
import subprocess
import time

import pytest
import torch

from tests.kernel_testing import needs_triton, run_apart

pytestmark = needs_triton

SCRIPT = """
import json, logging, os, sys
from pathlib import Path
import torch, triton
from groupmamba_mm.ops import precompile, sums
from groupmamba_mm.ops.launch import Launch

logging.basicConfig(level=logging.INFO, stream=sys.stderr, format='%(message)s')
cache = Path(triton.knobs.cache.dir)

def compiled():
    return sorted(path.name for path in cache.rglob('*.cubin'))

def run(dtype=None):
    parts = torch.empty(300, 3)
    for _ in range(2):
        sums.sum_parts(parts, dtype=dtype)
    sums.column_sums(torch.empty(2, 5, 3, dtype=torch.bfloat16))

calls, results = [], {}

def note():
    calls.append(1)
    return precompile.note_launches(run, 90)

results['first'] = precompile.compile_once('model', note, 90, workers=2)
results['kernels'] = compiled()
results['second'] = precompile.compile_once('model', note, 90, workers=2)
results['calls'] = len(calls)
results['markers'] = len(list(cache.glob('groupmamba_mm-*.compiled')))
def note_more():
    return precompile.note_launches(lambda: (run(), run(torch.bfloat16)), 90)

def note_bf16():
    return precompile.note_launches(lambda: run(torch.bfloat16), 80)

results['another model'] = precompile.compile_once('another', note, 90, workers=1)
results['a larger one'] = precompile.compile_once('larger', note_more, 90, workers=1)
results['another GPU'] = precompile.compile_once('model', lambda: [], 80)
results['kernels of all'] = compiled()
results['launchers'] = len(list(cache.rglob('__triton_launcher*')))

# what a launch on the GPU looks up is there: tensors with data are aligned as was assumed
triton.runtime.driver.set_active(precompile.AbsentGPU(90))
sums._sum_parts.warmup(torch.empty(300, 3), torch.empty(3), 300, 3, grid=(1, ),
                       **sums._plan_parts(1, 300, 3)[1])
results['kernels in the end'] = compiled()

wrong = Launch(sums._sum_parts, (None, torch.float32, 'i32', 'i32'),
               (('ROWS', 16), ('COLUMNS', 16)))
try:
    precompile.compile_once('wrong', lambda: [wrong], 90, workers=1)
except RuntimeError as error:
    results['error'] = str(error)
os.environ['CC'] = '/bin/false'  # the kernels are compiled without it
results['without a C compiler'] = precompile.compile_once('yet another', note_bf16, 80, workers=1)
killed = precompile._Compiler(90, 1)
killed._process.kill()
try:
    killed.compile([wrong])
except RuntimeError as error:
    results['killed'] = str(error)
killed.close()
results['markers in the end'] = len(list(cache.glob('groupmamba_mm-*.compiled')))
print(json.dumps(results))
"""


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    # as on a machine without a GPU, where a stub of NVIDIA's driver can be linked with alone
    driver = tmp_path_factory.mktemp('driver')
    library = ['-shared', '-o', str(driver / 'libcuda.so.1'), '-x', 'c', '/dev/null']
    subprocess.run([shutil.which('cc') or 'gcc', *library], check=True)
    cache = tmp_path_factory.mktemp('cache')
    done = run_apart('-c', SCRIPT, TRITON_CACHE_DIR=str(cache), TRITON_LIBCUDA_PATH=str(driver))
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]), log=done.stderr)


def test_each_kernel_is_compiled_once(results):
    # _sum_parts in all its tiles, and _column_sums
    assert results['first'] == 9
    assert results['kernels'] == ['_column_sums.cubin'] + 8 * ['_sum_parts.cubin']
    assert 'compiling 9 kernels for capability 9.0 in 2 processes, once' in results['log']
    assert 'compiled 9 kernels in ' in results['log']


def test_what_was_done_before_takes_nothing(results):
    assert results['second'] == 0 and results['calls'] == 1
    assert results['markers'] == 1


def test_other_models_and_gpus_are_no_matter_of_the_first(results):
    assert results['another GPU'] == 0
    assert results['markers in the end'] == 5  # none of what failed


def test_what_models_share_is_compiled_once(results):
    assert results['another model'] == 0 and results['a larger one'] == 8
    assert results['kernels of all'] == ['_column_sums.cubin'] + 16 * ['_sum_parts.cubin']


def test_launches_find_what_was_compiled(results):
    assert results['kernels in the end'] == results['kernels of all']


def test_the_functions_that_launch_are_built_with_the_kernels(results):
    # one for _sum_parts, whatever its pointers point to, and one for _column_sums
    assert results['launchers'] == 2


def test_a_kernel_that_does_not_compile_is_named(results):
    assert results['error'].startswith(
        'kernel _sum_parts of groupmamba_mm.ops.sums does not compile: CompilationError'
    )


def test_launchers_that_cannot_be_built_ahead_are_no_failure(results):
    assert results['without a C compiler'] == 17  # all noted for that GPU


ABANDON = """
import os
from groupmamba_mm.ops import precompile, sums
import torch

compiler = precompile._Compiler(90, 1)
launches = precompile.note_launches(
    lambda: [sums.sum_parts(torch.empty(300, 3), dtype=t) for t in (None, torch.bfloat16)], 90)
original = precompile.pickle.load

def load(file):
    print(original(file), flush=True)
    print(compiler._process.pid, flush=True)
    os._exit(1)

precompile.pickle.load = load
compiler.compile(launches)
"""


def test_compiling_ends_with_the_run_that_asked_for_it(tmp_path):
    done = run_apart('-c', ABANDON, TRITON_CACHE_DIR=str(tmp_path))
    group = int(done.stdout.split()[-1])
    end = time.monotonic() + 5
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.05)


def test_a_compiler_that_is_killed_is_an_error(results):
    assert results['killed'] == 'the process that compiles kernels ended with code -9'


def test_gpu_that_is_absent():
    from groupmamba_mm.ops.precompile import AbsentGPU

    gpu = AbsentGPU(86)
    target = gpu.get_current_target()
    assert (target.backend, target.arch, target.warp_size) == ('cuda', 86, 32)
    assert gpu.get_current_device() == gpu.get_current_stream(0) == 0


@pytest.mark.parametrize('capability, kib', [(80, 163), (86, 99), (90, 227), (100, 227)])
def test_shared_memory_is_that_of_the_gpu_that_is_meant(capability, kib):
    from groupmamba_mm.ops.gpu import shared_memory
    from groupmamba_mm.ops.precompile import note_launches

    seen = []
    note_launches(lambda: seen.append(shared_memory(torch.device('cpu'))), capability)
    assert seen == [kib * 1024]
