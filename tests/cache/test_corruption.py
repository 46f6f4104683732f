"""Bytes that are not those that were written: every one is found, no wrong number is read, the
sound rows still serve, and the lost ones come back.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lpt_fast.cache import ActivationCache, CacheError, CorruptCacheError
from lpt_fast.cache.folder import INDEX, MANIFEST, Folder
from lpt_fast.cache.verify import gc, repair, verify
from tests.cache.cases import (
    SHARD_BYTES,
    bits,
    built,
    files,
    fill,
    flip,
    folder_of,
    forged,
    layout_of,
    model,
    rows_of,
    served,
    texts,
)

DATA = texts(60)
FLIPS = 26  # of each region of each store


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Store -> a folder with a sound cache, and its rows."""
    out = {}
    for store in ("bf16", "int8c"):
        root = tmp_path_factory.mktemp(store)
        out[store] = root, rows_of(fill(root, DATA, store=store))
    return out


@pytest.fixture
def sound(stores, tmp_path):
    """A copy to damage: root, folder, rows by key, files."""
    root = shutil.copytree(stores["bf16"][0], tmp_path / "cache")
    return root, folder_of(root), stores["bf16"][1], files(folder_of(root))


def shards(folder: Path) -> list[Path]:
    """Those in the middle of the folder first."""
    found = sorted(folder.glob("*.safetensors"))
    return found[3:] + found[:3]


def keys_of(folder: Path, *paths: Path) -> set[bytes]:
    read = Folder.read(folder)
    return {key.tobytes() for path in paths for key in read.read_shard(path.name).row_key}


# -- single bits -----------------------------------------------------------------------------------


def places(folder: Path, dice) -> list[tuple[str, Path, int]]:
    """Bytes to damage: region, file, offset."""
    out = []
    for _ in range(FLIPS):
        path = dice.choice(shards(folder))
        layout = layout_of(path)
        header, hidden = len(layout.header), layout.hidden_offset
        text = len(layout.header.rstrip(b" "))
        for region, begin, end in (
            ("length", 0, 8),
            ("header", 8, text),
            ("padding", text, header),
            ("digest", header, header + 16),
            ("tables", header + 16, hidden),
            ("hidden", hidden, layout.size),
            ("hidden", hidden, layout.size),
        ):
            out.append((region, path, int(dice.integers(begin, end))))
    for name in (MANIFEST, INDEX):
        path = folder / name
        out += [(name, path, int(dice.integers(path.stat().st_size))) for _ in range(FLIPS)]
    return out


@pytest.mark.parametrize("store", ["bf16", "int8c"])
def test_every_flipped_bit_is_found(stores, tmp_path, store, caplog):
    root = shutil.copytree(stores[store][0], tmp_path / "cache")
    rows, folder = stores[store][1], Folder.read(folder_of(root))
    dice = np.random.default_rng(0)
    tried = Counter()
    for region, path, offset in places(folder.path, dice):
        reader = ActivationCache.open(root)  # has looked at the tables before
        reader.stats()
        caplog.clear()
        bit = int(dice.integers(8))
        before = flip(path, offset, bit)
        where = f"{region}, bit {bit} of byte {offset} of {path}"
        tried[region] += 1

        report = verify(folder, full=True)
        assert not report.sound and path.name in " ".join(report.problems), where
        if region not in (MANIFEST, INDEX):
            assert report.bad == [path.name], where
            assert report.shards == len(shards(folder.path)) - 1
        quick = verify(folder)
        assert quick.sound == (region == "hidden"), where

        outcome = served(reader, rows)
        if region == "hidden":
            assert outcome == {"equal": len(rows) - 1, "refused": 1}, where
        else:
            assert outcome == {"equal": len(rows)}
        if region == MANIFEST:
            with pytest.raises(CorruptCacheError, match=MANIFEST):
                ActivationCache.open(root).stats()
        else:
            opened = ActivationCache.open(root)
            problems = opened.stats()["problems"]
            outcome = served(opened, rows)
            if region == "hidden":
                assert not problems and outcome == {"equal": len(rows) - 1, "refused": 1}
                with pytest.raises(CorruptCacheError, match=r"Row \d+ of the cache .* its hash"):
                    opened.read(np.arange(len(rows)))
                with pytest.raises(CorruptCacheError, match=r"Row \d+ of the cache .* its hash"):
                    ActivationCache.open(root, tier="pinned").read([0])
            elif region == INDEX:
                assert INDEX in problems[0] and outcome == {"equal": len(rows)}
            else:
                assert len(problems) == 1 and path.name in problems[0]
                assert problems[0] in caplog.text
                assert outcome["absent"] > 0 == outcome["refused"]
        path.write_bytes(before)
    assert verify(folder, full=True).sound
    assert tried.total() >= 200 and len(tried) == 8


