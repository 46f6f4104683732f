"""Precompute on one and on two processes with a thread each, and sizes from which larger ones are
foretold.

    python -m bench.cluster.scaling --data shared/data --out bench/results/scaling.jsonl

Processes are fresh ones. "With start-up" is from their start to the end; without, from the moment
when all have loaded the model and tokenised the texts.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer

from ..data import (
    Figure,
    Recorder,
    Source,
    WrongResult,
    ends_where_wrong,
    relative,
    require,
    temporary,
)

TARGET = 1.7  # times one process
FORETOLD = 0.10  # relative error of what is foretold, at most
TASK = "subj"
LARGE = (10**6, 10**8, 10**9)  # texts
TABLE_ROW, TABLE_TOKEN = 40, 2  # bytes that an open cache takes; 4 a token with large vocabularies


@dataclass(frozen=True)
class Work:
    """What a process is to do.

    Attributes:
        data, model: as of Source.
        rows: texts.
        root: folder of the cache.
        rank, world, port: of the process.
        layer: k; None: half of the layers.
    """

    data: str
    model: str | None
    rows: int
    root: str
    rank: int
    world: int
    port: int
    layer: int | None = None


def work(job: Work, pipe) -> None:
    """The body of a process: loads, says "ready", waits, builds, says "done" with figures."""
    if job.world > 1:
        variables = {"RANK": job.rank, "WORLD_SIZE": job.world, "MASTER_PORT": job.port}
        os.environ.update({name: str(value) for name, value in variables.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    import torch

    from lpt_fast.cache import ActivationCache

    from ..data import quiet

    quiet()
    torch.set_num_threads(1)
    source = Source(Path(job.data), job.model)
    examples = source.examples(TASK, job.rows)
    model = source.base()
    layer = job.layer or max(1, source.depth // 2)
    pipe.send(("ready", len(examples)))
    pipe.recv()
    begun = time.process_time()
    cache = ActivationCache.open(job.root)
    report = cache.build(model, examples, insertion_layer=layer)
    used = time.process_time() - begun
    pipe.send(("done", {"computed": report.computed, "cpu": used, **cache.stats()}))


@dataclass
class Run:
    """What a build took.

    Attributes:
        whole, build: seconds with and without start-up.
        cpu: most processor seconds that a process took for the build, which hardly depend on what
            else the machine does.
        stats: of the cache, from the first process.
        computed: texts of each process.
    """

    whole: float
    build: float
    cpu: float
    stats: dict
    computed: list[int]


def run(source: Source, rows: int, root: Path, world: int) -> Run:
    """Builds a cache in a new folder."""
    from torch.distributed import TCPStore

    # As under torchrun, whose agent keeps the store that its processes meet at.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    start = time.perf_counter()
    for rank in range(world):
        job = Work(str(source.data), source.model, rows, str(root), rank, world, port)
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(job, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        for pipe in pipes:
            pipe.recv()
        go = time.perf_counter()
        for pipe in pipes:
            pipe.send("go")
        told = [pipe.recv()[1] for pipe in pipes]
        end = time.perf_counter()
    except EOFError:
        raise WrongResult("a process ended before its work was done") from None
    finally:
        for process in processes:
            process.join(30)
    return Run(
        end - start,
        end - go,
        max(one["cpu"] for one in told),
        told[0],
        [one["computed"] for one in told],
    )


def _same(one: Path, two: Path) -> None:
    """Both caches hold the same rows, up to the order of sums."""
    from lpt_fast.cache import ActivationCache, canary

    with ActivationCache.open(one) as a, ActivationCache.open(two) as b:
        require(len(a) == len(b), "two processes made another number of rows than one")
        numbers = np.arange(len(a))
        other = b.find(a.table.key)
        require(bool((other >= 0).all()), "two processes made other rows than one")
        error = relative(b.read(other).text(), a.read(numbers).text())
        require(error <= canary.tolerance(a.identity), f"rows differ by {error:.2g}")


def _folder(root: Path) -> Path:
    (found,) = (p for p in root.iterdir() if p.is_dir())
    return found


def scaling(source: Source, rows: int, repeats: int):
    """Figures of one process beside two, in turns."""
    runs: dict[int, list[Run]] = {1: [], 2: []}
    with temporary() as place:
        for turn in range(repeats):
            for world in (1, 2):
                root = Path(place) / str(world)
                shutil.rmtree(root, ignore_errors=True)
                found = run(source, rows, root, world)
                require(
                    sum(found.computed) == found.stats["rows"],
                    f"{sum(found.computed)} texts were computed for {found.stats['rows']} rows",
                )
                runs[world].append(found)
            if turn == 0:
                _same(_folder(Path(place) / "1"), _folder(Path(place) / "2"))
    for name, clock, target in (("without", "build", TARGET), ("with", "whole", None)):
        seconds = {world: [getattr(one, clock) for one in found] for world, found in runs.items()}
        medians = {world: statistics.median(values) for world, values in seconds.items()}
        ratios = [a / b for a, b in zip(seconds[1], seconds[2], strict=True)]
        yield Figure(
            "scaling",
            f"{rows} texts, 2 processes against 1, {name} start-up",
            medians[1] / medians[2],
            "x",
            target,
            more=True,
            details={
                "seconds_1": medians[1],
                "seconds_2": medians[2],
                "lowest_ratio": min(ratios),
                "highest_ratio": max(ratios),
                "cpu_ratio": statistics.median(one.cpu for one in runs[1])
                / statistics.median(one.cpu for one in runs[2]),
                "repeats": repeats,
                "shares": "/".join(map(str, runs[2][0].computed)),
            },
        )


def sizes(source: Source, rows: tuple[int, int, int], repeats: int):
    """Bytes and seconds of two sizes, and what they foretell of a third, beside the third."""
    measured = []
    with temporary() as place:
        for count in rows:
            found = []
            for _ in range(repeats):
                root = Path(place) / "sizes"
                shutil.rmtree(root, ignore_errors=True)
                found.append(run(source, count, root, 1))
            stats = found[0].stats
            seconds = statistics.median(one.build for one in found)
            measured.append((stats["tokens"], stats["rows"], stats["bytes"], seconds))
            tokens, unique, size, seconds = measured[-1]
            yield Figure("sizes", f"{count} texts, bytes a token", size / tokens, "B")
            yield Figure(
                "sizes",
                f"{count} texts, rows a second",
                unique / seconds,
                "rows/s",
                details={"tokens_per_second": tokens / seconds, "tokens": tokens},
            )
    points = np.array(measured, float)
    lines = {}
    for what, column, unit in (("bytes", 2, "B"), ("seconds", 3, "s")):
        # A straight line in tokens through the two smaller sizes.
        (x0, y0), (x1, y1) = points[:2, [0, column]]
        lines[what] = (y1, x1, (y1 - y0) / (x1 - x0))
        told = y1 + (points[2, 0] - x1) * lines[what][2]
        yield Figure(
            "sizes",
            f"{what} of {rows[2]} texts, foretold from {rows[0]} and {rows[1]}: error",
            float(abs(told / points[2, column] - 1)),
            "",
            FORETOLD,
            details={"foretold": float(told), "measured": float(points[2, column]), "unit": unit},
        )
    for count in LARGE:
        tokens = count * points[2, 0] / points[2, 1]
        size, seconds = (y + (tokens - x) * rise for y, x, rise in lines.values())
        yield Figure(
            "sizes",
            f"{count:,} texts of {tokens / count:.1f} tokens, foretold size",
            float(size / 1e9),
            "GB",
            details={
                "hours_of_one_process": float(seconds / 3600),
                "gb_of_memory_to_read": (TABLE_ROW * count + TABLE_TOKEN * tokens) / 1e9,
            },
        )


def main(
    data: str = typer.Option(
        ..., "--data", help="Folder with a folder of train/dev/test .tsv for each task."
    ),
    model: str = typer.Option(
        None, "--model", help="Default: the demo's encoder (MiniLM, 6 layers)."
    ),
    rows: int = typer.Option(2000, "--rows", min=8),
    repeats: int = typer.Option(5, "--repeats", min=1),
    out: str = typer.Option(None, "--out", help="JSON lines are appended to it."),
) -> None:
    """Precompute on two processes beside one; bytes and seconds foretold for more texts."""
    source, record = Source(Path(data), model), Recorder(out)
    with ends_where_wrong():
        for figure in scaling(source, rows, repeats):
            record(figure)
        for figure in sizes(source, (rows // 4, rows // 2, rows), repeats):
            record(figure)


if __name__ == "__main__":
    typer.run(main)
