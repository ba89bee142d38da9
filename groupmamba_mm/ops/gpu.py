"""What kernels ask about a GPU."""
import functools

import torch

#: Shared memory that a program may take on an H100, in bytes. Other GPUs allow 99 to 163 KiB.
ROOMY_BYTES = 227 * 1024


@functools.lru_cache(maxsize=None)
def shared_memory(device: torch.device) -> int:
    """Shared memory that a program may take, in bytes; without a GPU as on an H100."""
    if device.type != 'cuda':
        return ROOMY_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def is_roomy(device: torch.device) -> bool:
    """Whether a program may take as much shared memory as on an H100."""
    return shared_memory(device) >= ROOMY_BYTES
