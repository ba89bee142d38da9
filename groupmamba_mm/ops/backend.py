"""Which backend runs, and why: the one place that decides."""

import functools
import importlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

from groupmamba_mm.errors import BackendError, ConfigError

from . import self_test, tracing
from .self_test import check_kernels

#: The names a user may give.
BACKEND_NAMES = ('auto', 'torch', 'reference', 'triton', 'mamba_ssm')

#: Environment variable with the name of the backend that 'auto' stands for.
VARIABLE = 'GROUPMAMBA_BACKEND'

#: Limits of the Triton kernels.
TRITON_MAX_D_STATE = 16
TRITON_MIN_CAPABILITY = (8, 0)
TRITON_MAX_GROUPS = 17  # their directions are the bits of one number, exact as a float
TRITON_NARROW = 128  # up to so many channels of a group every such GPU has the shared memory

#: Limit of mamba-ssm's kernel.
MAMBA_MAX_D_STATE = 256

#: transformers: from 5 on, `import mmpretrain.models` fails.
MAMBA_INSTALL = (
    '`pip install mamba-ssm --no-build-isolation "transformers>=4.53,<5"` (it builds '
    'with nvcc; tested versions: requirements/tested.txt)'
)

# Propagates to the root logger like any other: without a configuration Python prints warnings to
# stderr and drops the rest. mmengine's loggers stand outside this tree; CheckedRunner lends theirs.
logger = logging.getLogger('groupmamba_mm')


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it.

    Args:
        name: 'torch', 'reference', 'triton' or 'mamba_ssm'.
        reason: Half a sentence for people.
    """

    name: str
    reason: str


_logged: set[Choice] = set()


def check_backend(backend: str) -> str:
    """Return ``backend`` if it is one of :data:`BACKEND_NAMES`.

    Raises:
        ValueError: It is not; the message lists the names.
    """
    if backend not in BACKEND_NAMES:
        raise ValueError(f'unknown scan backend {backend!r}; choose from {BACKEND_NAMES}')
    return backend


def choose_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    d_state: int = 1,
    groups: int = 1,
    width: int = 1,
    dt_rank: int = 1,
) -> Choice:
    """Decide which backend runs on tensors of a kind.

    'auto' is what the environment variable ``GROUPMAMBA_BACKEND`` names, if it is set. Else it is
    'triton' where the kernels run and pass their self-test, and 'torch' everywhere else. Any other
    name is that backend, or an error.

    Args:
        backend: One of :data:`BACKEND_NAMES`.
        device: Where the tensors are.
        dtype: Their dtype, or None for one that every backend takes.
        d_state: State size N.
        groups: Number of groups G.
        width: Channels d of a group in the scan, if a LayerNorm over them follows: one program then
            owns them all.
        dt_rank: Rank of the projection to dt.

    Returns:
        The choice. It is remembered, and logged once: as a warning where a GPU does not get its
        kernels.

    Raises:
        ValueError: Unknown name.
        ConfigError: Unknown name in the environment variable.
        BackendError: A backend asked for by name cannot run; the message has the remedy.
    """
    if tracing.noted() is not None and backend in ('auto', 'triton'):
        return Choice('triton', 'its launches are noted, not run')
    wanted = os.environ.get(VARIABLE, '') if backend == 'auto' else ''
    return _choose(
        check_backend(backend), wanted, torch.device(device), dtype, d_state, groups, width, dt_rank
    )


@torch.compiler.assume_constant_result
def resolve_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    d_state: int = 1,
    groups: int = 1,
    width: int = 1,
    dt_rank: int = 1,
) -> str:
    """The name alone of :func:`choose_backend`; torch.compile takes it for a constant."""
    return choose_backend(backend, device, dtype, d_state, groups, width, dt_rank).name


@functools.cache
def _choose(
    backend: str,
    wanted: str,
    device: torch.device,
    dtype: torch.dtype | None,
    d_state: int,
    groups: int,
    width: int,
    dt_rank: int,
) -> Choice:
    level, by = logging.INFO, 'asked for by name'
    if wanted:
        if wanted not in BACKEND_NAMES:
            raise ConfigError(
                f'environment variable {VARIABLE} is {wanted!r}; choose from '
                f'{BACKEND_NAMES}, or unset it'
            )
        backend, by = wanted, f'environment variable {VARIABLE} is {wanted!r}'
    if backend == 'auto':
        problem = _no_gpu(device) or _triton_problem(device, dtype, d_state, groups, width, dt_rank)
        if problem is None:
            choice = Choice('triton', f'{_triton_state(device)} on {_describe(device)}')
        else:
            choice = Choice('torch', problem)
            if device.type == 'cuda':
                level = logging.WARNING
    else:
        problem = _problem(backend, device, dtype, d_state, groups, width, dt_rank)
        if problem is not None:
            raise BackendError(
                f'scan backend {backend!r} ({by}) cannot run: {problem}; or use '
                "'torch', which runs everywhere"
            )
        choice = Choice(backend, by)
    if choice not in _logged:
        _logged.add(choice)
        # one ready text: mmengine's handlers drop warnings whose template was seen before
        logger.log(level, f'scan backend {choice.name!r}: {choice.reason}')
    return choice


def _no_gpu(device: torch.device) -> str | None:
    """Why 'auto' needs no look at the kernels, not even at Triton's interpreter."""
    if device.type != 'cuda':
        return f'the kernels need a CUDA device, the tensors are on {device}'
    if is_interpreted():
        return "TRITON_INTERPRET=1 makes the kernels slow; name 'triton' if they are meant"
    return None


