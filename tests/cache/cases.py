"""Small caches for tests that damage them, and child processes that build them.

Children come from a fork server that has imported torch once; they may be killed at any moment.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from lpt_fast.cache import ActivationCache, CorruptCacheError
from lpt_fast.cache.build_settings import BuildReport
from lpt_fast.cache.folder import INDEX, LOCK, MANIFEST, Folder
from lpt_fast.cache.forward import Runner
from lpt_fast.cache.shard import DTYPES, Layout, build_head, open_file, read_layout
from lpt_fast.cache.verify import verify
from tests.tiny import VOCAB, tiny

K = 2
NURSERY = "LPT_TEST_NURSERY"  # in the environment of the server
SHARD_BYTES = 4096  # 64 tokens of D = 32 in bf16


@cache
def model():
    return tiny("bert")


def texts(count: int, seed: int = 0, longest: int = 24) -> list[dict]:
    """Ragged texts, a third of them with token types, some twice."""
    random = np.random.default_rng(seed)
    out = []
    for length in random.integers(1, longest, count).tolist():
        out.append({"input_ids": random.integers(3, VOCAB, length).tolist()})
        if random.random() < 0.3:
            out[-1]["token_type_ids"] = [0] * (length // 2) + [1] * (length - length // 2)
    return out + out[:3]


@contextmanager
def one_thread():
    """Bits are compared between processes, so all compute alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fill(root, data, store=None, **settings) -> ActivationCache:
    """Computes what is missing at `root` (`ensure`); the open cache."""
    opened = ActivationCache.open(root, model(), insertion_layer=K, store=store)
    settings = {"insertion_layer": K, "shard_bytes": SHARD_BYTES, **settings}
    with one_thread():
        opened.ensure(model(), data, **settings)
    return opened


def built(root, data, store=None, **settings) -> tuple[BuildReport, ActivationCache]:
    """The same by `build`, which says what it did."""
    opened = ActivationCache.open(root, model(), insertion_layer=K, store=store)
    with one_thread():
        settings = {"insertion_layer": K, "shard_bytes": SHARD_BYTES, **settings}
        return opened.build(model(), data, **settings), opened


def folder_of(root) -> Path:
    """The only cache in a root."""
    (path,) = (p for p in Path(root).iterdir() if p.is_dir())
    return path


def files(folder) -> dict[str, bytes]:
    """Every file of a cache but its lock (which names the process that held it)."""
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != LOCK}


def bits(batch) -> list[bytes]:
    """The hidden states of each text of a batch."""
    raw = batch.text().contiguous().view(torch.uint8).numpy()
    ends = batch.cu_seqlens.tolist()
    return [raw[a:b].tobytes() for a, b in pairwise(ends)]


def rows_of(opened: ActivationCache) -> dict[bytes, bytes]:
    """Key -> hidden states of every row of a sound cache; no key is there twice."""
    opened.stats()  # one that was opened without a model looks for its cache now
    keys = [key.tobytes() for key in opened._table.key]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, bits(opened.read(np.arange(len(keys)))), strict=True))


def served(opened: ActivationCache, original: dict[bytes, bytes]) -> Counter:
    """What becomes of the rows that were written, read one by one: "equal", "refused" (the row or
    its file is named) or "absent". Anything else is a wrong number.
    """
    out = Counter()
    for key, row in zip(original, opened.find(list(original)).tolist(), strict=True):
        if row < 0:
            out["absent"] += 1
            continue
        try:
            (got,) = bits(opened.read([row]))
        except CorruptCacheError as error:
            file = opened._table.names[opened._table.shard[row]]
            assert f"Row {row} " in str(error) or file in str(error), error
            out["refused"] += 1
            continue
        assert got == original[key]
        out["equal"] += 1
    return out


MANY = texts(300)


@cache
def undisturbed() -> tuple[dict[str, bytes], dict[bytes, bytes]]:
    """The files and rows of a cache of MANY texts that nothing happened to."""
    with tempfile.TemporaryDirectory() as root:
        opened = fill(root, MANY)
        return files(folder_of(root)), rows_of(opened)


def assert_whole(root) -> None:
    """The same bytes in the same files as `undisturbed`, nothing else, and the same rows."""
    expected, rows = undisturbed()
    found = files(folder_of(root))
    assert found.keys() == expected.keys()
    assert found == expected
    with ActivationCache.open(root) as opened:
        assert rows_of(opened) == rows
    report = verify(Folder.read(folder_of(root)), full=True)
    assert report.sound and report.rows == len(rows)


def assert_orderly(root, least: int = 1) -> None:
    """No unfinished file is left, and the index names what is finished."""
    found = set(files(folder_of(root)))
    assert found <= undisturbed()[0].keys()
    named = {entry.name for entry in Folder.read(folder_of(root)).read_index()}
    assert len(named) >= least
    assert found == named | {INDEX, MANIFEST}


@contextmanager
def after_forwards(count: int, act):
    """Calls `act` before the forward that follows `count` others."""
    run, seen = Runner.run, []

    def counted(*args, **more):
        seen.append(1)
        if len(seen) == count + 1:
            act()
        return run(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "run", counted)
        yield


# -- damage ----------------------------------------------------------------------------------------


def flip(path: Path, offset: int, bit: int) -> bytes:
    """Flips one bit of a file; what it held before."""
    before = path.read_bytes()
    after = bytearray(before)
    after[offset] ^= 1 << bit
    path.write_bytes(after)
    return before


