"""Builds that are killed, stopped, short of room, or not alone: nothing is lost or doubled, and what
is built in the end is to the byte what an undisturbed build makes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_cases import (
    SHARD_BYTES,
    Child,
    K,
    Slow,
    build,
    build_slowly,
    files,
    fill,
    folder_of,
    hear,
    model,
    rows_of,
    say,
    texts,
)

from lpt_fast.cache import ActivationCache, CacheBusyError, CacheError
from lpt_fast.cache import build as building
from lpt_fast.cache.folder import INDEX, LOCK, MANIFEST, Folder
from lpt_fast.cache.forward import Runner
from lpt_fast.cache.verify import export, gc, verify

DATA = texts(300)
KILLS = 30


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files and rows of an undisturbed build."""
    root = tmp_path_factory.mktemp("whole")
    opened = fill(root, DATA)
    found = files(folder_of(root))
    assert len(found) > 30
    return found, rows_of(opened)


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


def assert_whole(root, whole) -> None:
    """The same bytes in the same files, nothing else, and the same rows."""
    found = files(folder_of(root))
    assert found.keys() == whole[0].keys()
    assert found == whole[0]
    with ActivationCache.open(root) as opened:
        assert rows_of(opened) == whole[1]
    report = verify(Folder.read(folder_of(root)), full=True)
    assert report.sound and report.rows == len(whole[1])


def assert_sound_so_far(root, whole) -> None:
    """Whatever a build that died left: finished shards are right, and the index is one."""
    if not root.exists() or not any(root.iterdir()):
        return
    for name, content in files(folder_of(root)).items():
        if name.endswith((".safetensors", MANIFEST)):
            assert content == whole[0][name], name
    if (folder_of(root) / MANIFEST).exists():
        folder = Folder.read(folder_of(root))
        for entry in folder.read_index() or ():
            folder.read_shard(entry.name, entry)


# -- killed ----------------------------------------------------------------------------------------


def test_killed_at_random_moments(root, whole):
    dice, where, length = random.Random(0), Counter(), 0.35
    rounds = 0
    while sum(where.values()) < KILLS:
        at = root / str(rounds)
        child = Child(build_slowly, at, DATA, 0.003, None, dice.random())
        time.sleep(dice.random() * length)
        if child.end(signal.SIGKILL) == 0 or child.phase == "ended":
            rounds += 1
            assert_whole(at, whole)
            continue
        where[child.phase] += 1
        assert_sound_so_far(at, whole)
    child = Child(build, at, DATA)
    assert child.wait() == "done"
    assert_whole(at, whole)
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


@pytest.fixture(scope="module")
def shard_count(whole):
    return sum(name.endswith(".safetensors") for name in whole[0])


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step[1]} {step[0]}")
def test_killed_at_every_step(root, whole, shard_count, step):
    die = (shard_count if step[0] < 0 else step[0], step[1])
    child = Child(build_slowly, root, DATA, 0.0, die)
    assert child.end() == -signal.SIGKILL and child.phase == step[1]
    assert_sound_so_far(root, whole)
    child = Child(build, root, DATA)
    assert child.wait() == "done"
    assert_whole(root, whole)


def test_killed_twice_in_one_folder_with_more_texts(root):
    """A first build ends, a second one for more texts is killed: the first index still serves, and
    a reader loses nothing by it.
    """
    fill(root, DATA[:100])
    before = rows_of(ActivationCache.open(root))
    child = Child(build_slowly, root, DATA, 0.0, (4, "after rename safetensors"))
    assert child.end() == -signal.SIGKILL
    reader = ActivationCache.open(root)
    assert rows_of(reader) == before and not reader.stats()["problems"]
    opened = fill(root, DATA)
    assert rows_of(opened).keys() > before.keys()
    assert rows_of(ActivationCache.open(root)) == rows_of(opened)
    assert not Folder.read(folder_of(root)).part_names()


def test_the_lock_of_a_killed_builder_is_free_at_once(root, whole):
    child = Child(hold, root, DATA)
    child.wait()
    assert child.end(signal.SIGKILL) == -signal.SIGKILL
    fill(root, DATA)
    assert_whole(root, whole)


