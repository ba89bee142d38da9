"""Blocks for autograd, compile and export; see the package."""
import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors


def run_block(family: str, spec: NamedTuple, grid: tuple[int, int], dtype: torch.dtype,
              tokens: Tensor, branch: Tensor | None, branch_drop: Tensor | None,
              drop: Tensor | None, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Run a block up to its last residual addition, which is left to the next block's norm.

    Args:
        family: ``'official'`` or ``'paper'``, a module of this package.
        spec: The block, a value of that module's ``...Spec``.
        grid: (H, W).
        dtype: Precision of the products: fp32, bf16 or fp16.
        tokens: (B, L, C) with L = H * W.
        branch: (B, L, >=C), what the block before left to be added to the tokens, or None.
        branch_drop: Stochastic depth's factor of that for each image, (B,) in fp32, or None.
        drop: The same of this block's first branch.
        parameters: In the order of the module's ``PARAMETERS``.

    Returns:
        The residual stream (B, L, C), and what is to be added to it, (B, L, Cp >= C).
    """
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (tokens, branch, *parameters))
    if torch.compiler.is_compiling():
        results = _block(family, [*map(float, spec)], *grid, dtype, keep, tokens, branch,
                         branch_drop, drop, list(parameters))
        has_stream = _has_stream(family, branch)
        return (results[0] if has_stream else tokens), results[int(has_stream)]
    stream, branch = _Block.apply(family, spec, grid, dtype, keep, tokens, branch, branch_drop,
                                  drop, *parameters)
    return tokens if stream is None else stream, branch


def _has_stream(family: str, branch: Tensor | None) -> bool:
    """Whether a block makes a new stream; the paper's hands on its own, with a branch added."""
    return family == 'official' or branch is not None


def _module(family: str):
    return importlib.import_module(f'{__package__}.{family}')


class _Block(torch.autograd.Function):
    """A block in eager mode."""

    @staticmethod
    def forward(ctx, family, spec, grid, dtype, keep, tokens, branch, branch_drop, drop,
                *parameters):
        module = _module(family)
        x, out, *saved = module.forward(spec, grid, dtype, keep, tokens, branch, branch_drop, drop,
                                        parameters)
        if keep:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(tokens, branch_drop, drop, *parameters, x, *saved)
            ctx.rest = (module, spec, grid, dtype, 0 if branch is None else branch.shape[2],
                        len(parameters), branch if branch is None else branch.dtype)
        return x, out

    @staticmethod
    def backward(ctx, dx, dout):
        module, spec, grid, dtype, branch_width, count, branch_dtype = ctx.rest
        saved = ctx.saved_tensors  # to be read once, for activation checkpointing
        tokens, branch_drop, drop = saved[:3]
        parameters, (x, *saved) = saved[3:3 + count], saved[3 + count:]
        dtokens, dbranch, grads = module.backward(
            spec, grid, dtype, dx, dout, tokens, branch_width, branch_drop, drop, parameters, x,
            saved)
        if dbranch is not None and branch_dtype != dbranch.dtype:
            dbranch = dbranch.to(branch_dtype)
        return (None, ) * 5 + (dtokens.to(tokens.dtype), dbranch, None, None,
                               *_split(grads, parameters, ctx.needs_input_grad[9:]))


def _split(grads: Tensor, parameters: Sequence[Tensor],
           needed: Sequence[bool]) -> list[Tensor | None]:
    """Each parameter's gradient, where it is needed."""
    grads = _unflatten_dense_tensors(grads, parameters)
    return [grad if is_needed else None for grad, is_needed in zip(grads, needed)]


def _spec(module, numbers: Sequence[float]) -> NamedTuple:
    """The numbers as a specification again, whole ones as such."""
    kinds = module.SPEC.__annotations__.values()
    return module.SPEC(*(kind(number) for kind, number in zip(kinds, numbers)))


def _run(family: str, spec: list[float], height: int, width: int, dtype: torch.dtype, keep: bool,
         tokens: Tensor, branch: Tensor | None, branch_drop: Tensor | None,
         drop: Tensor | None, parameters: list[Tensor]) -> list[Tensor]:
    module = _module(family)
    outputs = module.forward(_spec(module, spec), (height, width), dtype, keep, tokens, branch,
                             branch_drop, drop, parameters)
    return [tensor for tensor in outputs if tensor is not None]


def _run_backward(family: str, spec: list[float], height: int, width: int, dtype: torch.dtype,
                  dx: Tensor | None, dout: Tensor | None, tokens: Tensor, branch_width: int,
                  branch_drop: Tensor | None, drop: Tensor | None, parameters: list[Tensor],
                  x: Tensor | None, saved: list[Tensor]) -> list[Tensor]:
    module = _module(family)
    spec = _spec(module, spec)
    rest = iter(saved)
    there = module.saves(spec, branch_width > 0, dtype, tokens.device)[2:]
    saved = [next(rest) if is_there else None for is_there in there]
    outputs = module.backward(spec, (height, width), dtype, dx, dout, tokens, branch_width,
                              branch_drop, drop, parameters, x, saved)
    return [tensor for tensor in outputs if tensor is not None]


_block = torch.library.custom_op('groupmamba_mm::block', _run, mutates_args=())
_block_backward = torch.library.custom_op('groupmamba_mm::block_backward', _run_backward,
                                          mutates_args=())
# without data, launches do nothing: the operators themselves give the shapes
_block.register_fake(_run)
_block_backward.register_fake(_run_backward)


def _setup_context(ctx, inputs, output):
    *ctx.numbers, ctx.keep, tokens, branch, branch_drop, drop, parameters = inputs
    ctx.set_materialize_grads(False)
    ctx.branch = (0, None) if branch is None else (branch.shape[2], branch.dtype)
    ctx.count = len(parameters)
    stream, (_, *saved) = (output[0], output[1:]) if _has_stream(ctx.numbers[0], branch) else \
        (None, output)
    ctx.save_for_backward(tokens, branch_drop, drop, *parameters, stream, *saved)


def _backward(ctx, of_outputs):
    if not ctx.keep:
        raise RuntimeError('this block ran without keeping what its gradient needs')
    tokens, branch_drop, drop, *rest = ctx.saved_tensors
    parameters, (x, *saved) = rest[:ctx.count], rest[ctx.count:]
    width, dtype = ctx.branch
    dx, dout = (None, of_outputs[0]) if x is None else of_outputs[:2]
    dtokens, *dbranch, grads = _block_backward(
        *ctx.numbers, dx, dout, tokens, width, branch_drop, drop, parameters, x, saved)
    # their sizes from the specification: those of the parameters may be symbols here
    shapes = _spec(_module(ctx.numbers[0]), ctx.numbers[1]).shapes()
    of_parameters = [part.view(shape) for part, shape in zip(
        grads.split([shape.numel() for shape in shapes]), shapes)]
    return (None, ) * 6 + (dtokens.to(tokens.dtype), dbranch[0].to(dtype) if width else None, None,
                           None, of_parameters)


_block.register_autograd(_backward, setup_context=_setup_context)
