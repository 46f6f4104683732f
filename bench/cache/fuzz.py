"""Mutated caches: every one is refused with a clear error or serves the rows that were written.

    python -m bench.cache.fuzz --mutations 1000000 --seed 0

A small valid cache lies in memory. A mutation changes one or two of its files: bits, bytes, cuts,
insertions, copied ranges, edits of the JSON, other headers and tables, files exchanged or gone;
digests are often made right again, so that what is behind them is reached. Then the cache is
opened, all rows are read, and at times everything is verified. A finding is what must not be: a
row with other bits, an exception of another kind, a hang, memory taken for what a file claims, or
a change that a full verification does not see.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import torch

from lpt_fast.cache import ActivationCache, CacheError
from lpt_fast.cache.folder import Folder
from lpt_fast.cache.identity import Identity
from lpt_fast.cache.index import KeyTable, RowTable
from lpt_fast.cache.planner import Plan
from lpt_fast.cache.quantize import encode
from lpt_fast.cache.reader import RowReader
from lpt_fast.cache.rows import Text
from lpt_fast.cache.state import State
from lpt_fast.cache.verify import verify
from lpt_fast.cache.writer import ShardWriter

from .mutations import WIDTH, Mutation, Sample, mutate

SECONDS = 5.0  # that a mutation may take
MEMORY = 512 << 20  # bytes that a mutation may take, beyond what the program has
VERIFIED = 8  # one mutation of so many is opened as users do and verified in full
PLAN = Plan("page", "it is small")


class Hang(BaseException):
    """A mutation took too long."""


def make_sample(root: Path, store: str, seed: int = 0) -> Sample:
    """Two shards: plain texts, and texts with types and positions."""
    dice = np.random.default_rng(seed)
    identity = Identity(
        {
            "version": 1,
            "backbone": "BertModel",
            "config": {"hidden_size": WIDTH, "rope": {"theta": "1e4", "kinds": ["a", "b"]}},
            "layer": 2,
            "width": WIDTH,
            "weights": "0" * 32,
            "compute_dtype": "float32",
            "store": store,
        }
    )
    folder = Folder(root / identity.folder, identity, {"model": "none"})
    folder.path.mkdir(parents=True)
    if store == "int8c":
        folder.channel_scale = dice.uniform(0.5, 2, WIDTH).astype(np.float32)
    folder.write_manifest()
    entries, layouts = [], {}
    for own, lengths in ((False, (3, 1, 2)), (True, (2, 4))):
        texts = []
        for length in lengths:
            ids = dice.integers(0, 70000 if own else 99, length).astype(np.int32)
            places = np.arange(length, dtype=np.int32) + 1
            texts.append(Text(ids, places % 2, places) if own else Text(ids))
        writer = ShardWriter(folder, texts, ["a text"] * len(texts), "1-0")
        hidden = torch.from_numpy(dice.standard_normal((sum(lengths), WIDTH), np.float32))
        scale = None if folder.channel_scale is None else torch.from_numpy(folder.channel_scale)
        writer.write(*encode(hidden, store, scale), len(texts))
        entries.append(writer.close())
        layouts[writer.name] = writer.layout
    folder.write_index(entries)
    files = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    reader = open_parts(folder.path)[0]
    keys = [key.tobytes() for key in reader.table.key]
    rows = dict(zip(keys, read(reader, np.arange(len(keys))), strict=True))
    return Sample(root, folder.path, files, layouts, rows)


@contextmanager
def made_samples() -> Iterator[list[Sample]]:
    """One cache of floats and one of 8 bits, in memory where there is a folder for it."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="lpt-fast-fuzz-", dir=memory))
    try:
        yield [make_sample(root / store, store) for store in ("bf16", "int8c")]
    finally:
        shutil.rmtree(root)


def open_parts(path: Path) -> tuple[RowReader, KeyTable, bool]:
    """What ActivationCache.open does, without looking for the cache and at the machine: a reader,
    the keys, and whether there are problems.
    """
    folder = Folder.read(path)
    state = State(folder).load(adopt=False)
    table = RowTable.of(list(state.shards.items()))
    reader = RowReader(folder, table, PLAN, torch.device("cpu"))
    return reader, KeyTable(table.key), bool(state.problems)


def open_whole(sample: Sample) -> tuple[RowReader, KeyTable, bool]:
    opened = ActivationCache.open(sample.root, tier="page")
    problems = opened.stats()["problems"]
    return opened._reader, opened._keys, bool(problems)


