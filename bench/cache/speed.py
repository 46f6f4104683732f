"""Parts of `python -m bench cache` that are timed: building, reading, and a training step.

Speed is a ratio inside one run where there is something to compare with; who is compared takes
turns, and medians count.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from lpt_fast.backbone.families import find_backbone
from lpt_fast.cache import ActivationCache, canary
from lpt_fast.cache.folder import Folder, find_folders
from lpt_fast.cache.forward import BATCH_TOKENS, Runner, batches_of
from lpt_fast.cache.guards import check_batch
from lpt_fast.cache.identity import cut, own_dtype
from lpt_fast.cache.plan import SHARD_BYTES, plan_shards
from lpt_fast.cache.quantize import torch_dtype
from lpt_fast.cache.rows import TextRules, read_keys, to_text
from lpt_fast.packing import PackedBatch

from ..data import (
    Figure,
    Sizes,
    Source,
    batches,
    relative,
    require,
    seconds,
    temporary,
    threads,
    wide_encoder,
)
from ..timing import Contestant, percentiles, time_interleaved

BUILD_TARGET, READ_TARGET, STEP_TARGET = 1.10, 5.0, 0.02
CPU = torch.device("cpu")

# -- building --------------------------------------------------------------------------------------


def bare_batches(model, layer: int, examples: list[dict]) -> tuple[Runner, list[list]]:
    """The batches that a build runs, as texts, and what runs them."""
    place = cut(model, layer)
    rules = TextRules.of(place.backbone, place.family)
    keys = read_keys(examples, rules)
    token = place.backbone.config.hidden_size * torch_dtype("bf16").itemsize
    groups = []
    for rows in plan_shards(keys, keys.first, SHARD_BYTES // token):
        texts = [to_text(row, examples[row], rules) for row in rows.tolist()]
        lengths = keys.lengths[rows]
        groups += [texts[part] for part in batches_of(lengths, BATCH_TOKENS["cpu"])]
    return Runner(place, [layer], own_dtype(place.lower)), groups


def _check_built(cache: ActivationCache, runner: Runner, groups: list[list], layer: int) -> None:
    """The cache holds what the bare forward gives."""
    require(len(cache) == sum(map(len, groups)), "the build lacks rows")
    allowed = canary.tolerance(cache.identity)
    for texts in (groups[0], groups[len(groups) // 2], groups[-1]):
        stored = cache.read([text.key for text in texts]).text()
        error = relative(stored, runner.run(texts)[layer])
        require(error <= allowed, f"built rows differ from the forward by {error:.2g}")


def clocks(call: Callable) -> np.ndarray:
    """Seconds of wall time and of processor time, [2]. The second hardly depends on what else the
    machine does, and counts what overlaps in full.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def build(source: Source, sizes: Sizes) -> Iterator[Figure]:
    """ActivationCache.build into a fresh folder, over the same batches run with nothing kept."""
    model = source.base()
    examples = source.examples("subj", sizes.build_rows)
    for layer in sorted({1, min(3, source.depth - 1), min(4, source.depth - 1)}):
        runner, groups = bare_batches(model, layer, examples)

        def forward(runner=runner, groups=groups):
            for texts in groups:
                runner.run(texts)

        def fill(layer=layer, check=None) -> np.ndarray:
            with temporary() as folder:
                cache = ActivationCache.open(folder, canary=False)
                took = clocks(lambda: cache.build(model, examples, insertion_layer=layer))
                if check is not None:
                    check(cache)
            return took

        # (The first build also warms what is timed.)
        fill(check=lambda c, r=runner, g=groups, k=layer: _check_built(c, r, g, k))
        forward()
        ratios, bare, built = [], [], []
        for turn in range(sizes.build_repeats):
            for what in (0, 1) if turn % 2 else (1, 0):
                (bare if what else built).append(clocks(forward) if what else fill())
            ratios.append(built[-1] / bare[-1])
        bare, built, ratios = np.array(bare), np.array(built), np.array(ratios)
        yield Figure(
            "build",
            f"over the bare forward, k = {layer}",
            float(np.median(ratios[:, 0])),
            "x",
            BUILD_TARGET,
            details={
                "least": float(ratios[:, 0].min()),
                "most": float(ratios[:, 0].max()),
                "of_fastest": float(built[:, 0].min() / bare[:, 0].min()),
                "processor_time": float(np.median(ratios[:, 1])),
                "forward_s": float(np.median(bare[:, 0])),
                "rows": len(examples),
                "threads": torch.get_num_threads(),
            },
        )


# -- reading ---------------------------------------------------------------------------------------


def _epoch(cache: ActivationCache, order: list[np.ndarray], room: int) -> Callable[[], list]:
    def call() -> list:
        for rows in order:
            cache.read(rows, room=room)
        return []

    return call


