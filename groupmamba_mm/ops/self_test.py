"""The first-use test of the Triton kernels on this GPU with this Triton."""

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger('groupmamba_mm')

#: A case runs kernels on a device, forward and backward, and yields for each of its results what
#: it is (block, which output or gradient), the kernels' tensor, and the expected one. It draws its
#: inputs with a seed of its own. What it raises counts as a failure.
Case = Callable[[torch.device], Iterable[tuple[str, Tensor, Tensor]]]

#: What is tested; see :func:`register_case`.
CASES: list[Case] = []

_state = threading.local()


def register_case(case: Case) -> Case:
    """Add a case. Those of the blocks are in ``layers/kernel_cases.py``, beside what they check."""
    CASES.append(case)
    return case


def is_running() -> bool:
    """Whether this thread runs the test, whose kernels must not wait for its outcome."""
    return getattr(_state, 'runs', False)


#: Largest error, as norm of the difference over norm of the expected tensor, or, for gradients
#: that nearly vanish, over SMALL of the largest norm in a case. All cases multiply in bf16. It is
#: several times what correct kernels lose by rounding: a wrong kernel is off by far more.
TOLERANCE, SMALL = 5e-2, 1e-2


@functools.cache
def check_kernels(device: torch.device) -> str | None:
    """Run :data:`CASES` on a device, once for each device in a process.

    What passed before with the compiled kernels of this cache passes: they are the same. The
    random state is left as it was.

    Args:
        device: A device on which the kernels should run.

    Returns:
        None if all results are right, else a sentence with the first wrong one.
    """
    if not CASES:
        return 'there is no case to test'
    passed = _passed_before(device)
    if passed is not None and passed.exists():
        return None
    start = time.perf_counter()
    # The first use may be inside autocast, inference mode, torch.export's fake tensors or a trace.
    # All of them belong to one thread, so that a new one is free of them.
    with ThreadPoolExecutor(max_workers=1) as pool:
        failure = pool.submit(_run, device).result()
    if failure is None:
        logger.info(
            f'self-test of the Triton kernels on {device} passed in '
            f'{time.perf_counter() - start:.1f} s'
        )
        if passed is not None:
            try:
                passed.touch()
            except OSError as error:
                logger.info(f'the self-test will run again next time: {error}')
    return failure


def _passed_before(device: torch.device) -> Path | None:
    """The file that says that the same compiled kernels passed on such a GPU; None without one."""
    if device.type != 'cuda':
        return None
    from .cache import marker

    names = tuple(case.__qualname__ for case in CASES)
    return marker('passed', torch.cuda.get_device_name(device), torch.version.cuda, names)


def _run(device: torch.device) -> str | None:
    _state.runs = True
    cuda = [device] if device.type == 'cuda' else []
    with torch.random.fork_rng(devices=cuda), torch.cuda.device(cuda[0] if cuda else -1):
        for case in CASES:
            what = getattr(case, '__name__', 'a case')
            results = []
            try:
                for what, got, expected in case(device):
                    results.append((what, got, expected.double()))
            # a compiler or a launch can raise anything; the caller decides what it means
            except Exception as error:
                first_line = (str(error).strip().splitlines() or [''])[0]
                return f'{what} raised {type(error).__name__}: {first_line}'
            largest = max((expected.norm().item() for _, _, expected in results), default=0.0)
            for what, got, expected in results:
                failure = _compare(what, got, expected, SMALL * largest)
                if failure is not None:
                    return failure
    return None


def _compare(what: str, got: Tensor, expected: Tensor, floor: float) -> str | None:
    if got.shape != expected.shape:
        return f'{what} has shape {tuple(got.shape)} instead of {tuple(expected.shape)}'
    scale = max(expected.norm().item(), floor, torch.finfo(torch.float32).tiny)
    error = (got.double() - expected).norm().item() / scale
    if error <= TOLERANCE:  # false for NaN
        return None
    return (
        f'{what} of shape {tuple(got.shape)} in {got.dtype} is off by {error:.1e} of its norm, '
        f'allowed are {TOLERANCE:.0e}'
    )
