"""What kernels ask about a GPU."""
import functools

import torch

#: Shared memory that a program may take on an H100, in bytes. Other GPUs allow 99 to 163 KiB.
ROOMY_BYTES = 227 * 1024


@functools.lru_cache(maxsize=None)
def is_roomy(device: torch.device) -> bool:
    """Whether a program may take as much shared memory as on an H100; without a GPU it may."""
    return (device.type != 'cuda' or torch.cuda.get_device_properties(
        device).shared_memory_per_block_optin >= ROOMY_BYTES)
