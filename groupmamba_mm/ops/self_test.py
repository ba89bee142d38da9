"""The first-use test of the Triton kernels on this GPU with this Triton."""
import functools
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger('groupmamba_mm')

#: A case runs a kernel on a device, forward and backward, and yields for each of its results what
#: it is (kernel, shape, which output or gradient), the kernel's tensor, and the expected one. It
#: draws its inputs with a seed of its own. What it raises counts as a failure.
Case = Callable[[torch.device], Iterator[Tuple[str, Tensor, Tensor]]]


def _run_both(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], what: str,
              inputs: Dict[str, Tensor]) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """The kernel's output and all gradients, beside those of the reference in fp64."""
    results = []
    for run, dtype in ((kernel, None), (reference, torch.float64)):
        leaves = {name: t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
                  for name, t in inputs.items()}
        y = run(**leaves)
        # weights that are no multiples of each other, the same in both
        weight = torch.linspace(-1, 2, y.numel(), device=y.device).view(y.shape).sin()
        y.backward(weight.to(inputs['x'].dtype).to(y.dtype))
        results.append([('output', y.detach())] + [(f'gradient of {name}', leaf.grad)
                                                   for name, leaf in leaves.items()])
    for (name, got), (_, expected) in zip(*results):
        yield f'{what}, {name}', got, expected


def _draw(device: torch.device, shapes: Dict[str, Tuple[int, ...]],
          dtype: torch.dtype) -> Dict[str, Tensor]:
    """Normal numbers of each shape; ``x`` in the given precision, small parameters in fp32."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator).to(device)
             for name, shape in shapes.items()}
    return {name: t.to(dtype) if name == 'x' else 0.3 * t for name, t in drawn.items()}


def _scan(device: torch.device, what: str, channels: int, dt_rank: int,
          **others: Tuple[int, ...]) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """A scan of four groups with a gate, and with ``others``, given by their shapes."""
    from .grouped_ssm import grouped_ssm
    groups = 4
    grid, directions = (9, 7), ('left-right', 'top-bottom', 'right-left', 'bottom-top')

    def scan(x, x_proj, dt_proj, dt_bias, A_log, D, backend, **rest):
        return grouped_ssm(x, x_proj, dt_proj, dt_bias - 3, A_log, D, grid=grid,
                           directions=directions, backend=backend, **rest)

    inputs = _draw(device, dict(
        x=(2, 63, 2 * groups * channels), x_proj=(groups, dt_rank + 2, channels),
        dt_proj=(groups, channels, dt_rank), dt_bias=(groups, channels),
        A_log=(groups, channels, 1), D=(groups * channels, ), **others), torch.bfloat16)
    yield from _run_both(functools.partial(scan, backend='triton'),
                         functools.partial(scan, backend='torch'), what, inputs)


def _normed_scan(device: torch.device) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """The released family's scan and convolution, of its first stage but for the size."""
    yield from _scan(device, 'scan', 16, 1, norm_weight=(64, ), norm_bias=(64, ),
                     conv_weight=(64, 1, 3, 3), conv_bias=(64, ))


def _split_scan(device: torch.device) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """The paper's scan and causal convolution, with groups that several programs share."""
    yield from _scan(device, 'scan in tiles', 72, 3, conv_weight=(288, 1, 3), conv_bias=(288, ))


def _conv_ffn(device: torch.device) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """The released family's FFN."""
    from .ffn import conv_ffn

    def kernel(x, in_weight, in_bias, conv_weight, conv_bias, weight, bias):
        y, _ = conv_ffn(x, in_weight.to(x.dtype), in_bias.to(x.dtype), conv_weight, conv_bias,
                        weight.to(x.dtype), bias.to(x.dtype), 9, 7, keep_hidden=False)
        return y

    def reference(x, in_weight, in_bias, conv_weight, conv_bias, weight, bias):
        y = F.linear(x, in_weight, in_bias).transpose(1, 2).unflatten(-1, (9, 7))
        y = F.gelu(F.conv2d(y, conv_weight, conv_bias, padding=1, groups=y.shape[1]))
        return F.linear(y.flatten(2).transpose(1, 2), weight, bias)

    inputs = _draw(device, dict(x=(2, 63, 16), in_weight=(64, 16), in_bias=(64, ),
                                conv_weight=(64, 1, 3, 3), conv_bias=(64, ),
                                weight=(16, 64), bias=(16, )), torch.bfloat16)
    yield from _run_both(kernel, reference, 'convolution', inputs)


