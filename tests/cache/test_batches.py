"""Batches of a cache ahead of their use: the sampler's order, one thread, errors, a cold disk."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time

import pytest
import torch

from lpt_fast.cache import CorruptCacheError, reader
from lpt_fast.cache.planner import TIERS
from tests.cache.cached_texts import DEVICES, all_stores, filled, flip, opened, ragged, same_bits
from tests.tiny import tiny

BATCHES = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3], [5, 8], [19, 0]]
READERS = "lpt-fast cache reader"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return all_stores(tmp_path_factory.mktemp("caches"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("store", ["bf16", "int8c"])
def test_batches(root, store, tier, prefetch, device):
    """In the sampler's order, as `read` gives them; on a GPU from a side stream."""
    cache = opened(root, store, tier=tier, device=device)
    plain = opened(root, store)
    settings = {"room": 2, "dtype": torch.float32}
    sampler = (torch.tensor(rows) for rows in BATCHES * 3)
    count = 0
    for batch, rows in zip(
        cache.batches(sampler, prefetch=prefetch, **settings), BATCHES * 3, strict=True
    ):
        expected = plain.read(rows, **settings)
        assert batch.hidden.device.type == device and batch.room == 2
        assert same_bits(batch.text(), expected.text())
        for name in ("cu_seqlens", "input_ids"):
            assert same_bits(getattr(batch, name), getattr(expected, name))
        assert (batch.identity, batch.max_seqlen) == (expected.identity, expected.max_seqlen)
        count += 1
    assert count == 18
    assert list(cache.batches([], prefetch=prefetch)) == []


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == READERS]


def waits_for(condition) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_how_far_ahead(root, prefetch):
    """`prefetch` batches wait, and one more is at hand; nothing is read before the first is asked
    for.
    """
    cache, taken, threads = opened(root), [], set()

    def sampler():
        for rows in BATCHES:
            taken.append(rows)
            threads.add(threading.current_thread().name)
            yield rows

    before = cache.stats()["rows_read"]
    batches = cache.batches(sampler(), prefetch=prefetch)
    assert not taken and not readers()
    next(batches)
    ahead = min(len(BATCHES), 1 + prefetch + (prefetch > 0))
    assert waits_for(lambda: len(taken) == ahead)
    time.sleep(0.1)
    assert len(taken) == ahead and len(readers()) == (prefetch > 0)
    rest = list(batches)
    assert len(rest) == len(BATCHES) - 1 and not readers()
    assert threads == ({READERS} if prefetch else {threading.current_thread().name})
    assert cache.stats()["rows_read"] - before == sum(map(len, BATCHES))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_reach_the_consumer(prefetch, tmp_path):
    cache, rows = filled(tmp_path, tiny("bert"), ragged())

    def broken():
        yield rows[:2]
        yield rows[2:3]
        raise ZeroDivisionError("of the sampler")

    seen = []
    with pytest.raises(ZeroDivisionError, match="of the sampler"):
        _collect(seen, cache.batches(broken(), prefetch=prefetch))
    assert [len(batch) for batch in seen] == [2, 1] and not readers()
    flip(tmp_path, cache, rows[3])
    seen = []
    with pytest.raises(CorruptCacheError, match=f"Row {rows[3]} of the cache"):
        _collect(seen, cache.batches([rows[:2], rows[2:4], rows[4:]], prefetch=prefetch))
    assert [len(batch) for batch in seen] == [2] and not readers()


def _collect(seen, batches):
    for batch in batches:
        seen.append(batch)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["close", "forget", "break", "error"])
def test_an_abandoned_iterator_stops_its_thread(root, way):
    cache = opened(root)
    batches = cache.batches(itertools.cycle(BATCHES))  # an endless sampler
    next(batches)
    assert len(readers()) == 1
    if way == "close":
        batches.close()
    elif way == "break":
        for i, _ in enumerate(batches):
            if i == 5:
                break
        del batches
    elif way == "error":
        with pytest.raises(RuntimeError, match="in the step"):
            batches.throw(RuntimeError("in the step"))
    else:
        del batches
    gc.collect()
    assert waits_for(lambda: not readers())


def test_two_iterators_at_once(root):
    cache = opened(root)
    expected = [cache.read(rows).hidden for rows in BATCHES]
    both = zip(cache.batches(BATCHES), cache.batches(BATCHES[::-1]), strict=True)
    for i, (a, b) in enumerate(both):
        assert torch.equal(a.hidden, expected[i]) and torch.equal(b.hidden, expected[-1 - i])


def test_an_epoch_goes_on_while_rows_are_added(tmp_path):
    model = tiny("bert")
    cache, rows = filled(tmp_path, model, ragged())
    batches = cache.batches([[row] for row in rows], prefetch=1)
    first = next(batches)
    cache.ensure(model, ragged(20))
    got = torch.cat([first.hidden, *(batch.hidden for batch in batches)])
    assert torch.equal(got, cache.read(rows).hidden)


@pytest.mark.parametrize("tier", TIERS)
def test_a_cold_disk_is_asked_ahead(root, tier, monkeypatch):
    """Every row once, in order, a few rows before it is read; elsewhere nothing."""
    monkeypatch.setattr(reader, "AHEAD_ROWS", 5)
    cache, log = opened(root, tier=tier), []
    fadvise, read = os.posix_fadvise, reader.RowReader.read

    def advise(fd, offset, size, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        log.append(("asked", os.fstat(fd).st_ino, offset, size))
        fadvise(fd, offset, size, advice)

    def reading(self, rows, *more):
        log.append(("read", list(rows)))
        return read(self, rows, *more)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(reader.RowReader, "read", reading)
    list(cache.batches(BATCHES))
    asked = [entry[1:] for entry in log if entry[0] == "asked"]
    assert [rows for kind, *rest in log if kind == "read" for rows in rest] == BATCHES
    if tier != "disk":
        assert not asked
        return
    table = cache._table
    folder = root / cache.identity.folder
    inode = [(folder / name).stat().st_ino for name in table.names]
    flat = [row for rows in BATCHES for row in rows]
    assert asked == [
        (inode[table.shard[row]], table.offset[row], table.length[row] * 128) for row in flat
    ]
    done = ahead = 0
    for entry in log:
        if entry[0] == "asked":
            ahead += 1
        else:
            assert ahead >= min(len(flat), done + 5)
            done += len(entry[1])
