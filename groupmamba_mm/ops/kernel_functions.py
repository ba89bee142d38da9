"""Triton functions that several kernels share."""
import triton
import triton.language as tl


@triton.jit
def scan_position(t, L, H, W, column, reverse):
    """Where, in row-major order, the t-th token of a direction is (Eq. 6)."""
    t = tl.where(reverse, L - 1 - t, t)
    return tl.where(column, (t % H) * W + t // H, t)


@triton.jit
def exp(x):
    """e^x in two instructions; of the six of ``tl.exp`` four are for results below 1e-38."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def reciprocal(x):
    """1 / x of positive numbers, to 3e-7.

    A division takes nine instructions, six of them for numbers near the ends of fp32's range.
    """
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def log1p_of_fraction(e):
    """log(1 + e) for 0 <= e <= 1, to fp32's precision also for small e.

    By 2 artanh(e / (2 + e)): the GPU's own logarithm is exact to 2e-7 in absolute terms only, which
    for a step size of 1e-3 is a relative error of 2e-4. The polynomial is artanh(s) / s = 1 + s^2
    (1/3 + s^2/5 + ...), interpolated at Chebyshev's points of 0 <= s^2 <= 1/9 to 2e-9.
    """
    s = e * reciprocal(2. + e)
    s2 = s * s
    series = 0.3333332 + s2 * (0.2000378 + s2 * (0.1411831 + s2 * 0.13425749))
    return 2. * s * (1. + s2 * series)
