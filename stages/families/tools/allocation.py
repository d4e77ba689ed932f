"""How a process on a CPU keeps the memory that it frees."""

from __future__ import annotations

import ctypes

# Parameters of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep freed memory for its next allocation, where the C library is glibc.

    On a CPU every operation allocates its result. By default, glibc takes each large block from the kernel and gives it back
    when it is freed, and the kernel clears all pages anew each time: this was half of the time of a training of tiny-janus.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another system, or another C library
        return
    mallopt(MMAP_MAX, 0)  # take large blocks from the heap, too
    mallopt(TRIM_THRESHOLD, LARGEST)  # keep the free end of the heap
    mallopt(TOP_PAD, 1 << 26)  # let the heap grow by 64 MiB more than is asked for
