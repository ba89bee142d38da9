"""Kernels compiled side by side before they are needed, instead of one by one as they are met.

Triton compiles a kernel at its first launch, on one core: minutes for a model. What a model will
launch is known before, from a pass over tensors without data (:func:`note_launches`). Processes
compile that into Triton's cache on disk, where it survives, and with it the small C function that
launches each kind of kernel. They need no GPU, so that a login node can do it for a cluster
(``tools/compile_kernels.py``); without NVIDIA's driver the C functions, some 15 s on one core, are
left to the first run.
"""

import contextlib
import fcntl
import hashlib
import importlib
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from .cache import directory, marker
from .gpu import shared_memory_of
from .launch import Launch
from .tracing import noting_launches

logger = logging.getLogger('groupmamba_mm')

#: Seconds between two lines of progress.
_PROGRESS_SECONDS = 5


class AbsentGPU:
    """What Triton asks its driver about when it compiles for a GPU that need not be there.

    Args:
        capability: Of the GPU: 90 is 9.0.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        """The GPU to compile for."""
        return triton.backends.compiler.GPUTarget('cuda', self.capability, 32)

    def get_current_device(self) -> int:
        """A number under which Triton keeps what it compiled."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched."""
        return 0


def note_launches(run: Callable[[], object], capability: int) -> list[Launch]:
    """What ``run`` would launch on a GPU, each kind once.

    Args:
        run: Makes its tensors, on the CPU, and calls a model; they will have no data.
        capability: Of the GPU: 90 is 9.0.
    """
    with (
        noting_launches(shared_memory_of(capability)) as launches,
        torch.inference_mode(False),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        run()
    return list(dict.fromkeys(launches))


def compile_once(
    key: object, note: Callable[[], Iterable[Launch]], capability: int, workers: int | None = None
) -> int:
    """Compile what a model launches, unless that was done with this cache before.

    Of several processes on a machine the first one compiles and the others wait. What another key
    launched before is not compiled again.

    Args:
        key: What the launches depend on, beside the versions of this package and Triton.
        note: Returns them, as :func:`note_launches`.
        capability: Of the GPU: 90 is 9.0.
        workers: Processes; None: one for each core.

    Returns:
        How many kernels were compiled; 0 if all of it was done before.

    Raises:
        OSError: The cache cannot be written.
    """
    done, cache = marker('compiled', key, capability), directory()
    if done.exists():
        return 0
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / 'groupmamba_mm.lock'):
        if done.exists():
            return 0
        start = time.perf_counter()
        list_of_compiled = marker('launches', capability)
        compiled = set(list_of_compiled.read_text().split()) if list_of_compiled.exists() else set()
        count = workers or len(os.sched_getaffinity(0))
        with contextlib.closing(_Compiler(capability, count)) as compiler:  # imports meanwhile
            launches = {_digest(item): item for item in note()}
            missing = [item for digest, item in launches.items() if digest not in compiled]
            if missing:
                logger.info(
                    f'compiling {len(missing)} kernels for capability {capability / 10} in '
                    f'{min(count, len(missing))} processes, once ({cache})'
                )
                compiler.compile(missing)
                list_of_compiled.write_text('\n'.join(sorted(compiled | set(launches))))
                seconds = time.perf_counter() - start
                logger.info(f'compiled {len(missing)} kernels in {seconds:.0f} s')
        done.touch()
        return len(missing)


def _digest(launch: Launch) -> str:
    """A short name of all that a launch compiles."""
    identity = repr((_name(launch.function), launch.kinds, launch.constants))
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


#: The kernels that take longest to compile, which therefore begin first.
_SLOW = ('_grid_backward', 'scan_backward_kernel', 'scan_forward_kernel', '_residual_gradients')

#: It wants the operators of the package alone: an empty parent spares it the imports of mmengine
#: and others, which take longer than most kernels.
_COMPILER = """
import os, sys, types
parent = types.ModuleType('groupmamba_mm')
parent.__path__ = [os.path.join(sys.argv[1], 'groupmamba_mm')]
sys.modules['groupmamba_mm'] = parent
results = os.fdopen(os.dup(1), 'wb')
os.dup2(2, 1)  # whatever prints must not disturb the answers
from groupmamba_mm.ops.precompile import work
work(int(sys.argv[2]), int(sys.argv[3]), sys.stdin.buffer, results)
"""


