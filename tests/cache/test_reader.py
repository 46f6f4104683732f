"""Reading a cache: the same rows from wherever they lie, in any order, on one thread or two."""

from __future__ import annotations

import gc
import itertools
import os

import numpy as np
import pytest
import torch

from lpt_fast.cache import CacheError, CorruptCacheError, MissingRowsError, shard_files
from lpt_fast.cache.index import KeyTable
from lpt_fast.cache.planner import TIERS
from lpt_fast.cache.shard import STORES
from lpt_fast.insertion import gather_insert_prompt, insert_prompt, insert_prompt_, reference
from tests.cache.cached_texts import (
    DEVICES,
    all_stores,
    files,
    filled,
    flip,
    opened,
    ragged,
    same_bits,
    texts_of,
)
from tests.insertion.cases import make_weights
from tests.tiny import tiny

PARTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5]]
ORDER = [7, 0, 7, 19, 3, 3, 12, 1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return all_stores(tmp_path_factory.mktemp("caches"))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece", [1, 300, 2**20])
def test_the_whole_cache_in_pieces(root, piece, device):
    """Every byte as from memory, however small the page-locked buffers are."""
    cache = opened(root, "bf16", tier="page")
    cache.read([0])
    own = cache._reader
    own.device = torch.device(device)
    own._load()
    assert torch.equal(own._stream(piece).cpu(), own._resident)


def by_file(cache) -> list[torch.Tensor]:
    """Every row as the files have it, by the oracle of the gather kernels, float32 [n, D]."""
    codes, scales, channel = [], [], None
    from safetensors.torch import load_file

    for name in cache._table.names:
        tensors = load_file(f"{cache.stats()['path']}/{name}")
        codes.append(tensors["hidden"])
        scales.append(tensors.get("token_scale"))
        channel = tensors.get("channel_scale")
    lengths = torch.from_numpy(cache.lengths)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    whole = reference.gather_rows(
        torch.cat(codes),
        ends,
        torch.arange(len(lengths)),
        ends,
        int(ends[-1]),
        torch.float32,
        None if scales[0] is None else torch.cat(scales).float(),
        channel,
    )
    return list(whole.split(lengths.tolist()))


# -- whole batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("store", STORES)
def test_every_tier(root, store, tier, device):
    cache = opened(root, store, tier=tier, device=device)
    rows = by_file(cache)
    own = {"fp32": torch.float32, "fp16": torch.float16}.get(store, torch.bfloat16)
    for order in (ORDER, range(20), [5], []):
        expected = [rows[i] for i in order]
        for dtype in (None, torch.float32, torch.bfloat16):
            plain = cache.read(order, dtype=dtype)
            want = torch.cat([*expected, torch.empty(0, 32)]).to(dtype or own)
            assert plain.hidden.device.type == device and same_bits(plain.hidden, want)
            roomy = cache.read(order, dtype=dtype, room=3)
            assert len(roomy.hidden) == len(want) + 3 * len(order) and roomy.room == 3
            assert same_bits(roomy.text(), want)
        assert plain.lengths.tolist() == [len(row) for row in expected]
        assert plain.max_seqlen == max(map(len, expected), default=0)
        assert plain.cu_seqlens.dtype == torch.int32 and plain.input_ids.dtype == torch.int64
        own_rows = (plain.layer, plain.identity, plain.store, plain.compute_dtype)
        assert own_rows == (2, cache.identity.digest, store, "float32")
        assert plain.position_ids is None and plain.token_type_ids is None
    expected = tier if device == "cuda" or tier != "device" else "pinned"
    assert cache.stats()["tier"] == cache.plan.tier == expected
    assert cache.stats()["why"] == cache.plan.why


def test_ways_to_name_rows(root):
    cache = opened(root)
    expected = cache.read(ORDER).hidden
    keys = cache._table.key[ORDER]
    for rows in (
        tuple(ORDER),
        np.array(ORDER, np.int32),
        np.array(ORDER, np.uint8),
        torch.tensor(ORDER),
        keys,
        [key.tobytes() for key in keys],
        tuple(key.tobytes() for key in keys),
    ):
        assert torch.equal(cache.read(rows).hidden, expected)
    assert cache.find(keys).tolist() == ORDER
    assert cache.find([keys[0].tobytes(), bytes(16)]).tolist() == [7, -1]
    ids = cache.read(ORDER).input_ids.tolist()
    data = [{"input_ids": list(i)} for i in _cut(ids, cache.lengths[ORDER])]
    assert cache.rows(data).tolist() == ORDER


def _cut(values, lengths):
    values = iter(values)
    return [list(itertools.islice(values, n)) for n in lengths]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, 20], MissingRowsError, r"has no row 20, expected 0 \.\. 19; `ensure"),
        ([-1, 3], MissingRowsError, r"has no row -1, expected 0 \.\. 19"),
        ([0.0, 1.0], CacheError, r"must be a list of whole numbers, got float64 .* \[2\]"),
        ([True, False], CacheError, "whole numbers, got bool"),
        (["a"], CacheError, "whole numbers, got <U1"),
        (3, CacheError, r"whole numbers, got int64 of the shape \[\]"),
        (torch.zeros(2, 2, dtype=torch.int64), CacheError, r"of the shape \[2, 2\]"),
        ([bytes(16)], MissingRowsError, "1 of 1 keys are not in the cache, expected all"),
        ([bytes(15)], CacheError, r"Keys must be 16 bytes each or uint64 \[B, 2\], got list"),
        ([bytes(15), bytes(17)], CacheError, "Keys must be 16 bytes each"),
        (np.zeros((2, 2), np.int64), CacheError, "Keys must be 16 bytes each .* got ndarray"),
        (np.zeros((2, 3), np.uint64), CacheError, "Keys must be 16 bytes each"),
        ([bytes(16), 3], CacheError, "Keys must be 16 bytes each"),
    ],
)
def test_wrong_rows(root, rows, error, message):
    cache = opened(root)
    with pytest.raises(error, match=message):
        cache.read(rows)
    with pytest.raises(error, match=message):
        list(cache.batches([[1], rows]))


