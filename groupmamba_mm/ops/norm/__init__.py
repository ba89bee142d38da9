"""LayerNorms with what is around them, and the channel affinity, forward and backward.

Everything here runs Triton kernels: only those who launch them import it, when they run.
"""
