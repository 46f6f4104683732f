"""The processes of the fault campaign as their launcher sees them, and the rows that they leave."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from multiprocessing import forkserver
from pathlib import Path

import numpy as np

from lpt_fast.cache import ActivationCache, CacheError, CorruptCacheError
from lpt_fast.cache.folder import Folder, find_folders
from lpt_fast.cache.verify import repair, verify

from .fault_worker import Job, work

PAUSE = 0.03  # seconds that a step takes
SLACK = 30.0  # seconds beyond its patience after which a process counts as hung

# -- rows ------------------------------------------------------------------------------------------


def rows_of(root: Path) -> dict[bytes, np.ndarray]:
    """Key -> hidden states of every row of a sound cache."""
    with ActivationCache.open(_only(root)) as opened:
        count = len(opened)
        batch = opened.read(np.arange(count))
        values = batch.text().float().numpy()
        ends = batch.cu_seqlens.tolist()
        keys = [key.tobytes() for key in opened.table.key]
        return {k: values[a:b] for k, (a, b) in zip(keys, pairwise(ends), strict=True)}


def served(root: Path, expected: dict[bytes, np.ndarray]) -> Counter:
    """What a cache gives for each row, read one by one: "equal", "refused", "absent" or "wrong"."""
    out: Counter = Counter()
    try:
        opened = ActivationCache.open(_only(root))
        found = opened.find(list(expected)).tolist()
    except CacheError:
        return Counter(absent=len(expected))
    with opened:
        for row, values in zip(found, expected.values(), strict=True):
            if row < 0:
                out["absent"] += 1
                continue
            try:
                got = opened.read([row]).text().float().numpy()
            except CorruptCacheError:
                out["refused"] += 1
                continue
            except (CacheError, OSError):  # its file is gone
                out["absent"] += 1
                continue
            out["equal" if _equal(got, values) else "wrong"] += 1
    return out


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Up to the order of sums: processes have other batches."""
    return a.shape == b.shape and float(np.abs(a - b).max()) < 1e-6 * float(np.abs(b).max())


def _only(root: Path) -> Path:
    found = list(find_folders(root / "cache")) if (root / "cache").is_dir() else []
    return found[0] if found else root / "cache"


def mend(root: Path) -> bool:
    """What an error of a damaged cache tells people to do; whether there was anything."""
    for path in find_folders(root / "cache") if (root / "cache").is_dir() else []:
        folder = Folder.read(path)
        if not verify(folder, full=True).sound:
            repair(folder)
            return True
    return False


# -- processes -------------------------------------------------------------------------------------


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.cluster.fault_worker"])
    forkserver.ensure_running()
    return context


class Pair:
    """The processes of a job.

    Args:
        root: of the job.
        what: job.
        world: how many.
        patience: seconds that they wait for each other.
        machines: where each has one of its own.
    """

    def __init__(self, root: Path, what: str, world: int, patience: float, machines=None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.patience, self.pipes, self.processes = patience, [], []
        context = _context()
        for rank in range(world):
            address = "127.0.0.1" if machines is None else machines.addresses[0]
            machine = None if machines is None else machines.names[rank]
            job = Job(what, root, rank, world, address, port, machine, patience, PAUSE)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(job, theirs, str(root / f"log{rank}")))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.begun = time.monotonic()
        for pipe in self.pipes:
            if pipe.poll(60):
                with suppress(EOFError):
                    pipe.recv()
                    self.begun = time.monotonic()

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def signal(self, rank: int, number: int) -> None:
        with suppress(ProcessLookupError, TypeError):
            os.kill(self.processes[rank].pid, number)

    def end(self) -> tuple[list[str], list[dict | None], int]:
        """Waits until all have ended by themselves.

        Returns:
            What each said at last, its result, and how many hung and were killed.
        """
        told, results, hung = [], [], 0
        limit = time.monotonic() + self.patience + SLACK
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            kind, what = "ended", None
            while process.is_alive() and time.monotonic() < limit:
                if pipe.poll(0.02):
                    break
            with suppress(EOFError):
                if pipe.poll(0):
                    kind, what = pipe.recv()
            process.join(max(0.1, limit - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
                hung += 1
                told.append("hung")
            elif kind == "failed":
                told.append(what)
            elif process.exitcode < 0:
                told.append(signal.Signals(-process.exitcode).name)
            else:
                told.append("done" if process.exitcode == 0 else f"exit code {process.exitcode}")
            results.append(what if kind == "done" else None)
            pipe.close()
        return told, results, hung