def _problem(
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None,
    d_state: int,
    groups: int = 1,
    width: int = 1,
    dt_rank: int = 1,
) -> str | None:
    """Why a backend cannot run, with the remedy, or None."""
    if backend == 'triton':
        return _triton_problem(device, dtype, d_state, groups, width, dt_rank)
    if backend == 'mamba_ssm':
        return _mamba_problem(device, dtype, d_state)
    return None


def _triton_problem(
    device: torch.device,
    dtype: torch.dtype | None,
    d_state: int,
    groups: int,
    width: int,
    dt_rank: int,
) -> str | None:
    if dtype == torch.float64:
        return 'the kernels have no fp64'
    if d_state > TRITON_MAX_D_STATE:
        return f'the kernels take d_state up to {TRITON_MAX_D_STATE}, got {d_state}'
    if groups > TRITON_MAX_GROUPS:
        return f'the kernels take up to {TRITON_MAX_GROUPS} groups, got {groups}'
    missing = import_problem('triton')
    if missing is not None:
        return f'{missing}; run `pip install triton` (Linux only; PyTorch for CUDA brings it)'
    if device.type != 'cuda':
        if is_interpreted():
            return None
        return (
            f'the kernels need a CUDA device, the tensors are on {device} (to try the kernels '
            'there, very slowly, set TRITON_INTERPRET=1)'
        )
    if not torch.cuda.is_available():
        return 'PyTorch sees no CUDA device'
    if is_interpreted():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_MIN_CAPABILITY:
        return (
            f'{_describe(device)} is older than the capability '
            f'{_dotted(TRITON_MIN_CAPABILITY)} that the kernels were written for'
        )
    if width > TRITON_NARROW:
        needed = _shared_memory(width, dt_rank, d_state)
        properties: Any = torch.cuda.get_device_properties(device)
        there = properties.shared_memory_per_block_optin
        if needed > there:
            return (
                f'the kernels need {needed // 1024} KB of shared memory for groups of {width} '
                f'channels that share a LayerNorm, {_describe(device)} has {there // 1024} KB; '
                'more groups (num_groups) are narrower'
            )
    failed = None if self_test.is_running() else check_kernels(device)
    if failed is not None:
        return (
            f'the self-test of the Triton kernels failed on {_describe(device)}, '
            f'{_versions("triton")}: {failed}'
        )
    return None


def _shared_memory(width: int, dt_rank: int, d_state: int) -> int:
    """Bytes that the scan's backward kernel with a norm needs: at least what Triton 3.6 takes.

    One projection's weights and some tiles of 16 tokens, both padded to powers of two. Where a GPU
    has more, the kernel takes more (``grouped_ssm/launch.py``).
    """
    channels, columns = (1 << (n - 1).bit_length() for n in (width, max(16, dt_rank + 2 * d_state)))
    return 4 * channels * (columns + 48)