def read(reader: RowReader, rows: np.ndarray) -> list[bytes]:
    """Hidden states of some rows, each as bytes."""
    batch = reader.read(rows)
    raw = batch.hidden.view(torch.uint8).numpy()
    return [raw[a:b].tobytes() for a, b in pairwise(batch.cu_seqlens.tolist())]


def examine(sample: Sample, mutation: Mutation, full: bool) -> str:
    """Opens a mutated cache and reads it: "refused" (at least in part) or "harmless".

    Raises:
        AssertionError: other bits, or a change that a verification does not see.
        Exception: any that is not the cache's.
    """
    refused = False
    try:
        # (All the way in, or past what only takes time.)
        reader, keys, refused = open_whole(sample) if full else open_parts(sample.path)
        rows = keys.find(sample.keys)
        expected = [row for row, at in zip(sample.rows.values(), rows, strict=True) if at >= 0]
        rows = rows[rows >= 0]
        refused |= len(rows) < len(sample.rows)
        try:
            got = read(reader, rows)
        except CacheError:
            refused, got, kept = True, [], []
            for row, own in zip(rows.tolist(), expected, strict=True):
                try:
                    got += read(reader, np.array([row]))
                    kept.append(own)
                except CacheError:
                    continue
            expected = kept
        assert mutation.scaled or got == expected, "other bits"
        if len(reader.table) > len(rows):  # rows that are not the sample's
            read(reader, np.arange(len(reader.table)))
    except CacheError:
        refused = True
    if full:
        try:
            folder = Folder.read(sample.path)
            report = verify(folder, full=True)
            assert mutation.forged or not report.sound, "a verification does not see it"
        except CacheError:
            pass
    return "refused" if refused else "harmless"


def apply(sample: Sample, files: dict[str, bytes | None]) -> None:
    for name, data in files.items():
        path = f"{sample.path}/{name}"
        if data is None:
            os.unlink(path)
            continue
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(fd, data)
        os.close(fd)


def fuzz(
    samples: list[Sample],
    numbers: range,
    seed: int,
    seconds: float = float("inf"),
    tell: Callable[[str], None] = print,
) -> Counter:
    """Tries mutations.

    Args:
        samples: of which each mutation changes one.
        numbers: of the mutations; one alone can be tried again by its number.
        seed: of all.
        seconds: after which no further one is tried.
        tell: hears of findings.

    Returns:
        how many were refused, harmless, findings; and of each kind.
    """
    counts, start = Counter(), time.monotonic()

    def hang(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    room = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (room, limits[1]))
    try:
        for number in numbers:
            if time.monotonic() - start > seconds:
                break
            dice = random.Random(seed << 40 | number)
            sample = samples[number % len(samples)]
            mutation = mutate(dice, sample)
            changed = {
                name: data for name, data in mutation.files.items() if data != sample.files[name]
            }
            apply(sample, changed)
            try:
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                full = bool(changed) and number % VERIFIED == 0
                verdict = examine(sample, mutation, full)
                seen = mutation.forged or not changed or verdict == "refused"
                assert seen, "a change that nobody sees"
            except (Exception, Hang) as error:
                verdict = "findings"
                tell(f"Mutation {number} ({mutation.what} in {', '.join(changed)}): {error!r}")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            counts[verdict] += 1
            counts[mutation.what] += 1
            apply(sample, {name: sample.files[name] for name in changed})
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
    return counts


def main(argv: list[str] | None = None) -> int:
    from ..machine import describe

    parser = argparse.ArgumentParser(prog="python -m bench.cache.fuzz")
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="try the mutation of this number alone")
    parser.add_argument("--out", help="append a JSON line to this file")
    args = parser.parse_args(argv)
    logging.getLogger("lpt_fast").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    numbers = range(args.mutations)
    if args.only is not None:
        numbers = range(args.only, args.only + 1)
    start = time.perf_counter()
    with made_samples() as samples:
        counts = fuzz(samples, numbers, args.seed)
    line = {
        "bench": "cache_fuzz",
        "mutations": len(numbers),
        "seed": args.seed,
        **{name: counts[name] for name in ("refused", "harmless", "findings")},
        "seconds": round(time.perf_counter() - start, 1),
    }
    kinds = {n: c for n, c in sorted(counts.items()) if n not in line}
    print(", ".join(f"{name} {value}" for name, value in line.items()))
    print("of them: " + ", ".join(f"{name} {count}" for name, count in kinds.items()))
    if args.out:
        with open(args.out, "a", encoding="utf-8") as f:
            f.write(json.dumps({**line, "kinds": kinds, **describe()}) + "\n")
    return 1 if counts["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