@pytest.mark.parametrize("room", [-1, True, 1.0, "2"])
def test_wrong_room(root, room):
    cache = opened(root)
    for act in (cache.read, lambda *a, **k: cache.batches([[1]], **k)):
        with pytest.raises(CacheError, match="`room` must be a whole number of at least 0"):
            act([1], room=room)


def test_prompts_go_into_the_room(root):
    cache, weights = opened(root), make_weights("appg", 32, 4, 3, torch.float32)
    plain, roomy = cache.read(ORDER), cache.read(ORDER, room=3)
    expected = insert_prompt(plain.hidden, plain.cu_seqlens, "appg", weights, 3)
    got = insert_prompt_(roomy.hidden, roomy.cu_seqlens, "appg", weights, 3)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("tier", ["page", "disk", "pinned"])
def test_what_is_checked(tier, tmp_path):
    cache, rows = filled(tmp_path, tiny("bert"), ragged(), tier=tier)
    sound = cache.read(rows).hidden if tier != "pinned" else None
    flip(tmp_path, cache, rows[4])
    message = rf"Row {rows[4]} of the cache \(in .*safetensors\) does not match its hash, so it was"
    with pytest.raises(CorruptCacheError, match=message):
        cache.read(rows)
    if tier != "pinned":
        assert len(cache.read(rows[:4])) == 4
    blind = opened(tmp_path, tier=tier, check="never")
    assert blind.stats()["check"] == "never"
    got = blind.read(blind.rows(ragged()))
    assert len(got) == 12
    if sound is not None:
        assert (got.hidden != sound).sum() == 1


def test_in_memory_the_files_are_not_read_again(tmp_path):
    cache, rows = filled(tmp_path, tiny("bert"), ragged(), tier="pinned")
    expected = cache.read(rows).hidden
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    assert torch.equal(cache.read(rows).hidden, expected)
    assert torch.equal(torch.cat([b.hidden for b in cache.batches([rows[:5], rows[5:]])]), expected)


