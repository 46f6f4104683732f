"""What never gets into a cache, and looking after one."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from lpt_fast.cache import ActivationCache, CacheError
from lpt_fast.cache.forward import Runner
from lpt_fast.cache.shard import STORES
from tests.cache.cached_texts import counted, files, filled, ragged
from tests.tiny import tiny

# -- what never gets into a cache ------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(store, bad, tmp_path):
    """One word makes them: its text is named, the shards before it stay, no other trace is left."""
    model, data = tiny("llama"), ragged(low=5)
    with torch.no_grad():
        model.embed_tokens.weight[4] = bad
    data[7]["input_ids"][-1] = 4  # the last of the longest, 9 tokens, and so in the first shard
    data[2]["input_ids"][0] = 4  # of 2 tokens
    cache = ActivationCache.open(tmp_path, model, insertion_layer=2, store=store)
    with pytest.raises(CacheError, match=rf"row [27] of the data set are not finite as {store}"):
        cache.build(model, data, shard_bytes=20 * 128)
    assert len(cache) == 0
    del data[7]
    with pytest.raises(CacheError, match=rf"row 2 of the data set are not finite as {store}"):
        cache.build(model, data, shard_bytes=20 * 32)
    (folder,) = tmp_path.iterdir()
    assert not [p.name for p in folder.iterdir() if p.name.endswith(".part")]
    del data[2]
    report = cache.build(model, data)
    rows = cache.rows(data)
    assert len(cache) == 10 and cache.verify(full=True).sound
    # (An int8c cache has no scales before all of its sample is sound.)
    assert report.computed == 10 if store == "int8c" else 0 < report.computed < 10
    assert cache.read(rows).hidden.isfinite().all()


def test_overflow_of_a_store(tmp_path):
    """70,000 is a number, but not in fp16."""
    model, data = tiny("llama"), ragged(low=5)
    with torch.no_grad():
        model.embed_tokens.weight[4, 3] = 7e4
    data[5]["input_ids"][0] = 4
    with pytest.raises(CacheError, match=r"row 5 .* not finite as fp16.*fp16 ends at 65,504"):
        filled(tmp_path, model, data, store="fp16")
    for store in ("fp32", "bf16", "int8c", "fp8"):
        cache, rows = filled(tmp_path, model, data, store=store)
        assert cache.read(rows).hidden.abs().max() > 6e4


# -- looking after it ------------------------------------------------------------------------------


def test_canary(model, tmp_path, monkeypatch, caplog):
    """The same weights that compute something else now."""
    filled(tmp_path, model, ragged())
    run = Runner.run

    def other(self, *args):
        return {k: state * 1.01 for k, state in run(self, *args).items()}

    monkeypatch.setattr(Runner, "run", other)
    message = r"Row \d+ of the cache differs by 0\.0099 from .* expected at most 0\.0001: "
    with pytest.raises(CacheError, match=message):
        ActivationCache.open(tmp_path, model, insertion_layer=2)
    blind = ActivationCache.open(tmp_path, insertion_layer=2)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(CacheError, match=message):
            blind.ensure(model, ragged())
    known = ActivationCache.open(tmp_path, model, insertion_layer=2, canary=False)
    assert len(known.ensure(model, ragged())) == 12
    monkeypatch.setattr(
        Runner, "run", lambda self, *a: {k: s * float("nan") for k, s in run(self, *a).items()}
    )
    with pytest.raises(CacheError, match=r"differs by nan"):
        ActivationCache.open(tmp_path, model, insertion_layer=2)
    monkeypatch.setattr(Runner, "run", run)
    with counted(model) as seen, caplog.at_level(logging.INFO):
        blind.ensure(model, ragged())
        ActivationCache.open(tmp_path, model, insertion_layer=2).ensure(model, ragged())
    assert seen == [1] * 8
    assert re.search("is read from page: .* fit in the page cache", caplog.text)


@pytest.mark.parametrize("store", STORES)
def test_stats_and_verify(model, store, tmp_path):
    data, more = ragged(), {"purpose": "a test"}
    cache, rows = filled(tmp_path, model, data, store=store, provenance=more, shard_bytes=1500)
    stats = cache.stats()
    tokens = sum(len(example["input_ids"]) for example in data)
    folder = tmp_path / cache.identity.folder
    assert {
        "path": str(folder),
        "identity": cache.identity.digest,
        "insertion_layer": 2,
        "store": store,
        "compute_dtype": "float32",
        "width": 32,
        "rows": 12,
        "tokens": tokens,
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "tier": "page",
        "check": "read",
        "problems": [],
        "rows_read": 0,
        "bytes_read": 0,
    }.items() <= stats.items()
    assert stats["shards"] == len(list(folder.glob("*.safetensors"))) > 1
    assert (
        stats["provenance"]["model"] == "BertModel" and stats["provenance"].items() >= more.items()
    )
    cache.read(rows[:3])
    lengths = [len(example["input_ids"]) for example in data[:3]]
    size = {"fp32": 4, "fp16": 2, "bf16": 2}.get(store, 1)
    assert cache.stats()["rows_read"] == 3
    assert cache.stats()["bytes_read"] == sum(lengths) * 32 * size
    quick, full = cache.verify(), cache.verify(full=True)
    assert quick.sound and full.sound and (full.rows, full.shards) == (12, stats["shards"])
    assert full.bytes - quick.bytes == tokens * 32 * size
    assert full.bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_closing(model, tmp_path):
    with ActivationCache.open(tmp_path, model, insertion_layer=2) as cache:
        rows = cache.ensure(model, ragged())
        expected = cache.read(rows).hidden
    assert torch.equal(cache.read(rows).hidden, expected)  # opens again


def test_nothing_changes_on_disk_by_reading(model, tmp_path):
    cache, rows = filled(tmp_path, model, ragged())
    folder = tmp_path / cache.identity.folder
    before = files(folder), [p.stat().st_mtime_ns for p in sorted(folder.iterdir())]
    again = ActivationCache.open(tmp_path, model, insertion_layer=2)
    again.ensure(model, ragged())
    list(again.batches([rows]))
    again.verify(full=True)
    assert before == (files(folder), [p.stat().st_mtime_ns for p in sorted(folder.iterdir())])


@pytest.mark.parametrize("store", STORES)
def test_a_cache_without_rows(store, tmp_path):
    """What a first build that failed leaves is read as nothing, and filled later."""
    model = tiny("llama")
    cache, rows = filled(tmp_path, model, ragged(), store=store)
    expected = cache.read(rows).hidden
    for path in [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("index.json")]:
        path.unlink()
    empty = ActivationCache.open(tmp_path, model, insertion_layer=2, store=store)
    batch = empty.read([])
    assert len(empty) == len(batch) == 0 and batch.hidden.shape == (0, 32)
    assert empty.stats()["rows"] == 0 and empty.stats()["store"] == store
    assert torch.equal(empty.read(empty.ensure(model, ragged())).hidden, expected)