def check_reading(caches: list[ActivationCache], folder: Path, rooms=(0, 5)) -> None:
    """Every way of reading gives what another program finds in the files."""
    from safetensors.torch import load_file

    draw = np.random.default_rng(1)
    for name in Folder.read(folder).shard_names():
        tensors = load_file(folder / name)
        keys = tensors["row_key"].numpy().view(np.uint64)
        ends = tensors["cu_seqlens"].tolist()
        picked = draw.permutation(len(keys))[:64]
        wanted = torch.cat([tensors["hidden"][ends[i] : ends[i + 1]] for i in picked])
        for cache in caches:
            for room in rooms:
                got = cache.read(cache.find(keys[picked]), room=room).text()
                require(torch.equal(got, wanted), f"{cache.plan.tier} reads other rows, {room=}")


def read(source: Source, sizes: Sizes) -> Iterator[Figure]:
    """Packed batches of 32 texts in random order, on one thread: from the page cache, from memory,
    from the disk.
    """
    with threads(1), temporary() as root:
        cases = (
            ("MiniLM" if source.model is None else "model", source.base(), None),
            ("random", wide_encoder(len(source.tokenizer), 1024), sizes.wide_rows),
        )
        for name, model, rows in cases:
            path = Path(root, name)
            examples = source.examples("subj", rows)
            layer = min(3, model.config.num_hidden_layers - 1)
            filled = ActivationCache.open(path, canary=False)
            filled.build(model, examples, insertion_layer=layer)
            (folder,) = find_folders(path)
            what = f"D = {filled.identity.width} ({name})"
            yield from _warm(folder, what, sizes)
            yield from _cold(folder, what, sizes)


def _warm(folder: Path, what: str, sizes: Sizes) -> Iterator[Figure]:
    def opened(**how):
        return ActivationCache.open(folder, **how)

    caches = {
        "page cache, every row checked": opened(tier="page"),
        "page cache, unchecked": opened(tier="page", check="never"),
        "memory": opened(tier="pinned"),
    }
    check_reading(list(caches.values()), folder)
    order = batches(len(next(iter(caches.values()))))
    contestants = {}
    for name, cache in caches.items():
        for room in (0, 5):
            call = _epoch(cache, order, room)
            contestants[name, room] = Contestant(f"{name}, {room}", [call])
    for contestant in contestants.values():
        contestant.warm(CPU, False, None)
    time_interleaved(list(contestants.values()), CPU, sizes.read_repeats, 60.0)
    for (name, room), contestant in contestants.items():
        cache = caches[name]
        moved = int(cache.lengths.sum()) * cache.identity.width * 2
        spread = percentiles(contestant.seconds)
        yield Figure(
            "read",
            f"{what}: {name}, room {room}",
            moved / spread["p50"] / 1e9,
            "GB/s",
            READ_TARGET,
            True,
            {
                "p20": moved / spread["p80"] / 1e9,
                "p80": moved / spread["p20"] / 1e9,
                "MB": moved / 1e6,
            },
        )


def drop_pages(folder: Path) -> None:
    """Takes a cache's files out of the page cache, as far as the system does it."""
    for name in Folder.read(folder).shard_names():
        fd = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(fd)  # dirty pages cannot go
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def resident_share(folder: Path, samples: int = 200) -> float | None:
    """Share of the pages of a cache's files that are in memory, by trying some without waiting;
    None where the file system cannot say.
    """
    draw, hits, tries = random.Random(0), 0, 0
    for name in Folder.read(folder).shard_names():
        fd = os.open(folder / name, os.O_RDONLY)
        try:
            pages = os.fstat(fd).st_size // 4096
            for _ in range(min(samples, pages)):
                tries += 1
                try:
                    place = 4096 * draw.randrange(pages)
                    hits += os.preadv(fd, [bytearray(1)], place, os.RWF_NOWAIT)
                except BlockingIOError:
                    continue
        except OSError:
            return None
        finally:
            os.close(fd)
    return hits / max(1, tries)


