"""The JSON files of a cache (manifest, index): canonical, with a digest of their own, written as a
whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .errors import CacheError, CorruptCacheError, reason
from .shard import open_file, read_exactly, write_all

MAX_BYTES = 1 << 28  # an index of a million shards


def canonical(content: dict[str, Any]) -> bytes:
    """The one spelling of a JSON object: sorted keys, no spaces, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.blake2b(canonical(content), digest_size=16).hexdigest()


def write_document(path: Path, content: dict[str, Any]) -> None:
    """Replaces the file at `path`; after a crash it is the old or the new one."""
    data = canonical({**content, "digest": _digest(content)})
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)  # of a process that died and had our number
    try:
        # O_EXCL: no link that somebody left there is followed.
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            write_all(fd, memoryview(data), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` last."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_document(path: Path, way_out: str) -> dict[str, Any]:
    """What `write_document` wrote.

    Args:
        path: of the file.
        way_out: what to do about a damaged one, for the message.

    Raises:
        CorruptCacheError: not there, or not to the bit what was written.
    """
    fd, size = open_file(path)
    try:
        if size > MAX_BYTES:
            raise CorruptCacheError(f"{path} has {size} bytes, expected at most {MAX_BYTES}.")
        data = read_exactly(fd, size, 0, path)
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {reason(error)}.") from None
    finally:
        os.close(fd)
    try:
        content = json.loads(data)
        # Bytes are compared, not values: a flipped bit may leave the values as they are.
        sound = isinstance(content, dict) and canonical(content) == data
        sound = sound and content.pop("digest", None) == _digest(content)
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise CorruptCacheError(
            f"{path} is damaged (it does not match its digest); copy it again, or {way_out}."
        )
    return content
