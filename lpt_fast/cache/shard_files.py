"""The files of a cache's shards, opened when they are first read."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

from .folder import Folder
from .shard import open_file

OPEN_FILES = 256  # shards held open; more are closed and opened again

OPEN_FILES = 256  # shards held open; more are closed and opened again


class ShardFiles:
    """Descriptors of the shards, opened when they are needed. Safe for several threads."""

    def __init__(self, folder: Folder, names: list[str]):
        self.folder, self.names = folder, names
        self._open: OrderedDict[int, os.PathLike] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int):
        """An open raw file. While somebody holds it, it stays open, also when it is let go here."""
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                fd, _ = open_file(self.folder.path / self.names[shard])
                file = self._open[shard] = os.fdopen(fd, "rb", buffering=0)
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(shard)
            return file

    def close(self) -> None:
        with self._lock:
            self._open.clear()
