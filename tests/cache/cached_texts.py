"""Texts for activation caches, and what their rows have to be."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lpt_fast.backbone.families import find_backbone
from lpt_fast.cache import ActivationCache
from lpt_fast.cache.shard import STORES
from tests.method.cases import states_alone
from tests.tiny import VOCAB, tiny

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)
DEVICES = ["cpu", CUDA]


def ragged(n: int = 12, seed: int = 0, low: int = 3) -> list[dict]:
    """n different texts of 1 .. 9 tokens."""
    own = torch.Generator().manual_seed(seed)
    lengths = [1 + i * 5 % 9 for i in range(n)]
    return [{"input_ids": torch.randint(low, VOCAB, (m,), generator=own).tolist()} for m in lengths]


def alone(model, example: dict, k: int) -> torch.Tensor:
    """What the unsplit model gives after layer k for one text by itself, [n, D]."""
    more = {
        name: torch.tensor(example[name])[None]
        for name in ("token_type_ids", "position_ids")
        if name in example
    }
    return states_alone(model, torch.tensor(example["input_ids"]), k, **more)


def filled(root, model, data, k=2, store="fp32", **settings) -> tuple[ActivationCache, list]:
    """A cache of `data`, and its rows."""
    opened = {n: settings.pop(n) for n in ("compute_dtype", "tier", "check") if n in settings}
    cache = ActivationCache.open(root, model, insertion_layer=k, store=store, **opened)
    return cache, cache.ensure(model, data, **settings).tolist()


def texts_of(batch) -> tuple[torch.Tensor, ...]:
    """The hidden states of each text of a batch."""
    return batch.text().split(batch.lengths.tolist())


def assert_rows(cache, rows, expected, **tolerance):
    got = texts_of(cache.read(rows))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"atol": 1e-5, "rtol": 1e-5}))


def files(folder) -> dict[str, bytes]:
    """Every file of a cache but its lock, which names the process that held it."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@contextlib.contextmanager
def counted(model):
    """Collects how many texts go through the model's embeddings, batch by batch."""
    seen = []
    handle = (
        find_backbone(model)[1]
        .get_input_embeddings()
        .register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    )
    try:
        yield seen
    finally:
        handle.remove()


def all_stores(root):
    """Fills caches of the same 20 texts, one for each store, several shards each."""
    model = tiny("bert")
    for store in STORES:
        filled(root, model, ragged(20), store=store, shard_bytes=20 * 32)
    return root


def opened(root, store="fp32", **more) -> ActivationCache:
    return ActivationCache.open(root, insertion_layer=2, store=store, **more)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


def flip(root, cache, row) -> None:
    """One bit of one row, in the file."""
    table = cache._table
    path = root / cache.identity.folder / table.names[table.shard[row]]
    with open(path, "r+b") as f:
        f.seek(int(table.offset[row]) + 5)
        byte = f.read(1)[0]
        f.seek(int(table.offset[row]) + 5)
        f.write(bytes([byte ^ 1]))
