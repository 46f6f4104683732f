"""Builds that are killed, stopped, or not alone: nothing is lost or doubled, and what is built in
the end is to the byte what an undisturbed build makes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lpt_fast.cache import ActivationCache, CacheBusyError, CacheError
from lpt_fast.cache.folder import LOCK, MANIFEST, Folder
from lpt_fast.cache.verify import gc, verify
from tests.cache.cases import (
    MANY,
    Child,
    K,
    after_forwards,
    assert_orderly,
    assert_whole,
    build,
    build_slowly,
    built,
    files,
    fill,
    folder_of,
    hold,
    model,
    rows_of,
    texts,
    undisturbed,
)

KILLS = 30


@pytest.fixture
def root(tmp_path):
    """A folder in memory where there is one: hundreds of fsyncs wait for no disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path / "cache"
        return
    folder = memory / f"lpt-fast-test-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def assert_sound_so_far(root) -> None:
    """Whatever a build that died left: finished shards are right, and the index is one."""
    if not root.exists() or not any(root.iterdir()):
        return
    for name, content in files(folder_of(root)).items():
        if name.endswith((".safetensors", MANIFEST)):
            assert content == undisturbed()[0][name], name
    if (folder_of(root) / MANIFEST).exists():
        folder = Folder.read(folder_of(root))
        for entry in folder.read_index() or ():
            folder.read_shard(entry.name, entry)


# -- killed ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_moments(root):
    dice, where = random.Random(0), Counter()

    def begun(at) -> Child:
        """A build at its first step: until then nothing is there to be left half-done."""
        child = Child(build_slowly, at, MANY, 0.0005, None, dice.random())
        while not child.phase:
            assert child.process.is_alive()
            time.sleep(0.001)
        return child

    started = begun(root / "undisturbed"), time.monotonic()
    assert started[0].end() == 0
    length = time.monotonic() - started[1]
    rounds = 0
    while sum(where.values()) < KILLS:
        at = root / str(rounds)
        child = begun(at)
        time.sleep(dice.random() * length)
        if child.end(signal.SIGKILL) == 0 or child.phase == "ended":
            rounds += 1
            assert_whole(at)
            continue
        where[child.phase] += 1
        assert_sound_so_far(at)
    child = Child(build, at, MANY)
    assert child.wait() == "done"
    assert_whole(at)
    print(f"{rounds} builds ended before they were killed; the others were in {dict(where)}")
    assert len(where) >= 5, where


# Occurrence and name of a step; those of one shard in the middle, and all that happen once.
STEPS = [
    *((9, f"{step} safetensors") for step in ("allocated", "before fsync", "after fsync")),
    *((n, "write safetensors") for n in (20, 21, 22)),  # header, rows, tables of some shard
    *((9, f"{step} safetensors") for step in ("before rename", "after rename")),
    (-1, "after rename safetensors"),  # all are there, and nothing says so
    *((1, f"{step} manifest") for step in ("write", "before fsync", "before rename")),
    (1, "after rename manifest"),
    *((1, f"{step} index") for step in ("write", "after fsync", "before rename", "after rename")),
    (9, "after fsync folder"),
    (7, "forward"),
]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step[1]} {step[0]}")
def test_killed_at_every_step(root, step):
    count = sum(name.endswith(".safetensors") for name in undisturbed()[0])
    die = (count if step[0] < 0 else step[0], step[1])
    child = Child(build_slowly, root, MANY, 0.0, die)
    assert child.end() == -signal.SIGKILL and child.phase == step[1]
    assert_sound_so_far(root)
    child = Child(build, root, MANY)
    assert child.wait() == "done"
    assert_whole(root)


@pytest.mark.slow
def test_killed_twice_in_one_folder_with_more_texts(root):
    """A first build ends, a second one for more texts is killed: the first index still serves, and
    a reader loses nothing by it.
    """
    fill(root, MANY[:100])
    before = rows_of(ActivationCache.open(root))
    child = Child(build_slowly, root, MANY, 0.0, (4, "after rename safetensors"))
    assert child.end() == -signal.SIGKILL
    reader = ActivationCache.open(root)
    assert rows_of(reader) == before and not reader.stats()["problems"]
    opened = fill(root, MANY)
    assert rows_of(opened).keys() > before.keys()
    assert rows_of(ActivationCache.open(root)) == rows_of(opened)
    assert not Folder.read(folder_of(root)).part_names()


@pytest.mark.slow
def test_the_lock_of_a_killed_builder_is_free_at_once(root):
    child = Child(hold, root, MANY)
    child.wait()
    assert child.end(signal.SIGKILL) == -signal.SIGKILL
    fill(root, MANY)
    assert_whole(root)


# -- stopped ---------------------------------------------------------------------------------------


def throw(error):
    raise error


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("device")])
def test_an_exception_in_the_loop(root, error):
    with after_forwards(12, lambda: throw(error)), pytest.raises(type(error)):
        fill(root, MANY)
    assert_orderly(root, least=5)
    assert not [t for t in threading.enumerate() if t.name == "lpt-fast cache writer"]
    fill(root, MANY)
    assert_whole(root)


@pytest.mark.slow
def test_sigterm_ends_a_build_in_order(root):
    child = Child(build_slowly, root, MANY, 0.005)
    while not child.phase.startswith("before rename safet"):
        time.sleep(0.001)
    time.sleep(0.1)
    assert child.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert_orderly(root)
    child = Child(build, root, MANY)
    assert child.wait() == "done"
    assert_whole(root)


