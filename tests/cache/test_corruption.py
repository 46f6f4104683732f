"""Bytes that are not those that were written: every one is found, no wrong number is read, the
sound rows still serve, and the lost ones come back.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lpt_fast.cache import ActivationCache, CacheError, CorruptCacheError
from lpt_fast.cache.folder import INDEX, MANIFEST, Folder
from lpt_fast.cache.verify import repair, verify
from tests.cache.cases import (
    SHARD_BYTES,
    bits,
    built,
    files,
    flip,
    folder_of,
    forged,
    layout_of,
    model,
    rows_of,
    served,
)
from tests.cache.damage import (
    DAMAGES,
    DATA,
    exchange,
    in_place_of,
    keys_of,
    shards,
)

FLIPS = 26  # of each region of each store


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


@pytest.mark.slow
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


@pytest.mark.slow
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
