"""Triton functions that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def direction_of(directions, group):
    """Whether a group runs by columns, from the end, and on the mirrored grid."""
    code = directions >> (3 * group)
    return (code & 1) != 0, (code & 2) != 0, (code & 4) != 0


@triton.jit
def scan_position(t, L, H, W, column, reverse, mirrored):
    """Where, in row-major order, the t-th token of a direction is (Eq. 6)."""
    t = tl.where(reverse, L - 1 - t, t)
    position = tl.where(column, (t % H) * W + t // H, t)
    if mirrored:
        position += W - 1 - 2 * (position % W)
    return position


@triton.jit
def multiply(a, b, sum, IN_FP32: tl.constexpr):
    """a @ b + sum, added up in fp32; IN_FP32 for the interpreter, which has no products in bf16."""
    if IN_FP32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum)
    return tl.dot(a, b, sum)


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
    s = e * reciprocal(2.0 + e)
    s2 = s * s
    series = 0.3333332 + s2 * (0.2000378 + s2 * (0.1411831 + s2 * 0.13425749))
    return 2.0 * s * (1.0 + s2 * series)


@triton.jit
def activate(p, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """act(p) and act'(p) for tensors of DTYPE; the compiler drops the one that is not used."""
    if ACT == 'gelu':
        # The normal distribution's tail beyond |p|: its binary logarithm is almost a parabola, and
        # these polynomials are those with the least error of max(1, |p|) times the tail, 7e-7 and
        # for fp32 6e-8. The kernels are near the limit of instructions, of which erf takes three
        # times as many. The small tail is what is approximated, so that nothing cancels; the first
        # coefficient is negative, so that the tail goes to zero.
        size = tl.abs(p)
        if DTYPE == tl.float32:
            tail = -2.2758561e-6 * size + 3.2967819e-5
            tail = tail * size - 1.5727778e-4
            tail = tail * size - 2.0248146e-4
            tail = tail * size + 7.1427855e-3
            tail = tail * size - 5.2546438e-2
            tail = tail * size - 0.45919305
            tail = tail * size - 1.1511070
            tail = tl.exp2(tail * size - 0.99999994)
        else:
            tail = -5.0025922e-4 * size + 7.2823763e-3
            tail = tail * size - 5.2343234e-2
            tail = tail * size - 0.45941409
            tail = tail * size - 1.1510520
            tail = tl.exp2(tail * size - 1.0000019)
        value = tl.maximum(p, 0.0) - size * tail
        bell = tl.exp2(p * p * -0.7213475204444817)  # exp(-p^2 / 2)
        slope = tl.where(p > 0.0, 1.0 - tail, tail) + p * bell * 0.3989422804014327
    elif ACT == 'silu':
        gate = reciprocal(1.0 + tl.exp2(p * -1.4426950408889634))
        value = p * gate
        slope = gate * (1.0 + p * (1.0 - gate))
    else:
        value = p
        slope = tl.full(p.shape, 1.0, tl.float32)
    return value, slope