@pytest.mark.slow
def test_sigterm_is_left_to_handlers_of_others(root):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with after_forwards(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            fill(root, MANY)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before)
    fill(root, texts(20, seed=1))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_an_error_on_the_writers_thread(root, monkeypatch):
    fsync, seen = os.fsync, []

    def failing(fd):
        seen.append(1)
        if len(seen) == 15:
            raise OSError(5, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CacheError, match=r"cannot be written: Input/output error; give a folder"):
        fill(root, MANY)
    assert_orderly(root)
    fill(root, MANY)
    assert_whole(root)


# -- not alone -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_builder_is_told_who_builds(root):
    child = Child(hold, root, MANY)
    assert child.wait() == "building"
    who = rf"is being built by process {child.process.pid} on \S+ since \d{{4}}-.*wait for it"
    start = time.monotonic()
    with pytest.raises(CacheBusyError, match=who):
        fill(root, MANY)
    assert time.monotonic() - start < 1
    with pytest.raises(CacheBusyError, match=who):
        fill(root, MANY, wait=0.3)
    assert 0.3 < time.monotonic() - start < 3
    for act in (gc,):
        with pytest.raises(CacheBusyError, match=who):
            act(Folder.read(folder_of(root)))
    # What is there already needs no lock.
    reader = ActivationCache.open(root, model(), insertion_layer=K)
    known = [i for i, row in enumerate(reader.find(list(undisturbed()[1])).tolist()) if row >= 0]
    assert 0 < len(known) < len(undisturbed()[1])
    child.go()
    assert child.wait() == "done"
    assert_whole(root)


@pytest.mark.slow
def test_a_second_builder_waits_and_finds_all_there(root):
    child = Child(hold, root, MANY)
    assert child.wait() == "building"
    threading.Timer(0.3, child.go).start()
    report, opened = built(root, MANY, wait=30.0)
    assert child.wait() == "done"
    assert report.computed == 0
    assert rows_of(opened) == undisturbed()[1]
    assert_whole(root)


@pytest.mark.slow
def test_the_second_builder_takes_the_scales_of_the_first(root):
    """An int8c cache has one set of scales, whoever writes the manifest."""
    child = Child(hold, root, MANY[:50], {"store": "int8c"}, 1)
    assert child.wait() == "building"
    assert (folder_of(root) / LOCK).exists() and not (folder_of(root) / MANIFEST).exists()
    threading.Timer(0.2, child.go).start()
    opened = fill(root, MANY[50:], store="int8c", wait=30.0)
    assert child.wait() == "done"
    again = ActivationCache.open(root, model(), insertion_layer=K)
    assert not again.stats()["problems"]
    rows = again.rows(MANY)
    assert torch.equal(again.read(rows).hidden, opened.read(opened.rows(MANY)).hidden)


@pytest.mark.slow
def test_a_reader_sees_what_another_process_builds(root):
    child = Child(build_slowly, root, MANY, 0.004)
    while not root.exists() or not list(root.glob("*/*.safetensors")):
        time.sleep(0.005)
    reader = ActivationCache.open(root)
    counts, first = [], None
    while child.phase != "ended":
        reader.refresh()
        stats = reader.stats()
        assert not stats["problems"]
        counts.append(stats["rows"])
        rows = np.arange(stats["rows"])
        hidden = reader.read(rows).hidden
        if first is not None:
            assert torch.equal(hidden[: len(first)], first)  # numbers of rows stay
        first = hidden
    assert child.wait() == "done"
    reader.refresh()
    assert counts[0] < len(undisturbed()[1]) == len(reader) and len(set(counts)) > 5
    assert rows_of(reader) == undisturbed()[1]


@pytest.mark.slow
def test_a_reader_of_an_older_index_sees_more_after_refresh(root):
    fill(root, MANY[:50])
    reader = ActivationCache.open(root)
    before = rows_of(reader)
    child = Child(build, root, MANY)
    assert child.wait() == "done"
    assert rows_of(reader) == before
    reader.refresh()
    found = rows_of(reader)
    assert found.keys() == undisturbed()[1].keys() and list(found)[: len(before)] == list(before)


@pytest.mark.slow
def test_a_dead_builders_words_are_not_believed(root):
    """Who holds the lock is said by the system; what its file says may be anything."""
    fill(root, MANY[:20])
    lock = folder_of(root) / LOCK
    assert json.loads(lock.read_text())["pid"] == os.getpid()
    for words in (b"", b"[" * 4000, b"\xff", b'{"pid": 1, "since": 1e999, "host": ""}'):
        lock.write_bytes(words)
        child = Child(hold, root, MANY)
        child.wait()
        lock.write_bytes(words)
        with pytest.raises(CacheBusyError, match="built by another process; wait"):
            fill(root, MANY)
        child.end(signal.SIGKILL)


@pytest.mark.slow
def test_a_change_under_an_open_cache_is_said(root):
    opened = fill(root, MANY[:100])
    shard = next(folder_of(root).glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(CacheError, match=r"was changed since .* open the cache again"):
        opened.ensure(model(), MANY, insertion_layer=K)
    fill(root, MANY)
    assert verify(Folder.read(folder_of(root)), full=True).sound
