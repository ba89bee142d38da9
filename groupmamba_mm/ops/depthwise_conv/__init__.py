"""Depthwise convolutions of channels-last tokens, and linear layers behind them.

The Triton functions are in :mod:`.kernels`, which is imported by those who launch them only: this
package imports without Triton.
"""
from .operators import conv_ffn, gelu_linear

__all__ = ['conv_ffn', 'gelu_linear']