# -- stopped ---------------------------------------------------------------------------------------


def named(root) -> set[str]:
    return {entry.name for entry in Folder.read(folder_of(root)).read_index()}


def assert_orderly(root, whole, least=1) -> None:
    """No unfinished file is left, and the index names what is finished."""
    found = set(files(folder_of(root)))
    assert found <= whole[0].keys()
    assert len(named(root)) >= least
    assert found == named(root) | {INDEX, MANIFEST}


@contextmanager
def after_forwards(count: int, act):
    """Calls `act` instead of the next forward after `count`, once."""
    run, seen = Runner.run, []

    def counted(*args, **more):
        seen.append(1)
        if len(seen) == count + 1:
            act()
        return run(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "run", counted)
        yield
    assert len(seen) > count


def throw(error):
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("device")])
def test_an_exception_in_the_loop(root, whole, error):
    with after_forwards(12, lambda: throw(error)), pytest.raises(type(error)):
        fill(root, DATA)
    assert_orderly(root, whole, least=5)
    assert not [t for t in threading.enumerate() if t.name == "lpt-fast cache writer"]
    fill(root, DATA)
    assert_whole(root, whole)


def test_sigterm_ends_a_build_in_order(root, whole):
    child = Child(build_slowly, root, DATA, 0.005)
    while not child.phase.startswith("before rename safet"):
        time.sleep(0.001)
    time.sleep(0.1)
    assert child.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert_orderly(root, whole)
    child = Child(build, root, DATA)
    assert child.wait() == "done"
    assert_whole(root, whole)


def test_sigterm_is_left_to_handlers_of_others(root):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with after_forwards(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            fill(root, DATA)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before)
    fill(root, texts(20, seed=1))
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_on_the_writers_thread(root, whole, monkeypatch):
    fsync, seen = os.fsync, []

    def failing(fd):
        seen.append(1)
        if len(seen) == 15:
            raise OSError(5, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CacheError, match=r"cannot be written: Input/output error; give a folder"):
        fill(root, DATA)
    assert_orderly(root, whole)
    fill(root, DATA)
    assert_whole(root, whole)


# -- no room ---------------------------------------------------------------------------------------


