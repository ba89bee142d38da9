"""FFNs, with and without a convolution, and projections of groups, forward and backward.

Everything here runs Triton kernels: only :mod:`..blocks` imports it, when it runs.
"""
