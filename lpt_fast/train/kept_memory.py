"""Memory that a training on a CPU frees stays with the process until it ends.

Each step frees what it took. glibc gives the end of its heap back to the system at once, and the
next step waits while the same pages are cleared for it again: a tenth of a step from a cache.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT = 2**30  # bytes free at the end of the heap that are not given back
# Where glibc's own thresholds, which grow with what is freed, end. (Once one is set, they stay.)
USUAL = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}

_lock = threading.Lock()
_depth = 0


@lru_cache
def _libc():
    """The C library, where it is glibc and its user has not chosen thresholds; else None."""
    names = ("TRIM_THRESHOLD", "MMAP_THRESHOLD", "TOP_PAD", "MMAP_MAX")
    chosen = any(f"MALLOC_{name}_" in os.environ for name in names)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018
        return libc if libc.mallopt and libc.malloc_trim else None
    except (OSError, AttributeError, TypeError):
        return None


@contextmanager
def kept_memory() -> Iterator[None]:
    """Around a loop whose steps take and free the same memory; loops may be nested. Does nothing
    where the C library is another one.
    """
    global _depth
    libc = _libc()
    if libc is None:
        yield
        return
    with _lock:
        _depth += 1
        if _depth == 1:
            libc.mallopt(_MMAP_THRESHOLD, USUAL[_MMAP_THRESHOLD])
            libc.mallopt(_TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for name, value in USUAL.items():
                    libc.mallopt(name, value)
                libc.malloc_trim(0)
