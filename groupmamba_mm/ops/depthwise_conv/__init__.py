"""Depthwise convolutions of channels-last tokens, and FFNs.

The Triton functions are in :mod:`.kernels` and :mod:`.hidden`, which are imported by those who
launch them only: this package imports without Triton.
"""
from .operators import conv_ffn, plain_ffn

__all__ = ['conv_ffn', 'plain_ffn']