def _cold(folder: Path, what: str, sizes: Sizes) -> Iterator[Figure]:
    """The same epoch after the files were dropped from the page cache. The disk may have a cache of
    its own (that of a virtual machine's host), so that this is the least that a cold read costs.
    """
    drop_pages(folder)
    share = resident_share(folder)
    if share is None or share > 0.05:
        return  # pages stay (a file system in memory): nothing cold to measure
    whole = sum((folder / name).stat().st_size for name in Folder.read(folder).shard_names())
    ways = {
        "cold disk, rows asked for ahead": ("disk", 2),
        "cold disk, read ahead by two batches": ("page", 2),
        "cold disk, no look-ahead": ("page", 0),
        "cold disk, whole files in order": (None, 0),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    moved = whole
    for _ in range(sizes.cold_repeats):
        for name, (tier, prefetch) in ways.items():
            drop_pages(folder)
            if tier is None:
                found[name].append(whole / seconds(lambda: _read_files(folder)) / 1e9)
                continue
            cache = ActivationCache.open(folder, tier=tier)
            order = batches(len(cache))
            drop_pages(folder)  # opening read the tables
            moved = int(cache.lengths.sum()) * cache.identity.width * 2

            def epoch(cache=cache, order=order, prefetch=prefetch):
                for _ in cache.batches(order, prefetch=prefetch):
                    pass

            found[name].append(moved / seconds(epoch) / 1e9)
            cache.close()
    for name, rates in found.items():
        details = {"least": min(rates), "most": max(rates), "MB": moved / 1e6}
        yield Figure("read", f"{what}: {name}", statistics.median(rates), "GB/s", details=details)


def _read_files(folder: Path) -> None:
    for name in Folder.read(folder).shard_names():
        with open(folder / name, "rb", buffering=0) as f:
            buffer = bytearray(1 << 20)
            while f.readinto(buffer):
                pass


# -- a training step -------------------------------------------------------------------------------


class Step:
    """One step of training: forward, backward, AdamW."""

    def __init__(self, model):
        self.model = model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def __call__(self, inputs: dict) -> None:
        self.model(**inputs).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def step(source: Source, sizes: Sizes) -> Iterator[Figure]:
    """What reading its batch costs a step of training with a cache, and the guard, and what the
    step costs without a cache.
    """
    from lpt_fast.cli.data import Collator

    collate = Collator(source.tokenizer)
    examples, names = source.labelled("subj", rows=max(256, sizes.build_rows))
    classes = sorted(set(names))
    labels = torch.tensor([classes.index(name) for name in names])
    for layer in sorted({min(3, source.depth - 1), min(4, source.depth - 1)}):
        model = source.adapted(layer)
        with temporary() as folder:
            cache = ActivationCache.open(folder, model, tier="page")
            rows = cache.ensure(model, examples)
            _check_step(model, cache, rows, examples, collate)
            late = find_backbone(model)[1].late_prompt
            run = Step(model)
            times: dict[str, list[float]] = {n: [] for n in ("read", "cached", "guard", "text")}
            order = [b for epoch in range(99) for b in batches(len(examples), seed=epoch)][
                : sizes.steps + 2
            ]
            for turn, chosen in enumerate(order):
                found = _one_turn(run, cache, rows, examples, labels, chosen, late, collate, turn)
                if turn >= 2:  # the first ones allocate
                    for name, value in found.items():
                        times[name].append(value)
        middle = {name: statistics.median(values) for name, values in times.items()}
        whole = middle["cached"] + middle["read"]
        details = {"ms": 1e3 * middle["read"], "step_ms": 1e3 * whole, "steps": sizes.steps}
        details["threads"] = torch.get_num_threads()
        yield Figure(
            "step",
            f"read of a batch over the step, k = {layer}",
            middle["read"] / whole,
            "",
            STEP_TARGET,
            details=details,
        )
        yield Figure(
            "step",
            f"guard over the step, k = {layer}",
            middle["guard"] / whole,
            details={"ms": 1e3 * middle["guard"]},
        )
        ratios = [c / t for c, t in zip(times["cached"], times["text"], strict=True)]
        yield Figure(
            "step",
            f"step with a cache over the step on text, k = {layer}",
            statistics.median(ratios),
            "x",
            details={"text_ms": 1e3 * middle["text"]},
        )


def _check_step(model, cache, rows, examples, collate) -> None:
    """Batches of the cache give the logits of their texts."""
    model.eval()
    some = np.arange(min(32, len(examples)))
    with torch.no_grad():
        cached = model(cached_hidden=cache.read(rows[some])).logits
        text = model(**collate([examples[i] for i in some])).logits
    # A rounding of the states to bf16 moves the logits by some of its size.
    error = relative(cached, text)
    require(error < 0.05, f"logits from the cache differ by {error:.2g} from those of the texts")


def _one_turn(run, cache, rows, examples, labels, chosen, late, collate, turn) -> dict[str, float]:
    """The same batch as a step with the cache and as one on text, in turns; seconds."""
    start = time.perf_counter()
    batch: PackedBatch = cache.read(rows[chosen])
    found = {"read": time.perf_counter() - start}
    found["guard"] = min(seconds(lambda: check_batch(late, batch)) for _ in range(3))
    cached = {"cached_hidden": batch, "labels": labels[chosen]}
    text = {**collate([examples[i] for i in chosen]), "labels": labels[chosen]}
    for name in ("cached", "text") if turn % 2 else ("text", "cached"):
        found[name] = seconds(lambda n=name: run(cached if n == "cached" else text))
    return found
