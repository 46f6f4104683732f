"""The files that a build leaves: shards, their sizes, what others can read of them, equal bytes."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lpt_fast.cache import ActivationCache, CacheError
from lpt_fast.cache.quantize import torch_dtype
from lpt_fast.cache.shard import QUANTISED, STORES
from tests.cache.cached_texts import alone, assert_rows, counted, files, filled, ragged, texts_of
from tests.tiny import tiny

TYPES = {"token_type_ids": [0, 1, 1], "input_ids": [7, 8, 9]}
PLACES = {"position_ids": [4, 5, 9], "input_ids": [7, 8, 9]}


def shards(root):
    return sorted(root.rglob("*.safetensors"))


@pytest.mark.parametrize("store", STORES)
def test_shards_are_safetensors_files(model, store, tmp_path):
    """Read by the library of that name, without this project."""
    data = [*ragged(), TYPES, PLACES, {**TYPES, **PLACES}]
    cache, rows = filled(tmp_path, model, data, store=store, shard_bytes=20 * 32)
    expected = {}
    for example, row in zip(data, rows, strict=True):
        expected[str(sorted(example.items()))] = cache.read([row], dtype=torch.float32).hidden
    assert len(shards(tmp_path)) > 4
    for path in shards(tmp_path):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        assert list(header)[-1] == "hidden"
        begin, end = header["hidden"]["data_offsets"]
        assert (8 + size + begin) % 4096 == 0 and 8 + size + end == len(raw)
        tensors = load_file(path)
        with safe_open(path, "pt") as f:
            meta = f.metadata()
            assert set(f.keys()) == set(tensors)
        assert meta == {
            "format": "lpt_fast.activation_cache.1",
            "identity": cache.identity.digest,
            "store": store,
        }
        hidden = tensors["hidden"]
        assert hidden.dtype == torch_dtype(store) and hidden.shape[1] == 32
        ends = tensors["cu_seqlens"].tolist()
        assert ends[0] == 0 and ends[-1] == len(hidden)
        assert ("token_scale" in tensors) == (store in QUANTISED)
        assert ("channel_scale" in tensors) == (store == "int8c")
        hidden = hidden.float()
        if store == "int8c":
            hidden = hidden * tensors["channel_scale"].view(torch.float32)
        if store in QUANTISED:
            hidden = hidden * tensors["token_scale"].float()[:, None]
        for first, last in pairwise(ends):
            names = ("token_type_ids", "position_ids", "input_ids")
            text = {n: tensors[n][first:last].tolist() for n in names if n in tensors}
            want = expected.pop(str(sorted(text.items())))
            # (8 bits are read as bf16 where nobody asks.)
            torch.testing.assert_close(hidden[first:last], want, atol=0, rtol=0)
    assert not expected


@pytest.mark.parametrize("limit", [1, 128, 1000, 3 * 9 * 128, 1 << 20])
def test_sizes_of_shards(model, limit, tmp_path):
    """As many texts as fit, one at least, longest first; contents do not depend on it."""
    data = ragged(30)
    cache, rows = filled(tmp_path, model, data, shard_bytes=limit)
    assert_rows(cache, rows, [alone(model, example, 2) for example in data])
    sizes, longest = [], []
    for path in shards(tmp_path):
        tensors = load_file(path)
        lengths = tensors["cu_seqlens"].diff().tolist()
        assert lengths == sorted(lengths, reverse=True)
        assert len(lengths) == 1 or sum(lengths) * 128 <= limit
        sizes.append(sum(lengths))
        longest.append(max(lengths))
    assert sum(sizes) == sum(len(example["input_ids"]) for example in data)
    order = sorted(zip(longest, sizes, strict=True), reverse=True)
    for (_, size), (following, _) in pairwise(order):
        assert size + 9 > limit // 128 or size + following > limit // 128 or limit < 128
    if limit == 1:
        assert len(sizes) == 30
    if limit == 1 << 20:
        assert len(sizes) == 1


@pytest.mark.parametrize("store", STORES)
def test_equal_texts_give_equal_bytes(model, store, tmp_path):
    """In another order, some twice, asked for in parts; manifest and index included."""
    data = [*ragged(), TYPES, PLACES]
    cache, _ = filled(tmp_path / "a", model, data, store=store, shard_bytes=1000)
    name = cache.identity.folder
    expected = files(tmp_path / "a" / name)
    assert {"manifest.json", "index.json"} < set(expected) and len(expected) > 4
    shuffled = [data[i] for i in np.random.default_rng(0).permutation(len(data))]
    for i, texts in enumerate((data, shuffled + shuffled[:5], shuffled[::-1])):
        cache, _ = filled(tmp_path / f"b{i}", model, texts, store=store, shard_bytes=1000)
        assert files(tmp_path / f"b{i}" / name) == expected
    filled(tmp_path / "c", model, data[:9], store=store, shard_bytes=1000)
    parts, _ = filled(tmp_path / "c", model, data, store=store, shard_bytes=1000)
    assert set(files(tmp_path / "c" / name)) != set(expected)
    if store != "int8c":  # whose scales are those of the first texts
        got, want = (texts_of(c.read(c.rows(data))) for c in (parts, cache))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0.02 if store == "fp8" else 1e-2)


def test_a_moved_folder(model, tmp_path):
    """No path is anywhere in it."""
    cache, rows = filled(tmp_path / "a", model, ragged())
    expected = cache.read(rows).hidden
    for content in files(tmp_path / "a" / cache.identity.folder).values():
        assert str(tmp_path).encode() not in content
    (tmp_path / "a").rename(tmp_path / "b")
    moved = ActivationCache.open(tmp_path / "b", model, insertion_layer=2)
    with counted(model) as seen:
        assert torch.equal(moved.read(moved.ensure(model, ragged())).hidden, expected)
    assert not seen
    (tmp_path / "b" / cache.identity.folder).rename(tmp_path / "mine")
    renamed = ActivationCache.open(tmp_path / "mine", model, insertion_layer=2)
    assert torch.equal(renamed.read(renamed.ensure(model, ragged())).hidden, expected)
    more = renamed.ensure(model, ragged(14))
    assert_rows(renamed, more, [alone(model, example, 2) for example in ragged(14)])


def test_wide_ids_and_types(tmp_path):
    """Ids that 16 bits do not hold, beside shards whose ids they do."""
    model = tiny("gpt2", vocab_size=70_000)
    wide = [{"input_ids": [5, 69_999, 6]}, {"input_ids": [65_536, 6]}]
    typed = [{"input_ids": [5, 6], "token_type_ids": [66_000, 0]}]
    narrow = [{"input_ids": [65_535, 6]}, {"input_ids": [5], "token_type_ids": [255]}]
    filled(tmp_path, model, narrow)
    cache, rows = filled(tmp_path, model, [*wide, *typed, *narrow])
    kinds = {path.name: load_file(path) for path in shards(tmp_path)}
    assert {t["input_ids"].dtype for t in kinds.values()} == {torch.uint16, torch.int32}
    types = {t["token_type_ids"].dtype for t in kinds.values() if "token_type_ids" in t}
    assert types == {torch.uint8, torch.int32}
    batch = cache.read(rows)
    assert batch.input_ids.tolist() == [5, 69_999, 6, 65_536, 6, 5, 6, 65_535, 6, 5]
    again = ActivationCache.open(tmp_path, model, insertion_layer=2)  # the canary looks at all
    examples = [*wide, *typed, *narrow]
    assert_rows(again, again.rows(examples), [alone(model, example, 2) for example in examples])


# -- how much a cache may take ---------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("limit", [300, 1 << 20])
def test_max_bytes(model, store, limit, tmp_path):
    """Said before anything is computed; what is said to be needed is enough."""
    data = [*ragged(40), TYPES, PLACES]
    cache = ActivationCache.open(tmp_path, model, insertion_layer=2, store=store)
    with counted(model) as seen, pytest.raises(CacheError, match=r"would take .*--max_bytes") as e:
        cache.build(model, data, max_bytes=1000, shard_bytes=limit)
    assert not seen and len(cache) == 0 and not shards(tmp_path)
    needed = int(re.search(r"would take ([\d,]+) bytes", str(e.value))[1].replace(",", ""))
    with pytest.raises(CacheError, match="would take"):
        cache.build(model, data, max_bytes=needed - 1, shard_bytes=limit)
    cache.build(model, data, max_bytes=needed, shard_bytes=limit)
    size = sum(path.stat().st_size for path in shards(tmp_path))
    # An upper bound: 5 kB for each file that there may be, all else to the byte.
    assert needed - (4 if limit > 300 else 42) * 5400 < size <= needed
    with pytest.raises(CacheError, match="would take"):  # what is there counts
        cache.build(model, [*data, *ragged(40, seed=9)], max_bytes=needed, shard_bytes=limit)
    cache.build(model, data, max_bytes=1000, shard_bytes=limit)  # nothing is missing


def test_a_disk_without_room(model, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    cache = ActivationCache.open(tmp_path, model, insertion_layer=2)
    message = r"missing rows need [\d,]+ bytes and .* has 5,000 free"
    with counted(model) as seen, pytest.raises(CacheError, match=message):
        cache.build(model, ragged())
    assert not seen and not shards(tmp_path)
