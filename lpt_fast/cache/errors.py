"""What the activation cache raises: one sentence with what was got, what was expected and the way
out.
"""

from __future__ import annotations


class CacheError(ValueError):
    """The cache cannot do what was asked of it."""


class CorruptCacheError(CacheError):
    """Bytes of the cache are not those that were written."""


class CacheBusyError(CacheError):
    """Somebody else is building this cache now."""


class MissingRowsError(CacheError):
    """Texts that were asked for are not in the cache."""