def _plain_ffn(device: torch.device) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """The paper's FFN, of its first stage but for the hidden channels."""
    from .ffn import plain_ffn

    def kernel(x, in_weight, in_bias, weight, bias):
        return plain_ffn(x, in_weight.to(x.dtype), in_bias, weight.to(x.dtype), bias,
                         keep_hidden=False)[0]

    def reference(x, in_weight, in_bias, weight, bias):
        return F.linear(F.gelu(F.linear(x, in_weight, in_bias)), weight, bias)

    inputs = _draw(device, dict(x=(2, 63, 96), in_weight=(128, 96), in_bias=(128, ),
                                weight=(96, 128), bias=(96, )), torch.bfloat16)
    yield from _run_both(kernel, reference, 'FFN', inputs)


def _residual_ffn(device: torch.device) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """The paper's FFN of groups with what is before it, of its third stage but for the sizes."""
    from .ffn import residual_group_ffn

    def kernel(x, branch, norm_weight, norm_bias, in_weight, in_bias, weight, bias):
        return residual_group_ffn(x, branch.to(x.dtype), norm_weight, norm_bias, 1e-5,
                                  in_weight.to(x.dtype), in_bias, weight.to(x.dtype), bias, True)[0]

    def reference(x, branch, norm_weight, norm_bias, in_weight, in_bias, weight, bias):
        s = (x + branch).unflatten(-1, bias.shape)
        n = F.layer_norm(s, s.shape[-1:]) * norm_weight.view_as(bias) + norm_bias.view_as(bias)
        h = F.gelu(torch.einsum('blgi,gci->blgc', n, in_weight) + in_bias)
        return (s + torch.einsum('blgc,goc->blgo', h, weight) + bias).flatten(2)

    inputs = _draw(device, dict(
        x=(2, 63, 192), branch=(2, 63, 192), norm_weight=(192, ), norm_bias=(192, ),
        in_weight=(2, 128, 96), in_bias=(2, 128), weight=(2, 96, 128), bias=(2, 96)),
        torch.bfloat16)
    yield from _run_both(kernel, reference, 'FFN of groups', inputs)


def _group_linear(device: torch.device) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """The paper's input projection, of its third stage but for the outputs."""
    from .ffn import group_linear

    def kernel(x, weight):
        return group_linear(x, weight.to(x.dtype), 96, 2, 72)

    def reference(x, weight):
        x, weight = x.unflatten(-1, (2, 96)), weight.unflatten(1, (2, 70))
        return F.pad(torch.einsum('blgi,gpci->blpgc', x, weight), (0, 2)).flatten(2)

    inputs = _draw(device, dict(x=(2, 63, 192), weight=(2, 140, 96)), torch.bfloat16)
    yield from _run_both(kernel, reference, 'projection of groups', inputs)


def _scaled_layer_norm(device: torch.device) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """The norm with most around it."""
    from .norm import scaled_layer_norm

    def kernel(x, multiplier, scale, weight, bias):
        return scaled_layer_norm(x, None, multiplier.to(x.dtype), scale, weight, bias, 1e-5,
                                 x.dtype)

    def reference(x, multiplier, scale, weight, bias):
        return F.layer_norm(x * multiplier * scale[:, None], x.shape[-1:], weight, bias, 1e-5)

    inputs = _draw(device, dict(x=(2, 63, 64), multiplier=(2, 63, 64), scale=(2, 64),
                                weight=(64, ), bias=(64, )), torch.bfloat16)
    yield from _run_both(kernel, reference, 'norm', inputs)


def _add_layer_norm(device: torch.device) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """The norm that begins a layer of the paper's in training, with both uses of its stream."""
    from .norm import add_layer_norm

    def kernel(branch, x, weight, bias):
        stream, normed, _, rounded = add_layer_norm(
            x, branch, None, weight, bias, 1e-5, 4, branch.dtype, 0, wants_rounded=True)
        return (stream + normed * rounded).to(branch.dtype)

    def reference(branch, x, weight, bias):
        stream = x + branch
        normed = F.layer_norm(stream.unflatten(-1, (4, -1)), (16, )).flatten(2) * weight + bias
        return stream + normed * stream

    inputs = _draw(device, dict(branch=(2, 63, 64), x=(2, 63, 64), weight=(64, ), bias=(64, )),
                   torch.bfloat16)
    yield from _run_both(kernel, reference, 'norm of a sum', inputs)


#: What is tested: one case for each kind of kernel.
CASES: Tuple[Case, ...] = (_normed_scan, _split_scan, _conv_ffn, _plain_ffn, _residual_ffn,
                           _group_linear, _scaled_layer_norm, _add_layer_norm)

#: Largest error, as norm of the difference over norm of the expected tensor. All cases take bf16;
#: several times what correct kernels lose by rounding: a wrong kernel is off by far more.
TOLERANCE = 2e-2


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
    tolerance = TOLERANCE
    expected = expected.double()
    scale = expected.norm().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((got.double() - expected).norm() / scale).item()
    if error <= tolerance:  # false for NaN
        return None
    return (f'{what} of shape {tuple(got.shape)} in {got.dtype} is off by {error:.1e} of its norm, '
            f'allowed are {tolerance:.0e}')
