"""Sizes that differ from batch to batch, rounded up so that there are few of them.

Libraries keep a kernel for each shape that they have seen (oneDNN up to 1,024, about half a megabyte each), and an
allocator that is asked for other sizes in every step finds no free block of the same size.
"""

_LEAST = 16
"""Rows of a tile of matrix units: fewer are computed in the same time."""
_BITS = 5
"""Sizes per power of two are 2^4, so that at most a sixteenth is added; measured in docs/performance.md."""


def round_up(count: int) -> int:
    """Return the lowest size that is not below `count`.

    Sizes are the multiples of 16 up to 512, of 32 up to 1,024, of 64 up to 2,048, and so on.
    """
    step = max(_LEAST, 1 << max(0, (count - 1).bit_length() - _BITS))
    return -(-count // step) * step
