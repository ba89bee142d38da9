"""Triton functions that several kernels share."""
import triton
import triton.language as tl


@triton.jit
def scan_position(t, L, H, W, column, reverse):
    """Where, in row-major order, the t-th token of a direction is (Eq. 6)."""
    t = tl.where(reverse, L - 1 - t, t)
    return tl.where(column, (t % H) * W + t // H, t)


@triton.jit
def log1p_of_fraction(e):
    """log(1 + e) for 0 <= e <= 1, to fp32's precision also for small e.

    By 2 artanh(e / (2 + e)): the GPU's own logarithm is exact to 2e-7 in absolute terms only, which
    for a step size of 1e-3 is a relative error of 2e-4.
    """
    s = e / (2. + e)
    s2 = s * s
    series = 1. / 9. + s2 * (1. / 11. + s2 * (1. / 13. + s2 * (1. / 15.)))
    return 2. * s * (1. + s2 * (1. / 3. + s2 * (1. / 5. + s2 * (1. / 7. + s2 * series))))