def test_a_flip_is_not_seen_where_checks_are_off(sound):
    """The price of check="never", and that the checks above do something."""
    root, folder, rows, _ = sound
    path = shards(folder)[0]
    flip(path, layout_of(path).hidden_offset, 0)
    opened = ActivationCache.open(root, check="never")
    assert bits(opened.read(opened.find(list(rows)))) != list(rows.values())


# -- whole files -----------------------------------------------------------------------------------


def cut(path: Path, size: int) -> None:
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def append(path: Path) -> None:
    with open(path, "ab") as f:
        f.write(b"\0")


def exchange(folder: Path, a: Path, b: Path) -> None:
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)


def in_place_of(path: Path, make) -> None:
    path.unlink()
    make(path)


def link_to_copy(path: Path) -> None:
    copy = path.parent.parent.parent / path.name
    path.rename(copy)
    path.symlink_to(copy)


def other_generation(path: Path) -> None:
    """A sound shard of the same rows that holds other numbers."""
    path.write_bytes(forged(path, hidden=lambda a: a ^ 1))


def make_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.chdir(before)


DAMAGES = {
    "one byte less": (lambda p: cut(p, -1), r"has \d+ bytes, expected \d+ by the index"),
    "half": (lambda p: cut(p, 4300), r"has 4300 bytes, expected \d+ by the index"),
    "in the header": (lambda p: cut(p, 100), r"has 100 bytes"),
    "empty": (lambda p: cut(p, 0), r"has 0 bytes"),
    "one byte more": (append, r"has \d+ bytes, expected \d+ by the index"),
    "missing": (Path.unlink, "is missing, expected a file that the cache's index names"),
    "folder": (lambda p: in_place_of(p, Path.mkdir), "is no plain file"),
    "pipe": (lambda p: in_place_of(p, os.mkfifo), "is no plain file"),
    "socket": (lambda p: in_place_of(p, make_socket), "is no plain file"),
    "link": (link_to_copy, "is a symbolic link, expected a plain file"),
    "dangling link": (lambda p: in_place_of(p, lambda q: q.symlink_to("no")), "a symbolic link"),
    "link to itself": (lambda p: in_place_of(p, lambda q: q.symlink_to(q)), "a symbolic link"),
    "other bits": (other_generation, "is sound but not the shard that the index names"),
}


