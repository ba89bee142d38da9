"""The first-use test of the Triton kernels on this GPU with this Triton."""
import functools
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterator, Optional, Tuple

import torch
from torch import Tensor

logger = logging.getLogger('groupmamba_mm')

#: A case runs a kernel on a device, forward and backward, and yields for each of its results what
#: it is (kernel, shape, which output or gradient), the kernel's tensor, and the expected one. It
#: draws its inputs with a seed of its own. What it raises counts as a failure.
Case = Callable[[torch.device], Iterator[Tuple[str, Tensor, Tensor]]]

#: What is tested.
CASES: Tuple[Case, ...] = ()

#: Largest error by the kernel's dtype, as norm of the difference over norm of the expected tensor.
#: Several times what correct kernels lose by rounding: a wrong kernel is off by far more.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}


@functools.lru_cache(maxsize=None)
def check_kernels(device: torch.device) -> Optional[str]:
    """Run :data:`CASES` on a device, once for each device in a process.

    The first call compiles the kernels (seconds). The random state is left as it was.

    Args:
        device: A device on which the kernels should run.

    Returns:
        None if all results are right, else a sentence with the first wrong one.
    """
    if not CASES:
        return 'there is no case to test'
    start = time.perf_counter()
    # The first use may be inside autocast, inference mode, torch.export's fake tensors or a trace.
    # All of them belong to one thread, so that a new one is free of them.
    with ThreadPoolExecutor(max_workers=1) as pool:
        failure = pool.submit(_run, device).result()
    if failure is None:
        logger.info(f'self-test of the Triton kernels on {device} passed in '
                    f'{time.perf_counter() - start:.1f} s')
    return failure


def _run(device: torch.device) -> Optional[str]:
    cuda = [device] if device.type == 'cuda' else []
    with torch.random.fork_rng(devices=cuda), torch.cuda.device(cuda[0] if cuda else -1):
        for case in CASES:
            what = case.__name__
            try:
                for what, got, expected in case(device):
                    failure = _compare(what, got, expected)
                    if failure is not None:
                        return failure
            # a compiler or a launch can raise anything; the caller decides what it means
            except Exception as error:
                first_line = (str(error).strip().splitlines() or [''])[0]
                return f'{what} raised {type(error).__name__}: {first_line}'
    return None


def _compare(what: str, got: Tensor, expected: Tensor) -> Optional[str]:
    if got.shape != expected.shape:
        return f'{what} has shape {tuple(got.shape)} instead of {tuple(expected.shape)}'
    tolerance = TOLERANCES[got.dtype]
    expected = expected.double()
    scale = expected.norm().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((got.double() - expected).norm() / scale).item()
    if error <= tolerance:  # false for NaN
        return None
    return (f'{what} of shape {tuple(got.shape)} in {got.dtype} is off by {error:.1e} of its norm, '
            f'allowed are {tolerance:.0e}')
