"""Whole blocks as operators: one for the forward pass, one for the backward pass.

Each runs a block's kernels and cuBLAS's products one after the other, without PyTorch's dispatcher
and autograd in between: eager code is then as fast as its kernels. Under ``torch.compile`` and
``torch.export`` a block is one node of the graph.

The kernels are imported by the first call: this package imports without Triton.
"""
from .operators import run_block

__all__ = ['run_block']
