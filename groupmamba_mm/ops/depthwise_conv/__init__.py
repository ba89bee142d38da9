"""Depthwise convolutions of channels-last tokens, FFNs, and projections of groups.

The Triton functions are in :mod:`.kernels`, :mod:`.hidden` and :mod:`.groups`, which are imported
by those who launch them only: this package imports without Triton.
"""
from .operators import (WIDEST_GROUP, WIDEST_LINEAR_GROUP, conv_ffn, group_linear, plain_ffn,
                        residual_group_ffn)

__all__ = ['WIDEST_GROUP', 'WIDEST_LINEAR_GROUP', 'conv_ffn', 'group_linear', 'plain_ffn',
           'residual_group_ffn']