@pytest.mark.parametrize("mend", ["repair", "ensure"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_is_lost(sound, damage, mend, caplog):
    root, folder, rows, before = sound
    act, sentence = DAMAGES[damage]
    path = shards(folder)[0]
    lost = keys_of(folder, path)
    act(path)

    opened = ActivationCache.open(root)
    (problem,) = opened.stats()["problems"]
    assert path.name in problem and problem in caplog.text
    with pytest.raises(CorruptCacheError, match=sentence):
        raise CorruptCacheError(problem)
    assert served(opened, rows) == {"equal": len(rows) - len(lost), "absent": len(lost)}
    report = verify(Folder.read(folder), full=True)
    assert report.problems == [problem] and report.rows == len(rows) - len(lost)

    if mend == "repair":
        report = repair(Folder.read(folder))
        assert report.problems == [problem]
        assert not os.path.lexists(path) and verify(Folder.read(folder), full=True).sound
        opened = ActivationCache.open(root)
        assert not opened.stats()["problems"]
        assert served(opened, rows) == {"equal": len(rows) - len(lost), "absent": len(lost)}
    elif damage == "folder":
        with pytest.raises(CacheError, match="cannot be written: Is a directory"):
            built(root, DATA)
        path.rmdir()
    report, opened = built(root, DATA)
    assert report.computed == len(lost)
    assert rows_of(opened) == rows
    assert files(folder) == before
    assert verify(Folder.read(folder), full=True).sound


def test_a_folder_with_something_in_it_is_not_removed(sound):
    path = shards(sound[1])[0]
    in_place_of(path, Path.mkdir)
    (path / "thesis.tex").touch()
    with pytest.raises(CacheError, match="cannot be removed: Directory not empty; take it away"):
        repair(Folder.read(sound[1]))
    assert (path / "thesis.tex").exists()


@pytest.mark.parametrize("index", ["there", "deleted", "damaged"])
@pytest.mark.parametrize("mend", ["repair", "ensure"])
def test_exchanged_shards(sound, index, mend):
    """Each is sound in itself: what gives them away is the name, also where no index is left."""
    root, folder, rows, _ = sound
    a, *_, b = shards(folder)
    lost = keys_of(folder, a, b)
    exchange(folder, a, b)
    if index == "deleted":
        (folder / INDEX).unlink()
    elif index == "damaged":
        flip(folder / INDEX, 7, 1)
    opened = ActivationCache.open(root)
    problems = opened.stats()["problems"]
    problems = [p for p in problems if a.name in p or b.name in p]
    assert len(problems) == 2
    if index != "there":  # (else their sizes may differ from what the index says)
        assert all("holds the rows of another shard" in problem for problem in problems)
    assert served(opened, rows) == {"equal": len(rows) - len(lost), "absent": len(lost)}
    if mend == "repair":
        found = repair(Folder.read(folder))
        assert sorted(found.bad) == sorted([a.name, b.name])
    report, opened = built(root, DATA)
    assert report.computed == len(lost)
    assert rows_of(opened) == rows_of(ActivationCache.open(root)) == rows
    assert verify(Folder.read(folder), full=True).sound


def test_a_shard_of_another_cache(sound, tmp_path):
    root, folder, rows, _ = sound
    other = ActivationCache.open(tmp_path / "other", model(), insertion_layer=1)
    other.ensure(model(), DATA, insertion_layer=1, shard_bytes=SHARD_BYTES)
    path = shards(folder)[0]
    lost = keys_of(folder, path)
    stranger = shards(folder_of(tmp_path / "other"))[0]
    shutil.copy(stranger, path)  # in place of one
    shutil.copy(stranger, folder)  # and beside the others
    for name in (None, INDEX):
        if name:
            (folder / name).unlink()
        opened = ActivationCache.open(root)
        assert "belongs to another cache" in opened.stats()["problems"][-1] or name is None
        assert served(opened, rows) == {"equal": len(rows) - len(lost), "absent": len(lost)}
    report, opened = built(root, DATA)
    assert report.computed == len(lost) and rows_of(opened) == rows


def test_scales_of_another_cache(stores, tmp_path):
    """int8c rows mean nothing without the scales that they were made with."""
    root = shutil.copytree(stores["int8c"][0], tmp_path / "cache")
    rows, folder = stores["int8c"][1], folder_of(root)
    path = shards(folder)[0]
    lost = keys_of(folder, path)
    path.write_bytes(forged(path, channel_scale=lambda a: a * 2))
    (folder / INDEX).unlink()
    opened = ActivationCache.open(root)
    assert "belongs to another cache" in opened.stats()["problems"][0]
    assert served(opened, rows) == {"equal": len(rows) - len(lost), "absent": len(lost)}


# -- the index -------------------------------------------------------------------------------------


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
