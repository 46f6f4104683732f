"""The files of a cache's shards, opened when they are first read."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict

from .errors import CacheError
from .folder import Folder
from .shard import open_file

OPEN_FILES = 256  # shards held open, at most; more are closed and opened again
SHARE = 4  # of the files that a process may open, shards take one in so many


def files_to_hold() -> int:
    """How many shards stay open: the limit of a process (`ulimit -n`) serves others too."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(OPEN_FILES, soft // SHARE))


class ShardFiles:
    """Descriptors of the shards, opened when they are needed. Safe for several threads."""

    def __init__(self, folder: Folder, names: list[str]):
        self.folder, self.names = folder, names
        self._open: OrderedDict[int, os.PathLike] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int):
        """An open raw file. While somebody holds it, it stays open, also when it is let go here.

        Raises:
            CacheError: it cannot be opened; where a process has too many files open, says so.
        """
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                hold = files_to_hold()
                while len(self._open) >= hold:
                    self._open.popitem(last=False)
                file = self._open[shard] = os.fdopen(self._opened(shard), "rb", buffering=0)
            else:
                self._open.move_to_end(shard)
            return file

    def _opened(self, shard: int) -> int:
        path = self.folder.path / self.names[shard]
        try:
            return open_file(path)[0]
        except CacheError as error:
            if not _too_many(error):
                raise
            self._open.clear()  # those were ours; the others are somebody else's
        return open_file(path)[0]

    def close(self) -> None:
        with self._lock:
            self._open.clear()


def _too_many(error: CacheError) -> bool:
    return getattr(error.__context__, "errno", None) == errno.EMFILE