def _mamba_problem(device: torch.device, dtype: torch.dtype | None, d_state: int) -> str | None:
    if dtype == torch.float64:
        return 'mamba-ssm has no fp64'
    if d_state > MAMBA_MAX_D_STATE:
        return f'mamba-ssm takes d_state up to {MAMBA_MAX_D_STATE}, got {d_state}'
    if device.type != 'cuda':
        return f'mamba-ssm needs a CUDA device, the tensors are on {device}'
    missing = import_problem('mamba_ssm')
    return None if missing is None else f'{missing}; run {MAMBA_INSTALL}'


@functools.cache
def import_problem(module: str) -> str | None:
    """Why a package cannot be imported, in a few words, or None. Remembered."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return f'{module} is not installed'
        return f'{module} cannot be imported ({error})'
    # an extension built for another torch or GPU can raise anything
    except Exception as error:
        return f'{module} cannot be imported ({type(error).__name__}: {_first_line(error)})'
    if module == 'triton' and not hasattr(found, 'knobs'):
        return f'triton {found.__version__} is older than 3.4, which torch 2.8 brings'
    return None


def is_interpreted() -> bool:
    """Whether Triton's kernels are interpreted; the variable counts before their import."""
    return os.environ.get('TRITON_INTERPRET') == '1'


def _triton_state(device: torch.device) -> str:
    if device.type != 'cuda' or is_interpreted():
        return f'{_versions("triton")}, interpreted (very slow)'
    return f'{_versions("triton")}, self-test passed'


def _describe(device: torch.device) -> str:
    if device.type != 'cuda' or not torch.cuda.is_available():
        return str(device)
    return (
        f'{device} ({torch.cuda.get_device_name(device)}, capability '
        f'{_dotted(torch.cuda.get_device_capability(device))})'
    )


def _dotted(capability) -> str:
    return '.'.join(str(number) for number in capability)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [''])[0]


def _versions(*modules: str) -> str:
    """Names and versions; a package that cannot be imported is named with the reason."""
    return ', '.join(
        import_problem(module)
        or f'{module} {getattr(importlib.import_module(module), "__version__", "(no version)")}'
        for module in modules
    )


def explain_backend(
    backend: str = 'auto',
    device: str | torch.device | None = None,
    d_state: int = 1,
    dtype: torch.dtype | None = None,
) -> str:
    """Say which backend would run, why, and what stands against each of the others.

    Args:
        backend: One of :data:`BACKEND_NAMES`.
        device: Where the tensors would be. None: the current CUDA device, else the CPU.
        d_state: State size N.
        dtype: Dtype of the tensors, or None for one that every backend takes.

    Returns:
        Several lines for people.

    Raises:
        ValueError: Unknown name.
    """
    check_backend(backend)
    if device is None:
        device = (
            torch.device('cuda', torch.cuda.current_device())
            if torch.cuda.is_available()
            else 'cpu'
        )
    device = torch.device(device)
    try:
        choice = choose_backend(backend, device, dtype, d_state)
        outcome = f'{choice.name}, because: {choice.reason}'
    except (BackendError, ConfigError) as error:
        outcome = f'an error: {error}'
    kind = '' if dtype is None else f', {str(dtype).replace("torch.", "")}'
    lines = [
        f'scan backend {backend!r} on {_describe(device)}, d_state {d_state}{kind}',
        f'  is {outcome}',
        f'  {VARIABLE} is {os.environ.get(VARIABLE) or "not set"}',
    ]
    notes = {
        'reference': ', a slow loop over the tokens',
        'triton': '',
        'torch': '',
        'mamba_ssm': '',
    }
    if import_problem('triton') is None:
        notes['triton'] = f', {_triton_state(device)}'
    if import_problem('causal_conv1d') is None:
        notes['mamba_ssm'] = ", with causal_conv1d for the paper family's convolution"
    else:
        notes['mamba_ssm'] = ", with PyTorch's convolution as causal_conv1d is missing"
    for name in BACKEND_NAMES[1:]:
        problem = _problem(name, device, dtype, d_state)
        lines.append(f'  {name}: ' + (f'yes{notes[name]}' if problem is None else f'no, {problem}'))
    lines.append(
        f'  versions: torch {torch.__version__}, '
        f'{_versions("triton", "mamba_ssm", "causal_conv1d")}'
    )
    return '\n'.join(lines)
