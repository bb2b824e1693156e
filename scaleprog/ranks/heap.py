"""The memory that a training step frees stays with the process, because the next step needs as much again.

glibc returns what is free at the end of its heap to the system, and gets it back page by page: on the CPU, hundreds of
page faults in each step (docs/LOG.md, 2026-11-28).
"""

import ctypes
import os
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
MOST = 2**31 - 1
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc allows no larger one
CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""The variables by which users tell glibc the same."""


def keep_freed_memory() -> None:
    """Keeps the memory that this process frees from now on, unless users have told glibc what to do.

    Tensors of more than 32 MiB are still returned. Does nothing where there is no glibc.
    """
    if any(name in os.environ for name in CHOSEN):
        return
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(TRIM_THRESHOLD, MOST)
        library.mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)  # setting the other one froze it at 128 KiB


def return_freed_memory() -> None:
    """Returns what is free now to the system. Does nothing where there is no glibc."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