def test_short_reads(root, monkeypatch):
    """The operating system may give less than it was asked for."""
    cache = opened(root)
    expected = cache.read(ORDER).hidden
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:100]], at))
    assert torch.equal(cache.read(ORDER).hidden, expected)
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:0]], at))
    with pytest.raises(CorruptCacheError, match=r"Row 7 of the cache .* is cut short"):
        cache.read(ORDER)


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["page", "disk"])
def test_few_files_are_open_at_a_time(root, tier, monkeypatch):
    monkeypatch.setattr(shard_files, "OPEN_FILES", 2)
    here = lambda: sum(".safetensors" in _link(fd) for fd in os.listdir("/proc/self/fd"))  # noqa: E731
    gc.collect()
    before = here()
    cache = opened(root, tier=tier)
    assert cache.stats()["shards"] > 4
    expected = by_file(opened(root))
    for order in np.random.default_rng(0).integers(0, 20, (30, 3)):
        for got, row in zip(texts_of(cache.read(order)), order, strict=True):
            assert torch.equal(got, expected[row])
        assert here() - before <= 2
    for batch, order in zip(cache.batches(PARTS), PARTS, strict=True):
        assert torch.equal(batch.hidden, torch.cat([expected[i] for i in order]))
    cache.close()
    gc.collect()
    assert here() == before


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


# -- on the device ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("store", STORES)
def test_device_store(root, store, tier, device):
    """For the kernels: its examples are the rows of the cache."""
    cache = opened(root, store, tier=tier, device=device)
    on_device = cache.device_store()
    on_device.check()
    assert on_device.examples == 20 and on_device.hidden.device.type == device
    assert cache.device_store() is on_device
    for dtype in (torch.float32, torch.bfloat16):
        batch = opened(root, store).read(ORDER, dtype=dtype)
        got = reference.gather_rows(
            on_device.hidden,
            on_device.cu_seqlens,
            torch.tensor(ORDER, device=device),
            batch.cu_seqlens.to(device),
            batch.num_tokens,
            dtype,
            on_device.token_scale,
            on_device.channel_scale,
        )
        assert same_bits(got, batch.hidden)
    again = cache.read(ORDER)
    assert same_bits(again.hidden, opened(root, store).read(ORDER).hidden)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["static", "npg", "appg", "mppg"])
@pytest.mark.parametrize("store", STORES)
def test_prompts_straight_from_the_store(root, store, kind, device):
    cache = opened(root, store, tier="device", device=device)
    weights = make_weights(kind, 32, 4, 3, torch.float32, device=device)
    batch = cache.read(ORDER, dtype=torch.float32)
    expected = insert_prompt(batch.hidden, batch.cu_seqlens, kind, weights, 3)
    got = gather_insert_prompt(
        cache.device_store(),
        torch.tensor(ORDER, device=device),
        batch.cu_seqlens,
        batch.num_tokens,
        kind,
        weights,
        3,
        dtype=torch.float32,
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


# -- keys ------------------------------------------------------------------------------------------


def test_keys_that_share_their_first_half():
    """Found by both halves; of equal keys the first row counts."""
    own = np.random.default_rng(0)
    keys = np.stack([own.integers(0, 5, 200), own.integers(0, 30, 200)], 1).astype(np.uint64)
    keys[:, 0] *= np.uint64(2**61)  # up to the last bit
    table = KeyTable(keys)
    first = {}
    for row, key in enumerate(map(tuple, keys.tolist())):
        first.setdefault(key, row)
    asked = [(high * 2**61, low) for high in range(6) for low in range(32)]
    got = table.find(np.array(asked, np.uint64)).tolist()
    assert got == [first.get(key, -1) for key in asked] and got.count(-1) > 60
    assert len(table) == 200 and table.find(keys[:0]).tolist() == []
    assert KeyTable(keys[:0]).find(keys[:3]).tolist() == [-1, -1, -1]
    top = np.array([[2**64 - 1, 2**64 - 1], [2**64 - 1, 0]], np.uint64)
    assert KeyTable(top).find(top[::-1]).tolist() == [1, 0]


def test_reading_leaves_the_files_alone(root):
    folder = root / opened(root).identity.folder
    before = files(folder)
    for tier in TIERS:
        list(opened(root, tier=tier).batches(PARTS))
    assert files(folder) == before
