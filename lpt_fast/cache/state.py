"""The sound shards of one cache, in memory: what a reader serves and a builder need not make."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np

from .errors import CacheError, CorruptCacheError
from .folder import Folder, ShardEntry
from .index import KeyTable
from .shard import Tables


@dataclass(eq=False)
class State:
    """The sound shards of a cache.

    Attributes:
        folder: the cache.
        shards: name -> tables.
        entries: name -> line of the index.
        problems: what is wrong with the others, one sentence each.
        sealed: whether the index names all of them.
    """

    folder: Folder
    shards: dict[str, Tables] = field(default_factory=dict)
    entries: dict[str, ShardEntry] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    sealed: bool = False

    def load(self, adopt: bool) -> State:
        """Reads what is new. With `adopt` also finished shards that the index does not name."""
        self.problems = []
        try:
            listed = self.folder.read_index()
        except CorruptCacheError as error:
            self.problems.append(str(error))
            listed, adopt = None, True
        named = {entry.name: entry for entry in listed or []}
        for name, entry in named.items():
            if name not in self.shards:
                self._read(name, entry)
        # A build that has not ended yet has no index: what is finished serves.
        if adopt or listed is None:
            known = self.key_table()
            for name in self.folder.shard_names():
                if name in self.shards or name in named or not self._read(name, None):
                    continue
                if (known.find(self.shards[name].row_key) >= 0).all():
                    del self.shards[name], self.entries[name]  # it would only double rows
        self.sealed = listed is not None and self.entries.keys() <= named.keys()
        return self

    def check_there(self) -> None:
        """Raises CacheError where shards that were read before are no longer in the folder."""
        for entry in self.entries.values():
            try:
                size = os.lstat(self.folder.path / entry.name).st_size
            except FileNotFoundError:
                size = 0
            if size != entry.bytes:
                raise CacheError(
                    f"{self.folder.path / entry.name} was changed since the cache was opened "
                    f"({size} bytes, expected {entry.bytes}); open the cache again."
                )

    def take(self, name: str) -> bool:
        """Whether a shard that a build makes is there and sound."""
        if name not in self.entries and not (self.folder.path / name).exists():
            return False
        return name in self.entries or self._read(name, None)

    def _read(self, name: str, entry: ShardEntry | None) -> bool:
        try:
            tables = self.folder.read_shard(name, entry)
        except CacheError as error:  # (also one that cannot be read)
            self.problems.append(str(error))
            return False
        self.shards[name], self.entries[name] = tables, ShardEntry.of(name, tables)
        return True

    def key_table(self) -> KeyTable:
        parts = [tables.row_key for tables in self.shards.values()]
        return KeyTable(np.concatenate(parts) if parts else np.zeros((0, 2), np.uint64))
