"""Looking after caches: verify and repair, gc, export."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from .documents import sync_folder
from .errors import CacheError, CorruptCacheError, reason
from .folder import Folder, folder_size
from .index import KeyTable
from .lock import building
from .shard import REPAIR, Tables, open_file, read_exactly
from .state import State

CHUNK = 1 << 24


@dataclass
class VerifyReport:
    """What a verification found.

    Attributes:
        path: of the cache.
        full: whether every byte was looked at.
        shards, rows: that are sound.
        bytes: that were read.
        problems: one sentence each; none: the cache is sound.
        bad: names of the shards that are not sound.
    """

    path: Path
    full: bool
    shards: int = 0
    rows: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.problems


def verify_rows(folder: Folder, name: str, tables: Tables) -> int:
    """Compares the hash of every row of a shard; bytes read.

    Raises:
        CorruptCacheError: one differs; names the row.
    """
    path = folder.path / name
    fd, size = open_file(path)
    try:
        layout = tables.layout
        if size != layout.size:
            raise CorruptCacheError(f"{path} changed its size while it was read; {REPAIR}")
        ends = layout.hidden_offset + tables.lengths.cumsum() * layout.token_bytes
        begin = layout.hidden_offset
        row = 0
        while row < layout.rows:
            # As many rows as fit into a piece, one at least.
            last = max(row + 1, int(np.searchsorted(ends, begin + CHUNK, side="right")))
            piece = memoryview(read_exactly(fd, int(ends[last - 1]) - begin, begin, path))
            start = 0
            for i in range(row, last):
                end = int(ends[i]) - begin
                if xxhash.xxh3_64_intdigest(piece[start:end]) != int(tables.row_hash[i]):
                    raise CorruptCacheError(f"Row {i} of {path} does not match its hash; {REPAIR}")
                start = end
            begin, row = int(ends[last - 1]), last
        return begin - layout.hidden_offset
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Takes a file away, or an empty folder in its place.

    Raises:
        CacheError: it cannot be.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(f"{path} cannot be removed: {reason(error)}; take it away.") from None


def verify(folder: Folder, full: bool = False) -> VerifyReport:
    """Looks at every file of a cache: manifest and index against their digests, the header and
    tables of every shard against theirs and the index; with `full` every row against its hash.
    """
    report = VerifyReport(folder.path, full)
    try:
        folder = Folder.read(folder.path)
        entries = folder.read_index()
    except CorruptCacheError as error:
        report.problems.append(str(error))
        entries = None
    named = {entry.name: entry for entry in entries or []}
    names = list(named) if entries is not None else folder.shard_names()
    seen: list[np.ndarray] = []
    for name in names:
        try:
            tables = folder.read_shard(name, named.get(name))
            report.bytes += tables.layout.hidden_offset
            if full:
                report.bytes += verify_rows(folder, name, tables)
        except CorruptCacheError as error:
            report.problems.append(str(error))
            report.bad.append(name)
            continue
        except (CacheError, OSError) as error:  # unreadable, which says nothing of what it holds
            report.problems.append(str(error))
            continue
        seen.append(tables.row_key)
        report.shards += 1
        report.rows += tables.layout.rows
    if seen:
        keys = np.concatenate(seen)
        doubled = int((KeyTable(keys).find(keys) != np.arange(len(keys))).sum())
        if doubled:
            report.problems.append(
                f"{doubled} rows of {folder.path} are there twice; the first of them is read, and "
                "a new cache would be smaller."
            )
    return report


def repair(folder: Folder, full: bool = True) -> VerifyReport:
    """Drops the shards that are not sound and writes the index anew from those that are.

    Returns:
        what was found before; afterwards the cache is sound.

    Raises:
        CacheBusyError: somebody builds.
        CorruptCacheError: a damaged manifest, without which nothing says what the rows are.
    """
    folder = Folder.read(folder.path)
    with building(folder.path):
        report = verify(folder, full)
        for name in report.bad:
            remove(folder.path / name)
        state = State(folder).load(adopt=True)
        for name in list(state.entries):  # what the index had not named
            if name in report.bad or not full:
                continue
            try:
                verify_rows(folder, name, state.shards[name])
            except CorruptCacheError as error:
                report.problems.append(str(error))
                report.bad.append(name)
                del state.entries[name]
                remove(folder.path / name)
        try:
            folder.write_index(state.entries.values())
        except OSError as error:
            raise CacheError(
                f"The index of {folder.path} cannot be written: {reason(error)}; make room, or "
                "take away what is in its place."
            ) from None
    return report


def garbage(folder: Folder) -> list[str]:
    """Files of a cache that nobody needs: unfinished ones, and shards that the index does not
    name. (Before a first index, all shards count.)
    """
    entries = folder.read_index()
    out = folder.part_names()
    if entries is not None:
        named = {entry.name for entry in entries}
        out += [name for name in folder.shard_names() if name not in named]
    return out


def gc(folder: Folder, dry_run: bool = False) -> tuple[list[str], int]:
    """Removes `garbage`; the names and their bytes.

    Raises:
        CacheBusyError: somebody builds, whose unfinished files these may be.
        CorruptCacheError: a damaged index (repair first).
    """
    with building(folder.path):
        names = garbage(folder)
        size = sum(os.lstat(folder.path / name).st_size for name in names)
        if not dry_run:
            for name in names:
                remove(folder.path / name)
            sync_folder(folder.path)
    return names, size


def export(folder: Folder, out: Path) -> Path:
    """Copies a cache to another folder, checking every byte on the way; it needs neither the model
    nor the texts there.

    Args:
        folder: the cache.
        out: a folder of caches, made where there is none.

    Returns:
        the folder of the copy.

    Raises:
        CorruptCacheError: a shard that is not sound; nothing is left behind.
        CacheError: no room, or it is there already.
    """
    target = out / folder.identity.folder
    if os.path.lexists(target):
        raise CacheError(f"{target} is there already, expected a new folder; take it away.")
    size = folder_size(folder.path)
    entries = folder.read_index()
    if not entries:
        raise CacheError(
            f"{folder.path} is not sealed, expected a finished build; run `lpt-fast precompute` "
            "again."
        )
    part = out / f"{folder.identity.folder}.{os.getpid()}.part"
    try:
        part.mkdir(parents=True)
        free = shutil.disk_usage(out).free
        if size > free:
            raise CacheError(
                f"The copy needs {size:,} bytes and {out} has {free:,} free; make room or name "
                "another folder."
            )
        copy = Folder(part, folder.identity, folder.provenance, folder.channel_scale)
        copy.write_manifest()
        for entry in entries:
            folder.read_shard(entry.name, entry)
            fd, _ = open_file(folder.path / entry.name)
            with os.fdopen(fd, "rb") as f, open(part / entry.name, "xb") as g:
                shutil.copyfileobj(f, g, CHUNK)
                g.flush()
                os.fsync(g.fileno())
            # The copy's own bytes.
            verify_rows(copy, entry.name, copy.read_shard(entry.name, entry))
        copy.write_index(entries)
        os.rename(part, target)
        sync_folder(out)
    except OSError as error:
        raise CacheError(f"{out} cannot be written: {reason(error)}.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target
