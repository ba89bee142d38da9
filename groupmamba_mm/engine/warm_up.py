"""What a GPU needs before its first kernel, done while a command reads its config and its data."""

import functools
import importlib
import importlib.util
import os
import threading

import torch


def local_rank() -> int:
    """The number of this process among those of a launch on this machine, 0 without a launcher."""
    names = ('LOCAL_RANK', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK')
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def warm_up_ahead() -> None:
    """Have threads load what the first step would wait for, on a machine with a GPU.

    That is a second and a half: the GPU's context, cuBLAS and cuDNN, and the hash of itself by which
    Triton names the files in its cache. What fails here says so again where it is needed.
    """
    if not torch.cuda.is_available():
        return
    device = torch.device('cuda', local_rank() % torch.cuda.device_count())
    # no daemons: a command that ends at once must not pull the driver from under them
    threading.Thread(target=_load_libraries, args=(device,)).start()
    if importlib.util.find_spec('triton') is not None:
        cache = importlib.import_module('triton.runtime.cache')
        if hasattr(cache, 'triton_key'):  # not in every version
            threading.Thread(target=cache.triton_key).start()


def _load_libraries(device: torch.device) -> None:
    """A convolution and a product of zeros, there and back; no random number is drawn."""
    has_bf16 = device.type == 'cpu' or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if has_bf16 else torch.float16  # whose kernels a training will use
    zeros = functools.partial(torch.zeros, dtype=dtype, device=device, requires_grad=True)
    image = zeros(2, 8, 16, 16).to(memory_format=torch.channels_last)
    features = torch.nn.functional.conv2d(image, zeros(8, 8, 3, 3), stride=2, padding=1)
    (features.flatten(1) @ zeros(512, 16)).sum().backward()