@contextmanager
def mounted(path: Path, size: int):
    """A small disk at `path`."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a disk here")
    try:
        yield path
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(path)], capture_output=True)
        subprocess.run(["umount", "-l", str(path)], check=True)


def stuff(path: Path, leave: int = 0) -> Path:
    """Fills the disk with a file, all but `leave` bytes."""
    ballast = path / "ballast"
    with open(ballast, "wb") as f:
        os.posix_fallocate(f.fileno(), 0, max(1, shutil.disk_usage(path).free - leave))
    return ballast


def test_too_small_a_disk_is_said_before_anything_is_computed(tmp_path, whole):
    with mounted(tmp_path / "disk", 3 << 20) as disk:
        root = disk / "cache"
        ballast = stuff(disk, leave=100_000)
        with after_forwards(-1, lambda: None), pytest.raises(AssertionError):
            # (No forward is run: the check of the context fails.)
            with pytest.raises(CacheError, match=r"need [\d,]+ bytes and .* has [\d,]+ free, exp"):
                fill(root, DATA)
            raise AssertionError
        assert not any(name.endswith(".json") for name in files(folder_of(root)))
        ballast.unlink()
        fill(root, DATA)
        assert_whole(root, whole)


@pytest.mark.parametrize("leave", [0, 5000, 20000])
def test_a_disk_that_fills_up_meanwhile(tmp_path, whole, leave):
    with mounted(tmp_path / "disk", 3 << 20) as disk:
        root = disk / "cache"
        sentence = r"There is no room for [\d,]+ bytes at .* what is finished stays, so make room"
        with after_forwards(12, lambda: stuff(disk, leave)), pytest.raises(CacheError) as error:
            fill(root, DATA)
        assert error.match(sentence)
        (disk / "ballast").unlink()
        kept = {n for n in files(folder_of(root)) if n.endswith(".safetensors")}
        assert len(kept) > 5 and not Folder.read(folder_of(root)).part_names()
        if leave == 5000:  # too little for a shard, enough for the index
            assert_orderly(root, whole)
        again = ActivationCache.open(root, model(), insertion_layer=K)
        report = again.build(model(), DATA, insertion_layer=K, shard_bytes=SHARD_BYTES)
        assert report.computed < report.unique - len(kept)  # those were not computed again
        assert_whole(root, whole)


@pytest.mark.parametrize("what", ["write_manifest", "write_index"])
def test_no_room_for_a_document(tmp_path, whole, monkeypatch, what):
    with mounted(tmp_path / "disk", 3 << 20) as disk:
        root, plain = disk / "cache", getattr(Folder, what)

        def full(*args):
            stuff(disk)
            plain(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, what, full)
            with pytest.raises(CacheError, match="There is no room in .* make room"):
                fill(root, DATA)
        (disk / "ballast").unlink()
        assert set(files(folder_of(root))) <= whole[0].keys()
        fill(root, DATA)
        assert_whole(root, whole)


def test_export_to_a_full_disk(tmp_path, whole):
    fill(tmp_path / "cache", DATA)
    folder = Folder.read(folder_of(tmp_path / "cache"))
    with mounted(tmp_path / "disk", 3 << 20) as disk:
        stuff(disk, leave=50_000)
        with pytest.raises(CacheError, match=r"needs [\d,]+ bytes and .* has [\d,]+ free"):
            export(folder, disk / "out")
        assert not any((disk / "out").iterdir())
        (disk / "ballast").unlink()
        with pytest.MonkeyPatch.context() as patch:
            plain = Folder.write_manifest
            patch.setattr(Folder, "write_manifest", lambda s: (plain(s), stuff(disk, 99_000))[0])
            with pytest.raises(CacheError, match="cannot be written: No space left"):
                export(folder, disk / "out")
        assert not any((disk / "out").iterdir())
        (disk / "ballast").unlink()
        export(folder, disk / "out")
        assert_whole(disk / "out", whole)


# -- no right to write -----------------------------------------------------------------------------


def test_a_folder_that_can_only_be_read(tmp_path, whole):
    with mounted(tmp_path / "disk", 4 << 20) as disk:
        fill(disk / "cache", DATA)
        read_only = ["mount", "-o", "remount,ro", str(disk)]
        if subprocess.run(read_only, capture_output=True).returncode:
            pytest.skip("cannot mount read-only here")
        opened = ActivationCache.open(disk / "cache", model(), insertion_layer=K)
        assert rows_of(opened) == whole[1]
        rows = opened.ensure(model(), DATA[::-1], insertion_layer=K)
        assert len(rows) == len(DATA)
        for act in (
            lambda: opened.ensure(model(), texts(9, seed=5), insertion_layer=K),
            lambda: fill(disk / "other", DATA),
            lambda: gc(Folder.read(folder_of(disk / "cache"))),
            lambda: export(Folder.read(folder_of(disk / "cache")), disk / "out"),
        ):
            with pytest.raises(CacheError, match="cannot be written: Read-only file system"):
                act()
        assert rows_of(opened) == whole[1]


def test_rows_that_no_index_names_serve_where_nothing_can_be_written(tmp_path, whole):
    with mounted(tmp_path / "disk", 4 << 20) as disk:
        fill(disk / "cache", DATA)
        (folder_of(disk / "cache") / INDEX).unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        opened = ActivationCache.open(disk / "cache", model(), insertion_layer=K)
        assert len(opened.ensure(model(), DATA, insertion_layer=K)) == len(DATA)
        assert rows_of(opened) == whole[1]


# -- not alone -------------------------------------------------------------------------------------


def hold(root, data, settings=None, at=8) -> None:
    """In a child: a build that says when it is at work, and waits to be told to go on."""
    run, seen = Runner.run, []

    def waiting(*args, **more):
        seen.append(1)
        if len(seen) == at:
            say("building")
            hear()
        return run(*args, **more)

    Runner.run = waiting
    build(root, data, settings)


def test_a_second_builder_is_told_who_builds(root, whole):
    child = Child(hold, root, DATA)
    assert child.wait() == "building"
    who = rf"is being built by process {child.process.pid} on \S+ since \d{{4}}-.*wait for it"
    start = time.monotonic()
    with pytest.raises(CacheBusyError, match=who):
        fill(root, DATA)
    assert time.monotonic() - start < 1
    with pytest.raises(CacheBusyError, match=who):
        fill(root, DATA, wait=0.3)
    assert 0.3 < time.monotonic() - start < 3
    for act in (gc,):
        with pytest.raises(CacheBusyError, match=who):
            act(Folder.read(folder_of(root)))
    # What is there already needs no lock.
    reader = ActivationCache.open(root, model(), insertion_layer=K)
    known = [i for i, row in enumerate(reader.find(list(whole[1])).tolist()) if row >= 0]
    assert 0 < len(known) < len(whole[1])
    child.go()
    assert child.wait() == "done"
    assert_whole(root, whole)


def test_a_second_builder_waits_and_finds_all_there(root, whole):
    child = Child(hold, root, DATA)
    assert child.wait() == "building"
    threading.Timer(0.3, child.go).start()
    opened = ActivationCache.open(root, model(), insertion_layer=K)
    report = opened.build(model(), DATA, insertion_layer=K, shard_bytes=SHARD_BYTES, wait=30.0)
    assert child.wait() == "done"
    assert report.computed == 0
    assert rows_of(opened) == whole[1]
    assert_whole(root, whole)


def test_the_second_builder_takes_the_scales_of_the_first(root):
    """An int8c cache has one set of scales, whoever writes the manifest."""
    child = Child(hold, root, DATA[:50], {"store": "int8c"}, 1)
    assert child.wait() == "building"
    assert (folder_of(root) / LOCK).exists() and not (folder_of(root) / MANIFEST).exists()
    threading.Timer(0.2, child.go).start()
    opened = fill(root, DATA[50:], store="int8c", wait=30.0)
    assert child.wait() == "done"
    again = ActivationCache.open(root, model(), insertion_layer=K)
    assert not again.stats()["problems"]
    rows = again.rows(DATA)
    assert torch.equal(again.read(rows).hidden, opened.read(opened.rows(DATA)).hidden)


def test_a_reader_sees_what_another_process_builds(root, whole):
    child = Child(build_slowly, root, DATA, 0.004)
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
    assert counts[0] < len(whole[1]) == len(reader) and len(set(counts)) > 5
    assert rows_of(reader) == whole[1]


def test_a_reader_of_an_older_index_sees_more_after_refresh(root, whole):
    fill(root, DATA[:50])
    reader = ActivationCache.open(root)
    before = rows_of(reader)
    child = Child(build, root, DATA)
    assert child.wait() == "done"
    assert rows_of(reader) == before
    reader.refresh()
    found = rows_of(reader)
    assert found.keys() == whole[1].keys() and list(found)[: len(before)] == list(before)


def test_a_dead_builders_words_are_not_believed(root):
    """Who holds the lock is said by the system; what its file says may be anything."""
    fill(root, DATA[:20])
    lock = folder_of(root) / LOCK
    assert json.loads(lock.read_text())["pid"] == os.getpid()
    for words in (b"", b"[" * 4000, b"\xff", b'{"pid": 1, "since": 1e999, "host": ""}'):
        lock.write_bytes(words)
        child = Child(hold, root, DATA)
        child.wait()
        lock.write_bytes(words)
        with pytest.raises(CacheBusyError, match="built by another process; wait"):
            fill(root, DATA)
        child.end(signal.SIGKILL)


def test_a_change_under_an_open_cache_is_said(root):
    opened = fill(root, DATA[:100])
    shard = next(folder_of(root).glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(CacheError, match=r"was changed since .* open the cache again"):
        opened.ensure(model(), DATA, insertion_layer=K)
    fill(root, DATA)
    assert verify(Folder.read(folder_of(root)), full=True).sound


def test_slow_is_seen_by_the_code():
    """The steps above are those of the code: whoever renames them sees it here."""
    names = {step[1].split()[-1] for step in STEPS}
    assert names == {"safetensors", "manifest", "index", "folder", "forward"}
    assert Slow.kind("/x/ab.safetensors.1-0.part") == "safetensors"
    assert building.MANIFEST == MANIFEST
