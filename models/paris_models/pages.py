"""Memory pages of a training process: kept from step to step instead of given back and asked again.

A step frees its activations and gradients and allocates the same sizes a moment later. The C
library gives the top of its heap back in between, and the kernel clears every page anew: thousands
of page faults per step, a few percent of its time. A process that trains and is killed afterwards
keeps them. The peak stays what it was::

    keep_pages()                    # once, in a process whose work is training
"""

from __future__ import annotations

import ctypes
from typing import Final

TRIM_THRESHOLD: Final = -1
MMAP_THRESHOLD: Final = -3
"""Names of glibc's malloc.h."""
MOST: Final = 1 << 30
"""Blocks up to a gigabyte come from the heap; larger ones are mapped and unmapped as before."""


def keep_pages() -> bool:
    """Let this process keep freed memory. False, changing nothing, where the C library is another.

    Bits of training do not depend on it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows, musl
        return False
    return bool(mallopt(TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(MMAP_THRESHOLD, MOST))
