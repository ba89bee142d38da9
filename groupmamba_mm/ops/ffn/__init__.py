"""FFNs, with and without a convolution, and projections of groups.

The Triton functions are in :mod:`.hidden` and :mod:`.groups`, those of the convolution in
:mod:`..depthwise_conv.kernels`. They are imported by those who launch them only: this package
imports without Triton.
"""
from .operators import (WIDEST_GROUP, WIDEST_LINEAR_GROUP, conv_ffn, group_linear, plain_ffn,
                        residual_group_ffn)

__all__ = ['WIDEST_GROUP', 'WIDEST_LINEAR_GROUP', 'conv_ffn', 'group_linear', 'plain_ffn',
           'residual_group_ffn']
