"""Integer arithmetic for launches.

Triton's functions of the same names are made for kernels: outside of them a call takes 5 us, and a
training step would make 1,600 of them.
"""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, for n >= 1."""
    return 1 << (n - 1).bit_length()


def round_up(n: int, multiple: int = 8) -> int:
    """The next multiple; of 8, where rows of 16-bit values are aligned to 16 bytes."""
    return cdiv(n, multiple) * multiple