class _Compiler:
    """A process that compiles in others, which it forks from itself, so that PyTorch and Triton are
    imported once. It is started apart, as a process with a GPU and threads must not fork.

    Args:
        capability: Of the GPU: 90 is 9.0.
        workers: Processes at most.
    """

    def __init__(self, capability: int, workers: int) -> None:
        environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
        package = str(Path(__file__).resolve().parents[2])
        environment['PYTHONPATH'] = os.pathsep.join(
            filter(None, (package, environment.get('PYTHONPATH')))
        )
        self._process = subprocess.Popen(
            [sys.executable, '-c', _COMPILER, package, str(capability), str(workers)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a group, to be ended together
        )

    def compile(self, launches: Sequence[Launch]) -> None:
        """Compile what is launched, with progress in the log.

        Raises:
            RuntimeError: A kernel does not compile; the message has the compiler's.
        """
        jobs = sorted(
            ((*_name(item.function), item.kinds, item.constants) for item in launches),
            key=lambda job: job[1] not in _SLOW,
        )
        last = time.perf_counter()
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None  # pipes
        try:
            pickle.dump(jobs, stdin)
            stdin.flush()
            for number in range(1, len(jobs) + 1):
                index, problem = pickle.load(stdout)
                if problem is not None:
                    module, name, *_ = jobs[index]
                    raise RuntimeError(f'kernel {name} of {module} does not compile: {problem}')
                if time.perf_counter() - last >= _PROGRESS_SECONDS:
                    last = time.perf_counter()
                    logger.info(f'compiled {number} of {len(jobs)} kernels')
        except (EOFError, BrokenPipeError) as error:
            code = self._process.wait()
            raise RuntimeError(
                f'the process that compiles kernels ended with code {code}'
            ) from error

    def close(self) -> None:
        """End all processes; what they have written is whole."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def work(capability: int, workers: int, jobs: BinaryIO, results: BinaryIO) -> None:
    """Read jobs, compile them in forked processes, and answer each, as it is done, with its number
    and None or what is wrong with it.
    """
    triton.runtime.driver.set_active(AbsentGPU(capability))
    launcher = _launcher_class()
    todo = pickle.load(jobs)
    for module in {module for module, *_ in todo}:
        importlib.import_module(module)
    context = multiprocessing.get_context('fork')
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
        waiting = {pool.submit(_compile, job, launcher): n for n, job in enumerate(todo)}
        # after the forks, which threads would disturb
        threading.Thread(target=_end_with, args=(jobs,), daemon=True).start()
        for finished in as_completed(waiting):
            failure = finished.exception()  # a process that was killed
            problem = (
                finished.result() if failure is None else f'{type(failure).__name__}: {failure}'
            )
            pickle.dump((waiting[finished], problem), results)
            results.flush()


def _end_with(pipe: BinaryIO) -> None:
    """End all processes of this group when the one that started them is gone, however it ended."""
    pipe.read()
    os.killpg(0, signal.SIGKILL)


def _compile(job: tuple, launcher: type | None) -> str | None:
    """Compile a job; returns what is wrong with it."""
    module, name, kinds, constants = job
    try:
        function = getattr(importlib.import_module(module), name)
        kernel = function.warmup(*map(_example, kinds), grid=(1,), **dict(constants))
    # a compiler can raise anything; whoever sent the job decides what it means
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    if launcher is not None:
        # It is in the cache before it is loaded, which takes the driver itself. Without a C compiler,
        # or with another Triton, the first launch builds it, or says why it cannot.
        with contextlib.suppress(Exception):
            launcher(kernel.src, kernel.metadata)
    return None


def _launcher_class() -> type | None:
    """What builds the C function that launches a kernel; None without NVIDIA's driver, which it is
    linked with.
    """
    with contextlib.suppress(Exception):  # these names are Triton's own affair
        from triton.backends.nvidia import driver

        driver.library_dirs()
        return driver.CudaLauncher
    return None


def _example(kind):
    """An argument of a kind of :class:`Launch`: the dtype itself stands for a tensor."""
    return {'i32': 2, 'i64': 2**40, 'fp32': 0.5}.get(kind, kind)


def _name(function) -> tuple[str, str]:
    return function.__module__, function.__name__


@contextlib.contextmanager
def _locked(path: Path):
    """For one process at a time; the system gives the lock back if one dies."""
    with path.open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
