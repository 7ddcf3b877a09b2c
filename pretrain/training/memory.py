"""The C library's memory: kept for the next tensors rather than returned to the kernel."""

import ctypes
from functools import cache


@cache
def keep_freed_memory() -> None:
    """Makes glibc keep the memory that tensors free, where it would map and unmap every large block.

    A few per cent of a training step of BASE on a CPU. Without glibc it does nothing. The process keeps its
    peak memory.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the top of the heap is kept, whatever its size
