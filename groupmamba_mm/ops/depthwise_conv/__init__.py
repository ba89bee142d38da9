"""Depthwise convolutions of channels-last tokens, which the scan and the FFNs launch.

Their Triton functions are in :mod:`.kernels`; this package imports without Triton.
"""