def layout_of(path: Path) -> Layout:
    fd, size = open_file(path)
    try:
        return read_layout(fd, size, path)
    finally:
        os.close(fd)


def forged(path: Path, **changes) -> bytes:
    """A shard with other tables or hidden states whose digest and hashes are right again.

    Args:
        path: of the shard.
        changes: name of a tensor -> function of its values as the file holds them.
    """
    layout, raw = layout_of(path), path.read_bytes()
    tables = {}
    for name, (dtype, shape) in layout.tensors.items():
        begin, end = layout.spans[name]
        data = raw[len(layout.header) + begin : len(layout.header) + end]
        tables[name] = np.frombuffer(data, DTYPES[dtype][0]).reshape(shape)
        if name in changes:
            tables[name] = np.asarray(changes[name](tables[name]), tables[name].dtype)
    hidden = tables.pop("hidden")
    del tables["digest"]
    if "hidden" in changes:
        ends = tables["cu_seqlens"].tolist()
        rows = [hidden[a:b].tobytes() for a, b in pairwise(ends)]
        tables["row_hash"] = [xxhash.xxh3_64_intdigest(row) for row in rows]
    return build_head(layout, tables) + hidden.tobytes()


# -- children --------------------------------------------------------------------------------------


@cache
def nursery():
    """The context of children. The server imports this file, and torch with it, once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        patch.setenv(NURSERY, "1")
        forkserver.ensure_running()
    return context


class Child:
    """A process that runs `target(*args)` and says when it begins; `phase` tells where it is."""

    def __init__(self, target, *args):
        context = nursery()
        self._pipe, theirs = context.Pipe()
        self._phase = context.Array("c", 64, lock=False)
        self.process = context.Process(target=_run, args=(theirs, self._phase, target, args))
        self.process.start()
        theirs.close()
        assert self.wait() == "ready"

    def wait(self, timeout: float = 60.0):
        """The next thing that the child says."""
        assert self._pipe.poll(timeout), "the child says nothing"
        return self._pipe.recv()

    def go(self) -> None:
        """Lets a child go on that waits in `hear`."""
        self._pipe.send("go")

    @property
    def phase(self) -> str:
        return self._phase.value.decode()

    def end(self, number: int | None = None, timeout: float = 60.0) -> int:
        """Sends a signal, waits; the exit code."""
        if number is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"the child hangs in {self.phase}"
        return self.process.exitcode


def _run(pipe, phase, target, args) -> None:
    global _pipe, _phase
    _pipe, _phase = pipe, phase
    say("ready")
    target(*args)


def say(what) -> None:
    """From a child to its parent."""
    _pipe.send(what)


def hear() -> str:
    """Waits for the parent."""
    return _pipe.recv()


def build(root, data, settings=None) -> None:
    """In a child: builds, and says how it ended."""
    try:
        fill(root, data, **(settings or {}))
        say("done")
    except Exception as error:
        say(f"{type(error).__name__}: {error}")


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


class Slow:
    """In a child: every step of a build takes a while (writes in two halves), and is named.

    Args:
        pause: seconds that a step takes, at most.
        die: a step to be killed at, as the number of its occurrence and its name.
    """

    def __init__(self, pause: float, die: tuple[int, str] | None = None, seed: int = 0):
        self.pause, self.die = pause, die
        self.seen: Counter = Counter()
        self.random = random.Random(seed)
        self.plain = {n: getattr(os, n) for n in ("pwrite", "fsync", "replace", "posix_fallocate")}
        for name in self.plain:
            setattr(os, name, getattr(self, name))
        self.run = Runner.run
        Runner.run = lambda *args, **more: (self.step("forward"), self.run(*args, **more))[1]

    def step(self, name: str) -> None:
        _phase.value = name.encode()
        self.seen[name] += 1
        if self.die == (self.seen[name], name):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.random.random() * self.pause)

    @staticmethod
    def kind(path: str) -> str:
        """Shard, index, manifest, lock or folder."""
        name = os.path.basename(path)
        return next(
            (k for k in ("safetensors", "index", "manifest", "lock") if k in name), "folder"
        )

    def kind_of(self, fd: int) -> str:
        return self.kind(os.readlink(f"/proc/self/fd/{fd}"))

    def pwrite(self, fd, data, offset):
        kind, half = self.kind_of(fd), len(data) // 2
        self.plain["pwrite"](fd, data[:half], offset)
        self.step(f"write {kind}")
        return half + self.plain["pwrite"](fd, data[half:], offset + half)

    def fsync(self, fd):
        kind = self.kind_of(fd)
        self.step(f"before fsync {kind}")
        self.plain["fsync"](fd)
        self.step(f"after fsync {kind}")

    def replace(self, old, new):
        self.step(f"before rename {self.kind(new)}")
        self.plain["replace"](old, new)
        self.step(f"after rename {self.kind(new)}")

    def posix_fallocate(self, fd, offset, size):
        self.plain["posix_fallocate"](fd, offset, size)
        self.step(f"allocated {self.kind_of(fd)}")


def build_slowly(root, data, pause, die=None, seed=0) -> None:
    """In a child: a build whose every moment is long enough to be killed in."""
    Slow(pause, die, seed)
    build(root, data)
    _phase.value = b"ended"


if NURSERY in os.environ:  # what every child would do first
    torch.set_num_threads(1)
    with torch.no_grad():
        model()(torch.tensor([[5, 6]]))
