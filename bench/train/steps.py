"""python -m bench.train.steps: training steps on a GPU in one process, a line for each figure.

Batches of 32 and 256 texts and of 16k and 32k tokens, each trained by the authors' recipe (fp32 and
bf16 weights), LoRA, and ours with and without CUDA graphs, in turns. Said of each: milliseconds of
a step, those after which the host is done, launches and milliseconds of the device's own work, peak
memory. Whoever breaks, or fails the gate, costs its own lines alone.

All models are copies, on the device, of one that lives there.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from datetime import UTC, datetime

import numpy as np
import torch

from ..data import temporary
from ..machine import describe
from .contestants import GRAPHS, LATE, ONLY_ON, RECIPES
from .data import drawn_texts, plan_batches
from .gate import allowed_by, errors
from .models import Zoo
from .rows import fill_cache

TEXTS = 4096
# name -> how batches are planned, distinct batches, timed rounds over them. Before these come
# WARM rounds, in which graphs are captured.
SIZES = {
    "b32": (dict(size=32), 8, 4),
    "b256": (dict(size=256), 6, 3),
    "t16k": (dict(size=0, tokens=16384), 2, 5),
    "t32k": (dict(size=0, tokens=32768), 2, 4),
}
QUICK = {"b4": (dict(size=4), 2, 2)}
WARM = 4
WHO = ("recipe", "recipe_bf16", "lora", "lora_bf16", "cached_packed", GRAPHS, *RECIPES)
# LoRA trains all layers: at 32k tokens its activations exceed 80 GB.
TOO_BIG = {("t32k", "lora"), ("t32k", "lora_bf16"), ("t16k", "lora")}


class Lines:
    """Figures on the screen and, at once, in a file."""

    def __init__(self, path: str | None, common: dict):
        self._file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115
        self._common = common

    def say(self, **row) -> None:
        print(json.dumps(row), flush=True)
        if self._file:
            self._file.write(json.dumps(row | self._common) + "\n")
            self._file.flush()


def gate(zoo: Zoo, texts, k: int, rows, batch: np.ndarray, say) -> set[str]:
    """Names that compute what the recipe does: in bf16 at most twice as far from a recipe in fp32
    as the recipe with bf16 weights is. Late LoRA has a recipe of its own.
    """
    good = {"recipe", "recipe_bf16", "lora", "lora_bf16"}
    found = zoo.contestant("recipe_bf16", k, texts).gradients(batch)
    references = {"recipe": zoo.contestant("recipe", k, texts, exact=True).gradients(batch)}
    allowed = allowed_by(errors("recipe_bf16", found, references["recipe"]))
    for name in ("cached_packed", GRAPHS, *RECIPES):
        if ONLY_ON.get(name, zoo.device) != zoo.device:
            continue
        try:
            recipe = RECIPES.get(name, "recipe")
            if recipe not in references:
                made = zoo.contestant(recipe, k, texts, exact=True)
                references[recipe] = made.gradients(batch)
            exact = references[recipe]
            contestant = zoo.contestant(name, k, texts, rows)
            for _ in range(WARM):  # (graphs are captured when a bucket comes again)
                loss, found = contestant.gradients(batch)
            found = errors(name, (loss, found), exact)
            right = all(error <= allowed[what] for what, error in found.items())
            say(what="gate", who=name, right=right, error=found, allowed=allowed)
            if right:
                good.add(name)
        except Exception as error:
            _broke(error, "gate", name, say)
    return good


def _broke(error: Exception, what: str, who: str, say) -> None:
    traceback.print_exc(limit=-6)
    say(what=what, who=who, error=f"{type(error).__name__}: {error}"[:400])


def _graphs_of(contestant) -> dict:
    graphs = contestant.graphs
    return {} if graphs is None else dict(replayed=graphs.replayed, graphs=len(graphs))


def _device_work(contestant, batch, wait, path: str | None) -> dict:
    """Launches and milliseconds of the device's work of one step; its table goes to a file."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        contestant.step(batch)
        wait()
    kernels = [e for e in seen.events() if e.device_type.name == "CUDA"]
    if path:
        averages = seen.key_averages()
        with open(path, "w", encoding="utf-8") as file:
            for key in ("self_cuda_time_total", "self_cpu_time_total"):
                file.write(averages.table(sort_by=key, row_limit=60, max_name_column_width=80))
    return dict(
        launches=len(kernels), device_ms=round(sum(e.device_time for e in kernels) / 1e3, 3)
    )


