"""What the activation cache raises: one sentence with what was got, what was expected and the way
out.
"""

from __future__ import annotations

import errno


class CacheError(ValueError):
    """The cache cannot do what was asked of it."""


class CorruptCacheError(CacheError):
    """Bytes of the cache are not those that were written."""


class CacheBusyError(CacheError):
    """Somebody else is building this cache now."""


class MissingRowsError(CacheError):
    """Texts that were asked for are not in the cache."""


def reason(error: OSError) -> str:
    """What the operating system said; of too many open files also the way out."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files; allow more (`ulimit -n 4096`), or use fewer worker processes"
    return str(error.strerror)
