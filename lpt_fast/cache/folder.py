"""The files of one cache: manifest, index, shards, lock.

    cache/                                  a root, which may hold several caches
        3f0c.../                            one cache; named by the first half of its identity
            manifest.json                   the identity, where it came from, frozen scales
            index.json                      the shards that belong to it: names, sizes, digests
            9a41....safetensors             shards (shard.py), named by what they hold
            9a41....safetensors.1234.part   a shard that is being written
            .lock                           held by whoever builds

A shard with its final name is complete. The index says what should be there; what is there beyond
it was finished by a build that did not live to say so, and the next build adopts it.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .documents import read_document, write_document
from .errors import CacheError, CorruptCacheError, reason
from .identity import Identity
from .shard import MAX_ROWS, REPAIR, STORES, Tables, open_file, read_tables, shard_name

MANIFEST, INDEX, LOCK = "manifest.json", "index.json", ".lock"
_SHARD = re.compile(r"[0-9a-f]{32}\.safetensors")
_PART = re.compile(r"[0-9a-z]+\.(safetensors|json)\.[0-9a-z.-]+\.part")


@dataclass(frozen=True)
class ShardEntry:
    """A line of the index."""

    name: str
    bytes: int
    rows: int
    tokens: int
    digest: str

    @classmethod
    def of(cls, name: str, tables: Tables) -> ShardEntry:
        layout = tables.layout
        return cls(name, layout.size, layout.rows, layout.tokens, tables.digest)

    @classmethod
    def parse(cls, value: Any, path: Path) -> ShardEntry:
        """From JSON that somebody else may have written."""
        if isinstance(value, dict) and value.keys() == cls.__dataclass_fields__.keys():
            numbers = [value[name] for name in ("bytes", "rows", "tokens")]
            if (
                isinstance(value["name"], str)
                and _SHARD.fullmatch(value["name"])
                and all(type(n) is int and 0 < n < 2**62 for n in numbers)
                and isinstance(value["digest"], str)
            ):
                return cls(**value)
        raise CorruptCacheError(f"{path} names a shard in a way that no cache does; take it away.")


@dataclass
class Folder:
    """One cache on disk.

    Attributes:
        path: its folder.
        identity: what its rows depend on.
        provenance: where it came from, for people (model, versions); nothing is decided by it.
        channel_scale: float32 [D] of an int8c store, fixed when the cache was begun.
    """

    path: Path
    identity: Identity
    provenance: dict[str, Any] = field(default_factory=dict)
    channel_scale: np.ndarray | None = None

    # -- manifest ----------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: Path) -> Folder:
        """The cache in folder `path`.

        Raises:
            CorruptCacheError: no manifest, a damaged one, or one of another identity.
        """
        content = read_document(
            path / MANIFEST,
            "take the folder away and fill it again with `lpt-fast precompute`",
        )
        try:
            identity = Identity(content["identity"])
            scale = content["channel_scale"]
            if scale is not None:
                scale = np.frombuffer(base64.b64decode(scale, validate=True), np.float32).copy()
                good = (scale > 0) & np.isfinite(scale)
                if scale.shape != (identity.width,) or not good.all():
                    raise ValueError
            sound = (
                content["identity_sha256"] == identity.digest
                and identity.store in STORES
                and type(identity.width) is int
                and 0 < identity.width <= MAX_ROWS
                and type(identity.layer) is int
                and isinstance(identity.compute_dtype, str)
                and (scale is not None) == (identity.store == "int8c")
                and isinstance(content["provenance"], dict)
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise CorruptCacheError(
                f"{path / MANIFEST} contradicts itself, expected the manifest of a cache; take the "
                "folder away and fill it again with `lpt-fast precompute`."
            )
        return cls(path, identity, content["provenance"], scale)

    def write_manifest(self) -> None:
        scale = self.channel_scale
        if scale is not None:
            scale = base64.b64encode(np.ascontiguousarray(scale, np.float32).tobytes()).decode()
        content = {
            "identity": self.identity.content,
            "identity_sha256": self.identity.digest,
            "provenance": self.provenance,
            "channel_scale": scale,
        }
        write_document(self.path / MANIFEST, content)

    # -- index -------------------------------------------------------------------------------------

    def read_index(self) -> list[ShardEntry] | None:
        """The shards that belong to the cache; None where no build has ended yet.

        Raises:
            CorruptCacheError: a damaged index, or that of another cache.
        """
        path = self.path / INDEX
        if not os.path.lexists(path):
            return None
        content = read_document(
            path, "`lpt-fast cache verify --repair` makes it anew from the shards"
        )
        if content.get("identity_sha256") != self.identity.digest:
            raise CorruptCacheError(
                f"{path} belongs to another cache; `lpt-fast cache verify --repair` makes it anew."
            )
        shards = content.get("shards")
        if not isinstance(shards, list):
            raise CorruptCacheError(f"{path} has no list of shards; take it away.")
        entries = [ShardEntry.parse(value, path) for value in shards]
        if len({entry.name for entry in entries}) != len(entries):
            raise CorruptCacheError(f"{path} names a shard twice; take it away.")
        return entries

    def write_index(self, entries: Iterable[ShardEntry]) -> None:
        shards = [vars(entry) for entry in sorted(entries, key=lambda e: e.name)]
        content = {"identity_sha256": self.identity.digest, "shards": shards}
        write_document(self.path / INDEX, content)

    # -- shards ------------------------------------------------------------------------------------

    def shard_names(self) -> list[str]:
        """Finished shards in the folder, whether the index names them or not."""
        return sorted(name for name in os.listdir(self.path) if _SHARD.fullmatch(name))

    def part_names(self) -> list[str]:
        """Files that were being written when a build ended."""
        return sorted(name for name in os.listdir(self.path) if _PART.fullmatch(name))

    def read_shard(self, name: str, entry: ShardEntry | None = None) -> Tables:
        """The tables of a shard, checked against the identity, the frozen scales and, where given,
        its line of the index.

        Raises:
            CorruptCacheError: it is not what it should be.
        """
        path = self.path / name
        fd, size = open_file(path)
        try:
            if entry is not None and size != entry.bytes:
                raise CorruptCacheError(
                    f"{path} has {size} bytes, expected {entry.bytes} by the index; {REPAIR}"
                )
            tables = read_tables(fd, size, path)
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {reason(error)}.") from None
        finally:
            os.close(fd)
        layout = tables.layout
        foreign = layout.identity != self.identity.digest or (layout.store, layout.width) != (
            self.identity.store,
            self.identity.width,
        )
        if self.channel_scale is not None and not foreign:
            foreign = not np.array_equal(tables.channel_scale, self.channel_scale)
        if foreign:
            raise CorruptCacheError(
                f"{path} belongs to another cache ({layout.identity[:12]}, expected "
                f"{self.identity.digest[:12]}); take it away."
            )
        own = shard_name(layout.identity, tables.row_key)
        if name != own:
            raise CorruptCacheError(
                f"{path} holds the rows of another shard (expected in {own}: files were exchanged "
                f"or renamed); {REPAIR}"
            )
        if entry is not None and entry != ShardEntry.of(name, tables):
            raise CorruptCacheError(
                f"{path} is sound but not the shard that the index names (of another time?); "
                f"{REPAIR}"
            )
        return tables


def find_folders(root: Path) -> list[Path]:
    """The caches at `root`: itself, or those in it."""
    if not root.is_dir():
        raise CacheError(
            f"There is no cache folder {root}; `lpt-fast precompute --out {root}` fills one."
        )
    if (root / MANIFEST).exists():
        return [root]
    # (A copy that `export` did not finish ends in .part. A cache may be a link to its folder, on a
    # disk with more room, as it may be where a model says which cache is meant.)
    try:
        there = list(root.iterdir())
    except OSError as error:
        raise CacheError(f"The folder {root} cannot be read: {reason(error)}.") from None
    return sorted(p for p in there if (p / MANIFEST).exists() and p.suffix != ".part")


def folder_size(path: Path) -> int:
    """Bytes of all files of a cache."""
    size = 0
    for name in os.listdir(path):
        with suppress(FileNotFoundError):  # a builder gives files their names meanwhile
            size += os.lstat(path / name).st_size
    return size
