"""What kernels ask about a GPU."""

import functools

import torch

from . import tracing

#: Shared memory that a program may take on an H100, in bytes.
H100_SMEM_BYTES = 227 * 1024
#: The same by compute capability, for GPUs that are not there to be asked.
_SMEM_BYTES = {80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 89: 99 * 1024, 120: 99 * 1024}


def shared_memory(device: torch.device) -> int:
    """Shared memory that a program may take, in bytes; without a GPU as on an H100."""
    if tracing.noted() is not None:
        return tracing.shared_memory()
    if device.type != 'cuda' or not torch.cuda.is_available():
        return H100_SMEM_BYTES
    return _shared_memory(device)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def shared_memory_of(capability: int) -> int:
    """Of GPUs of a compute capability (90 is 9.0)."""
    return _SMEM_BYTES.get(capability, H100_SMEM_BYTES)


def has_large_smem(device: torch.device) -> bool:
    """Whether a program may take as much shared memory as on an H100."""
    return shared_memory(device) >= H100_SMEM_BYTES
