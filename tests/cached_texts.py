"""Texts for activation caches, and what their rows have to be."""

from __future__ import annotations

import contextlib

import torch
from test_cached_hidden import states_alone
from tiny import VOCAB

from lpt_fast.backbone.families import find_backbone
from lpt_fast.cache import ActivationCache


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
