"""Host memory that a step on the CPU frees and the next one needs again."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as glibc's malloc.h numbers them


def keep_freed_memory() -> bool:
    """Have glibc keep for this process what it frees; returns whether the C library is one that can.

    It gives large blocks, hence activations and gradients, back to the kernel at once, which clears each page again
    when the next step asks for it: tens of thousands of page faults a step. The process then stays as large as it once
    was; no number changes.
    """
    try:
        glibc = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError, AttributeError):  # no such name: another C library, or another system
        return False
    malloc = ctypes.CDLL(None)
    return bool(glibc and malloc.mallopt(M_MMAP_MAX, 0) and malloc.mallopt(M_TRIM_THRESHOLD, -1))
