"""ActivationCache: what is computed, which cache is opened, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model

from lpt_fast.cache import ActivationCache, CacheError, MissingRowsError
from lpt_fast.cache.shard import STORES
from tests.adapters import lpt
from tests.cache.cached_texts import alone, assert_rows, counted, filled, ragged
from tests.tiny import tiny


def folders(root):
    return sorted(path.name for path in root.iterdir())


# -- what is computed ------------------------------------------------------------------------------


def test_only_what_is_missing_is_computed(model, tmp_path):
    data = ragged()
    cache = ActivationCache.open(tmp_path / "deep" / "root", model, insertion_layer=2)
    assert len(cache) == 0
    with counted(model) as seen:
        report = cache.build(model, data + data[:5])
    assert sum(seen) == report.computed == report.unique == 12 and report.rows == 17
    assert report.tokens == sum(len(example["input_ids"]) for example in data)
    assert report.bytes == report.tokens * 32 * 2 and report.seconds > 0
    assert report.continued_from == 0 and len(cache) == 12
    with counted(model) as seen:
        rows = cache.ensure(model, data + data[:5])
    assert not seen and rows.dtype == np.int64
    assert sorted(rows[:12]) == list(range(12)) and (rows[12:] == rows[:5]).all()
    before = cache.read(rows).hidden
    with counted(model) as seen:
        report = cache.build(model, ragged(15) + data[::-1])
    assert sum(seen) == report.computed == 3 and report.unique == 15
    assert len(cache) == 15
    assert (cache.ensure(model, data) == rows[:12]).all()  # numbers stay
    assert torch.equal(cache.read(rows).hidden, before)
    assert cache.lengths[rows].tolist() == [
        len(example["input_ids"]) for example in data + data[:5]
    ]
    again = ActivationCache.open(tmp_path / "deep" / "root", model, insertion_layer=2)
    with counted(model) as seen:
        rows = again.ensure(model, ragged(15))
    assert not seen
    assert_rows(
        again, rows, [alone(model, e, 2).bfloat16() for e in ragged(15)], atol=0.02, rtol=0.01
    )


def test_several_cuts_fill_what_each_lacks(model, tmp_path):
    """Some rows at one cut, others at another: each text runs once, and no row is there twice."""
    data = ragged(14)
    filled(tmp_path, model, data[:5], 1)
    filled(tmp_path, model, data[3:9], 2)
    cache = ActivationCache.open(tmp_path, model, insertion_layer=1, store="fp32")
    with counted(model) as seen:
        report = cache.build(model, data, insertion_layer=[1, 2], batch_tokens=20)
    assert sum(seen) == report.computed == 12  # all but the two that both had
    assert report.bytes == 128 * sum(
        len(e["input_ids"]) for part in (data[5:], data[:3], data[9:]) for e in part
    )
    for k in (1, 2):
        cache = ActivationCache.open(tmp_path, model, insertion_layer=k)
        assert len(cache) == 14 and cache.verify(full=True).sound
        assert_rows(cache, cache.rows(data), [alone(model, example, k) for example in data])


def test_another_object_sees_what_was_built(model, tmp_path):
    data = ragged()
    cache, _ = filled(tmp_path, model, data[:4])
    other = ActivationCache.open(tmp_path, insertion_layer=2)
    numbers = other.rows(data[:4])
    before = other.read(numbers).hidden
    cache.ensure(model, data)
    with pytest.raises(MissingRowsError, match=r"8 of 12 texts .*row 4 of the data set first"):
        other.rows(data)
    other.refresh()
    assert (other.rows(data)[:4] == numbers).all()
    assert torch.equal(other.read(numbers).hidden, before)
    assert torch.equal(other.read(other.rows(data)).hidden, cache.read(cache.rows(data)).hidden)
    assert other.stats()["rows_read"] == 4 + 4 + 12 and cache.stats()["rows"] == 12


def test_with_an_adapter_the_layer_is_known(tmp_path):
    adapted = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS", insertion_layer=3))
    cache = ActivationCache.open(tmp_path, adapted)
    rows = cache.ensure(adapted.train(), ragged())
    assert cache.stats()["insertion_layer"] == 3
    base = tiny("bert", "SEQ_CLS")
    assert_rows(cache, rows, [alone(base, e, 3).bfloat16() for e in ragged()], atol=0.02, rtol=0.01)
    # What is said when opening counts for more.
    cache = ActivationCache.open(tmp_path, adapted, insertion_layer=1)
    cache.ensure(adapted, ragged())
    assert cache.stats()["insertion_layer"] == 1
    with pytest.raises(CacheError, match=r"output|cache is that of .* at layer 1"):
        cache.ensure(adapted, ragged(), insertion_layer=3)
    with adapted.disable_adapter(), pytest.raises(CacheError, match="no active late prompt"):
        ActivationCache.open(tmp_path, adapted)


def test_ways_of_calling_that_do_not_matter(model, tmp_path):
    """Autocast, inference mode, gradients, batch size, shard size, order: rows are the same."""
    data = ragged()
    cache, rows = filled(tmp_path / "a", model, data)
    expected = cache.read(rows).hidden
    for i, (context, settings) in enumerate(
        [
            (torch.autocast("cpu", torch.bfloat16), {}),
            (torch.inference_mode(), {}),
            (torch.enable_grad(), {"batch_tokens": 1}),
            (torch.no_grad(), {"batch_tokens": 17, "shard_bytes": 1000}),
        ]
    ):
        with context:
            other, rows = filled(tmp_path / str(i), model, data, **settings)
            ActivationCache.open(tmp_path / "a", model, insertion_layer=2, store="fp32")
        assert other.identity == cache.identity
        got = other.read(rows).hidden
        assert not got.requires_grad and not got.is_inference()
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_compute_dtype(model, tmp_path):
    cache, rows = filled(tmp_path, model, ragged())
    half, _ = filled(tmp_path, model, ragged(), compute_dtype="bfloat16")
    assert half.identity.digest != cache.identity.digest
    assert half.stats()["compute_dtype"] == "bfloat16" and len(folders(tmp_path)) == 2
    gap = (half.read(half.rows(ragged())).hidden - cache.read(rows).hidden).abs().max()
    assert 1e-4 < gap < 0.1
    assert ActivationCache.open(tmp_path, model, insertion_layer=2).identity == cache.identity
    for dtype in ("float64", "int8", "float"):
        with pytest.raises(CacheError, match="`compute_dtype` must be 'bfloat16' or 'float16'"):
            ActivationCache.open(tmp_path, model, insertion_layer=2, compute_dtype=dtype)
    own = ActivationCache.open(tmp_path, model, insertion_layer=2, compute_dtype="float32")
    assert own.identity == cache.identity


# -- which cache -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(model, tmp_path_factory):
    """Caches of two layers, and at layer 2 of all stores."""
    root = tmp_path_factory.mktemp("caches")
    filled(root, model, ragged(), 1, "bf16")
    for store in STORES:
        filled(root, model, ragged(), 2, store)
    return root


@pytest.mark.slow
def test_which_cache_is_opened(model, root):
    assert len(folders(root)) == 6
    for store in STORES:
        cache = ActivationCache.open(root, model, insertion_layer=2, store=store)
        digest = cache.identity.digest
        same = [
            ActivationCache.open(root, insertion_layer=2, store=store),
            ActivationCache.open(root, identity=digest),
            ActivationCache.open(root, identity=digest[:9], store=store),
            ActivationCache.open(root / digest[:32]),
            ActivationCache.open(root / digest[:32], model, insertion_layer=2),
            ActivationCache.open(root, model, insertion_layer=2, identity=digest[:9], store=store),
        ]
        for other in same:
            assert other.stats()["store"] == store and other.identity == cache.identity
            assert len(other.read(other.rows(ragged()))) == 12
    assert ActivationCache.open(root, model, insertion_layer=2).identity.store == "bf16"
    assert ActivationCache.open(root, insertion_layer=1).identity.layer == 1
    assert ActivationCache.open(root, store="bf16", insertion_layer=1).identity.layer == 1


@pytest.mark.parametrize("kept", STORES)
@pytest.mark.parametrize("asked", [None, *STORES])
def test_a_store_that_was_asked_for(model, kept, asked, tmp_path):
    """What is there serves unless another store was asked for, which is then filled."""
    filled(tmp_path, model, ragged(), store=kept)
    cache, rows = filled(tmp_path, model, ragged(), store=asked)
    assert cache.identity.store == (asked or kept)
    assert len(folders(tmp_path)) == (1 if asked in (None, kept) else 2)
    assert len(cache) == len(rows) == 12


def test_the_only_cache_of_a_folder(model, tmp_path):
    cache, rows = filled(tmp_path / "a", model, ragged())
    only = ActivationCache.open(tmp_path / "a")
    assert torch.equal(only.read(rows).hidden, cache.read(rows).hidden)
    later = ActivationCache.open(tmp_path / "b")  # may come into being
    with pytest.raises(CacheError, match=r"b holds no cache yet, expected one to read from"):
        later.read([0])
    filled(tmp_path / "b", model, ragged())
    assert len(later.read(rows)) == 12
    with ActivationCache.open(tmp_path / "a", insertion_layer=2) as cache:
        cache.read(rows)
    # Of another layer, or in another store, it is not what was asked for.
    for asked in ({"insertion_layer": 3}, {"store": "fp8"}, {"compute_dtype": "bfloat16"}):
        with pytest.raises(CacheError, match="holds no cache yet"):
            ActivationCache.open(tmp_path / "a", **asked).read(rows)
        with pytest.raises(CacheError, match="holds no cache yet"):
            ActivationCache.open(only.stats()["path"], **asked).read(rows)


def test_choices_that_are_refused(model, root, tmp_path):
    several = r"holds 6 caches that fit, expected one \(.*layer 1, bf16; .*\); say which by"
    for attribute in (lambda c: c.read([0]), lambda c: c.stats(), lambda c: c.verify()):
        with pytest.raises(CacheError, match=several):
            attribute(ActivationCache.open(root))
    with pytest.raises(CacheError, match="holds 5 caches that fit, expected one"):
        ActivationCache.open(root, insertion_layer=2)
    with pytest.raises(CacheError, match="holds 0 caches that fit, .*: layer 2, fp8"):
        ActivationCache.open(root, identity="nothing")
    with pytest.raises(CacheError, match=r"`identity` is 'nothing', expected that of this model"):
        ActivationCache.open(root, model, insertion_layer=2, identity="nothing")
    for wrong, message in (
        ({"store": "int8"}, "store must be one of fp32, fp16, bf16, int8c, fp8, got 'int8'"),
        ({"tier": "gpu"}, "`tier` must be auto, device, pinned, page, disk, got 'gpu'"),
        ({"check": "always"}, "`check` must be one of read, never, got 'always'"),
    ):
        with pytest.raises(CacheError, match=message):
            ActivationCache.open(tmp_path, **wrong)
        with pytest.raises(CacheError, match=message):
            ActivationCache.open(tmp_path, model, insertion_layer=2, **wrong)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match="is a file, expected the folder of a cache"):
        ActivationCache.open(tmp_path / "file")
    for layer in (0, 4, True, "2"):
        with pytest.raises(CacheError, match=r"must be between 1 and 3 for this model of 4 layers"):
            ActivationCache.open(tmp_path, model, insertion_layer=layer)
    with pytest.raises(CacheError, match=r"no active late prompt .*give it, 1 \.\. 3"):
        ActivationCache.open(tmp_path, model)
    with pytest.raises(CacheError, match=r"`model` is a str, expected a model that is loaded"):
        ActivationCache.open(tmp_path, "bert-base-uncased")
    with pytest.raises(ValueError, match="does not know the model Linear"):
        ActivationCache.open(tmp_path, torch.nn.Linear(2, 2), insertion_layer=1)
    assert folders(tmp_path) == ["file"]


def test_builds_that_are_refused(model, tmp_path):
    cache = ActivationCache.open(tmp_path / "a", model, insertion_layer=2)
    for wrong, message in (
        ({"batch_tokens": 0}, "`batch_tokens` must be at least 1, got 0"),
        ({"shard_bytes": True}, "`shard_bytes` must be at least 1, got True"),
        ({"max_bytes": -1}, "`max_bytes` must be at least 1, got -1"),
        ({"insertion_layer": [2, 1, 2]}, r"names a layer twice: \[2, 1, 2\]"),
        ({"insertion_layer": [1, 9]}, "must be between 1 and 3"),
    ):
        with pytest.raises(CacheError, match=message):
            cache.build(model, ragged(), **wrong)
    with pytest.raises(CacheError, match=r"unknown setting: .*'batch_size'"):
        cache.ensure(model, ragged(), batch_size=3)
    assert not (tmp_path / "a").exists()
