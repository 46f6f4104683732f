"""Parts of `python -m bench cache` that need no clock: what a cache weighs, and how much rows
differ with the batch that they were computed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lpt_fast.cache import ActivationCache, canary
from lpt_fast.cache.folder import Folder
from lpt_fast.cache.identity import cut
from lpt_fast.cache.index import RowTable
from lpt_fast.cache.planner import Plan
from lpt_fast.cache.quantize import torch_dtype
from lpt_fast.cache.reader import RowReader
from lpt_fast.cache.shard import STORES
from lpt_fast.cache.state import State

from ..data import Figure, Sizes, Source, require, temporary, wide_encoder

TASKS = ("subj", "trec", "sst2", "mr", "mpqa")
SIZE_TARGET = 1.01


def weigh(model, examples: list[dict], layer: int, store: str) -> dict:
    """Bytes of the whole folder of a cache over those of its hidden states alone."""
    with temporary() as folder:
        cache = ActivationCache.open(folder, store=store, canary=False)
        report = cache.build(model, examples, insertion_layer=layer)
        stats = cache.stats()
        sound = cache.verify(full=True)
        require(
            sound.sound and len(cache) == report.unique == report.computed,
            f"a fresh {store} cache is not sound: {sound.problems[:1]}, {report}",
        )
        hidden = stats["tokens"] * stats["width"] * torch_dtype(store).itemsize
        everything = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
        require(hidden <= everything, "the folder is smaller than its hidden states")
    return {
        "ratio": everything / hidden,
        "bytes": everything,
        "rows": len(cache) or stats["rows"],
        "tokens": stats["tokens"],
        "D": stats["width"],
    }


def size(source: Source, sizes: Sizes) -> Iterator[Figure]:
    """Bytes on disk; the layer does not matter, so the first one is taken."""
    tasks = [task for task in TASKS if (source.data / task).is_dir()]
    cases = [(task, "bf16") for task in tasks]
    cases += [(t, s) for t in tasks if t in ("subj", "trec") for s in STORES if s != "bf16"]
    model = source.base()
    for task, store in cases:
        examples = source.examples(task, sizes.size_rows)
        yield _size(f"{task}, {store}", weigh(model, examples, 1, store))
    for width in (768, 1024):
        model = wide_encoder(len(source.tokenizer), width)
        for store in ("bf16", "int8c"):
            found = weigh(model, source.examples(tasks[0], sizes.wide_rows), 1, store)
            yield _size(f"{tasks[0]}, {store}, D = {width} (random weights)", found)


def _size(name: str, found: dict) -> Figure:
    ratio = found.pop("ratio")
    return Figure("size", name, ratio, "x", SIZE_TARGET, details=found)


# What computes, its store, and the dtype of autocast. The stores keep every bit.
_PRECISIONS = (
    ("fp32 model", torch.float32, "fp32", None),
    ("fp32 model, bf16 autocast", torch.float32, "fp32", "bfloat16"),
    ("bf16 model", torch.bfloat16, "bf16", None),
    ("fp16 model", torch.float16, "fp16", None),
)


def reader_of(folder: Path) -> tuple[Folder, RowTable, RowReader]:
    """The parts that the canary works with."""
    state = State(Folder.read(folder)).load(adopt=False)
    table = RowTable.of(list(state.shards.items()))
    plan = Plan("page", "benchmark")
    return state.folder, table, RowReader(state.folder, table, plan, torch.device("cpu"))


def canary_part(source: Source, sizes: Sizes) -> Iterator[Figure]:
    """Rows that were computed in batches sorted by length, against the same texts alone; beside the
    tolerance that the canary lets pass. And the smallest difference that a mistake makes.
    """
    examples = source.examples("subj", sizes.canary_context)
    layers = list(range(1, source.depth))
    for name, dtype, store, autocast in _PRECISIONS:
        model = source.base(dtype)
        with temporary() as root:
            cache = ActivationCache.open(root, store=store, compute_dtype=autocast, canary=False)
            cache.build(model, examples, insertion_layer=layers)
            found = {}
            for path in Path(root).iterdir():
                folder, table, reader = reader_of(path)
                rows = np.unique(np.linspace(0, len(table) - 1, sizes.canary_rows).astype(int))
                place = cut(model, folder.identity.layer)
                given = (folder.identity, table, reader, rows)
                found[folder.identity.layer] = (folder, given, canary.differences(place, *given))
            for layer in layers:
                folder, given, values = found[layer]
                allowed = canary.tolerance(folder.identity)
                details = {"median": float(np.median(values)), "rows": len(values)}
                what = f"{name}, layer {layer}"
                yield Figure(
                    "canary", f"{what}: largest", float(values.max()), "", allowed, False, details
                )
                if name == "fp32 model":
                    yield _mistake(source, layer, given)


def _mistake(source: Source, layer: int, given: tuple) -> Figure:
    """Position embeddings off by one: among the smaller mistakes that a library can make."""
    model = source.base()
    with torch.no_grad():
        table = next(p for n, p in model.named_parameters() if "position_embeddings" in n)
        table.copy_(table.roll(1, 0))
    values = canary.differences(cut(model, layer), *given)
    loosest = max(canary.COMPUTE.values()) + max(canary.STORE.values())
    return Figure(
        "canary",
        f"positions off by one, layer {layer}: smallest",
        float(values.min()),
        "",
        loosest,
        True,
    )
