"""How every Triton function of this package is launched, or only noted down.

Triton looks at each argument of each launch to choose among a function's compiled versions: 30 to
60 us for functions like these, of which a training step launches nearly a thousand. Here no
integer decides on a version (all are in ``do_not_specialize``), so that precisions, constants and
the alignment of pointers are a complete key, and what is compiled is called directly.

For the same reason a new image size, or batch size, compiles nothing.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .tracing import noted

#: Whether Triton's interpreter runs the kernels, on any device: an environment variable decides
#: when they are imported.
INTERPRETED = triton.knobs.runtime.interpret

_current_device = torch.cuda.current_device
_current_stream = getattr(torch._C, '_cuda_getCurrentRawStream', None)
_versions: dict[tuple, tuple] = {}


class Launch(NamedTuple):
    """One launch, without its data: what has to be compiled for it.

    Attributes:
        function: The Triton function.
        kinds: Of its arguments: dtypes of tensors, ``'i32'``, ``'i64'``, ``'fp32'`` or None.
        constants: Names and values of constants and options.
    """

    function: triton.runtime.KernelInterface
    kinds: tuple
    constants: tuple[tuple[str, object], ...]


def rows_of(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """A (B, L, W) tensor whose B * L rows lie at one distance, copied if need be; the distance."""
    if tensor is None:
        return None, 0
    batch, length, width = tensor.shape
    of_image, row, of_channel = tensor.stride()
    is_even = length == 1 or batch <= 1 or of_image == length * row
    if length == 1:
        row = of_image if batch > 1 else width
    if not is_even or (of_channel != 1 and width > 1):
        return tensor.contiguous(), width
    return tensor, row


def is_abstract(tensor: Tensor) -> bool:
    """Whether a tensor has a shape but no data, as when PyTorch traces; not where launches are
    noted, which need their plans.
    """
    return noted() is None and (isinstance(tensor, FakeTensor) or tensor.is_meta)


def launch(
    function: triton.runtime.KernelInterface, grid: tuple[int, ...], *args, **constants
) -> None:
    """Run a Triton function on its first argument's device, in the current stream.

    Args:
        function: All its integers are in ``do_not_specialize``; constants come last.
        grid: Number of programs, up to three dimensions.
        args: Its arguments before the constants: tensors, numbers or None, first a tensor.
        constants: Its constants, and Triton's options (``num_warps``, ``maxnreg``).
    """
    first = args[0]
    notes = noted()
    if notes is not None:
        notes.append(Launch(function, tuple(map(_kind, args)), tuple(constants.items())))
        return
    if is_abstract(first):
        return
    if INTERPRETED:
        function[grid](*args, **constants)
        return
    device = first.get_device()
    if device != _current_device():
        with torch.cuda.device(device):
            launch(function, grid, *args, **constants)
        return
    key = [device, id(function)]
    values = []
    for arg in args:
        if isinstance(arg, Tensor):
            pointer = arg.data_ptr()
            values.append(pointer)
            key.append(arg.dtype)
            if pointer & 15:
                key.append(len(values))
        else:
            values.append(arg)
            key.append(arg if arg is None else _number_kind(arg))
    key.extend(constants.values())
    key = tuple(key)
    version = _versions.get(key)
    if version is None:
        version = _versions[key] = _compile(function, args, grid, constants)
    run, handle, packed, rest = version
    run(
        grid[0],
        grid[1] if len(grid) > 1 else 1,
        grid[2] if len(grid) > 2 else 1,
        _current_stream(device),
        handle,
        packed,
        None,
        None,
        None,
        *values,
        *rest,
    )


def _compile(function, args: tuple, grid: tuple, constants: dict) -> tuple:
    """Triton's compiled version, from its cache on disk if it is there."""
    kernel = function.warmup(*args, grid=grid, **constants)
    run = kernel.run  # loads it, or says that the GPU has too little for it
    return (
        run,
        kernel.function,
        kernel.packed_metadata,
        (None,) * (len(function.params) - len(args)),
    )


def _number_kind(number) -> str:
    if isinstance(number, float):
        return 'fp32'
    return 'i32' if -(2**31) <= number < 2**31 else 'i64'


def _kind(arg):
    if arg is None:
        return None
    return arg.dtype if isinstance(arg, Tensor) else _number_kind(arg)
