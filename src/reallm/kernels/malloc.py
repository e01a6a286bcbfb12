"""Return freed memory to the operating system."""

from __future__ import annotations

import ctypes
import functools
import os

_M_MMAP_THRESHOLD = -3  # glibc, malloc.h
_THRESHOLD = 1 << 17  # bytes: glibc's initial value


@functools.cache
def set_mmap_threshold(least: int = _THRESHOLD) -> bool:
    """Make glibc allocate blocks of at least `least` bytes with mmap from now on; return False without glibc.

    Left alone it raises the threshold to the largest block ever freed, up to 32 MB, and keeps such blocks: a step of
    tuning that needs 2.4 GB then stands at 7.9 GB
    (docs/experiments/cost-of-a-fine-tuning-step.md). A threshold that the user has set stays.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return True
    try:
        return ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, least) == 1
    except (OSError, AttributeError, TypeError):
        return False
