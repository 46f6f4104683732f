"""An index that is gone, damaged or old, and files that change under a reader."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from lpt_fast.cache import ActivationCache, CacheError, CorruptCacheError
from lpt_fast.cache.folder import INDEX, MANIFEST, Folder
from lpt_fast.cache.verify import gc, repair, verify
from tests.cache.cases import (
    SHARD_BYTES,
    built,
    files,
    fill,
    flip,
    folder_of,
    layout_of,
    rows_of,
    served,
    texts,
)

# -- the index -------------------------------------------------------------------------------------
from tests.cache.damage import DAMAGES, DATA, cut, keys_of, shards


def test_an_index_that_is_gone_or_damaged(sound):
    root, folder, rows, before = sound
    (folder / INDEX).unlink()
    assert rows_of(ActivationCache.open(root)) == rows
    for write in (
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(before[INDEX][:-1]),
        lambda path: path.write_bytes(before[MANIFEST]),
        lambda path: path.symlink_to("elsewhere"),
        os.mkfifo,
    ):
        (folder / INDEX).unlink(missing_ok=True)
        write(folder / INDEX)
        opened = ActivationCache.open(root)
        assert INDEX in opened.stats()["problems"][0]
        assert rows_of(opened) == rows
        assert not verify(Folder.read(folder)).sound
        with pytest.raises(CorruptCacheError, match=INDEX):
            gc(Folder.read(folder))  # what is garbage is not known
        repair(Folder.read(folder))
        assert files(folder) == before
    (folder / INDEX).unlink()
    report, _ = built(root, DATA)
    assert report.computed == 0 and files(folder) == before


def test_an_index_cannot_be_written(sound):
    (sound[1] / INDEX).unlink()
    (sound[1] / INDEX).mkdir()
    with pytest.raises(CacheError, match="cannot be written: Is a directory"):
        repair(Folder.read(sound[1]))
    with pytest.raises(CacheError, match="cannot be written: Is a directory"):
        fill(sound[0], texts(20, seed=9))


def test_an_index_that_names_fewer(sound):
    root, folder, rows, before = sound
    entries = Folder.read(folder).read_index()
    Folder.read(folder).write_index(entries[2:])
    lost = keys_of(folder, *(folder / entry.name for entry in entries[:2]))
    opened = ActivationCache.open(root)
    assert served(opened, rows) == {"equal": len(rows) - len(lost), "absent": len(lost)}
    report, opened = built(root, DATA)
    assert report.computed == 0 and files(folder) == before and rows_of(opened) == rows


def test_an_old_index(sound):
    """Of before shards were dropped and others made: what is there is served, what is not is
    said.
    """
    root, folder, rows, before = sound
    first, second = shards(folder)[:2]
    lost = keys_of(folder, first, second)
    first.unlink(), second.unlink()
    built(root, DATA)
    now = files(folder)
    (folder / INDEX).write_bytes(before[INDEX])
    opened = ActivationCache.open(root)
    gone = before.keys() - now.keys()
    assert len(opened.stats()["problems"]) == len(gone)
    report, opened = built(root, DATA)
    assert report.computed == 0 and rows_of(opened) == rows and lost
    assert verify(Folder.read(folder), full=True).sound


def test_shards_that_would_double_rows(sound, tmp_path):
    """The same rows cut into other shards: sound, and of no use beside those that the index names.
    Without an index they serve all the same, and a verification says that they are there twice.
    """
    root, folder, rows, before = sound
    fill(tmp_path / "other", DATA, shard_bytes=3 * SHARD_BYTES)
    others = shards(folder_of(tmp_path / "other"))
    assert not {path.name for path in others} & before.keys()
    for path in others:
        shutil.copy(path, folder)
    assert rows_of(ActivationCache.open(root)) == rows
    report, opened = built(root, [*DATA, {"input_ids": [7, 7, 8, 8]}])
    assert report.computed == 1 and len(rows_of(opened)) == len(rows) + 1
    assert verify(Folder.read(folder), full=True).sound

    (folder / INDEX).unlink()
    opened = ActivationCache.open(root)
    assert served(opened, rows) == {"equal": len(rows)}
    (problem,) = verify(Folder.read(folder), full=True).problems
    assert f"{len(rows)} rows of {folder} are there twice" in problem


def test_repair_reads_what_no_index_names(sound):
    root, folder, rows, _ = sound
    path = shards(folder)[0]
    lost = keys_of(folder, path)
    entries = Folder.read(folder).read_index()
    Folder.read(folder).write_index(entry for entry in entries if entry.name != path.name)
    flip(path, layout_of(path).hidden_offset + 5, 5)
    report = repair(Folder.read(folder))
    assert report.bad == [path.name] and not path.exists()
    assert verify(Folder.read(folder), full=True).sound
    opened = ActivationCache.open(root)
    assert served(opened, rows) == {"equal": len(rows) - len(lost), "absent": len(lost)}


# -- while it is open ------------------------------------------------------------------------------


def test_files_change_under_a_reader(sound):
    root, folder, rows, _ = sound
    names = shards(folder)
    many = len(rows)
    for warm in (False, True):
        for damage in ("half", "missing", "pipe", "link", "empty"):
            opened = ActivationCache.open(root)
            if warm:
                opened.read(np.arange(many))
            else:
                opened.stats()
            lost = keys_of(folder, names[0])
            kept = names[0].read_bytes()
            DAMAGES[damage][0](names[0])
            outcome = served(opened, rows)
            if warm and damage in ("missing", "pipe", "link"):  # its file is open
                assert outcome == {"equal": many}
            else:
                assert outcome["equal"] >= many - len(lost) and outcome["refused"] > 0
                assert not outcome["absent"]
            names[0].unlink(missing_ok=True)
            names[0].write_bytes(kept)


def test_cut_short_under_a_reader_names_the_row(sound):
    root, folder, _, _ = sound
    opened = [ActivationCache.open(root, tier=tier) for tier in ("page", "disk", "pinned")]
    assert all(cache.stats()["rows"] for cache in opened)
    path = folder / opened[0]._table.names[0]
    cut(path, layout_of(path).hidden_offset + 1)
    for cache in opened:
        with pytest.raises(CorruptCacheError, match=r"Row 0 of the cache .* is cut short"):
            cache.read([0])
        with pytest.raises(CorruptCacheError, match=r"Row 0 of the cache .* is cut short"):
            next(cache.batches([[0]]))