def run(options) -> None:
    on_gpu = options.device == "cuda"
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    k = options.k or (18 if on_gpu else 2)
    lines = Lines(
        options.out,
        {
            "k": k,
            "encoder": options.encoder,
            **describe(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    say = lines.say
    texts = drawn_texts("subj", TEXTS if on_gpu else 64)
    zoo = Zoo(
        options.encoder, None, texts.classes, "bf16", options.device, texts.pad_id, quick=not on_gpu
    )
    sizes = SIZES if on_gpu else QUICK
    with temporary() as folder:
        filled = fill_cache(zoo, texts, np.arange(len(texts)), k, folder, "bf16")
        say(
            what="build",
            seconds=round(filled.seconds, 3),
            texts=filled.texts,
            tokens=filled.tokens,
            tier=filled.rows.cache.stats()["tier"],
        )
        first = plan_batches(texts.lengths, 1, size=32 if on_gpu else 4)[0]
        good = gate(zoo, texts, k, filled.rows, first, say)
        for name in options.sizes.split(",") if options.sizes else sizes:
            how, distinct, rounds = sizes[name]
            batches = plan_batches(texts.lengths, distinct, **how)
            tokens = float(np.mean([texts.lengths[b].sum() for b in batches]))
            say(what="batches", size=name, tokens=round(tokens), texts=len(batches[0]))
            _size(zoo, texts, k, filled.rows, name, batches, rounds, good, wait, options, say)
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()


def _size(zoo, texts, k, rows, size, batches, rounds, good, wait, options, say) -> None:
    on_gpu = options.device == "cuda"
    ready, own, host, peak = {}, {}, {}, {}
    for who in options.who.split(","):
        if who not in good or (size, who) in TOO_BIG:
            continue
        try:
            before = torch.cuda.memory_allocated() if on_gpu else 0
            cached = rows if who in LATE and LATE[who][1] else None
            late = k if not who.startswith("lora") else None
            contestant = zoo.contestant(who, late, texts, cached)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            for _ in range(1 if contestant.graphs is None else WARM):
                for batch in batches:
                    contestant.step(batch)
            wait()
            if on_gpu:
                peak[who] = (torch.cuda.max_memory_allocated() - before) / 2**30
            ready[who], own[who], host[who] = contestant, [], []
        except Exception as error:
            _broke(error, size, who, say)
    for _ in range(rounds):
        for batch in batches:
            for who in list(ready):
                try:
                    wait()
                    start = time.perf_counter()
                    ready[who].step(batch)
                    done = time.perf_counter()
                    wait()
                    own[who].append(time.perf_counter() - start)
                    host[who].append(done - start)
                except Exception as error:
                    _broke(error, size, who, say)
                    del ready[who]
    for who, contestant in ready.items():
        row = dict(
            ms=round(1e3 * statistics.median(own[who]), 3),
            host_ms=round(1e3 * statistics.median(host[who]), 3),
            steps=len(own[who]),
            peak_GiB=round(peak.get(who, 0.0), 3),
        )
        if on_gpu:
            path = f"{options.profiles}/profile_{size}_{who}.txt" if options.profiles else None
            try:
                row |= _device_work(contestant, batches[-1], wait, path)
            except Exception as error:
                _broke(error, size, who, say)
        for other in ("recipe", "recipe_bf16", "lora"):
            if other in ready and other != who:
                row[f"{other}_over"] = round(
                    statistics.median(own[other]) / statistics.median(own[who]), 3
                )
        say(what="step", size=size, who=who, **row, **_graphs_of(contestant))
    if options.host and "cached_packed" in ready:
        _where_the_host_is(ready["cached_packed"], batches[0], wait, options, size)


def _where_the_host_is(contestant, batch, wait, options, size) -> None:
    """Python's own time, by function, over twenty steps."""
    import cProfile
    import pstats

    profile = cProfile.Profile()
    wait()
    profile.enable()
    for _ in range(20):
        contestant.step(batch)
    profile.disable()
    wait()
    with open(f"{options.host}/host_{size}.txt", "w", encoding="utf-8") as file:
        pstats.Stats(profile, stream=file).sort_stats("tottime").print_stats(50)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train.steps", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny, to see that it runs")
    add("--encoder", default="roberta-large")
    add("--k", type=int, help="default 18, on the CPU 2")
    add("--sizes", help=f"of {', '.join(SIZES)}; default: all")
    add("--who", default=",".join(WHO), help="contestants, with commas between; default: all")
    add("--profiles", help="folder for torch.profiler's tables")
    add("--host", help="folder for cProfile's tables")
    add("--out", help="JSON lines are appended to it")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.who.split(",") if name not in WHO]:
        parser.error(f"--who must be of {', '.join(WHO)}, got {unknown[0]!r}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device was found; --device cpu tries the program on tiny shapes.")
        return 2
    run(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
