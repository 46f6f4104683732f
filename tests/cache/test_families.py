"""What the rows of an activation cache are, for every family: the hidden states of each text by
itself, whatever was beside it in its batch and whichever way they were computed.
"""

from __future__ import annotations

import pytest
import torch

from lpt_fast.cache import ActivationCache, planner
from tests.cache.cached_texts import alone, assert_rows, files, filled, ragged, texts_of
from tests.tiny import FAMILIES, LAYERS, tiny

CUTS = list(range(1, LAYERS))
TYPED = ("bert", "roberta", "xlm-roberta", "electra", "gpt2")  # with token types that matter
ROTARY = ("modernbert", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


def mixed(family: str) -> list[dict]:
    """Texts of every kind that a family knows: with token types, with positions, with both."""
    types = {"token_type_ids": [0, 0, 1, 1, 1]} if family in TYPED else {}
    places = {} if family in ("deberta", "deberta-v2", "t5") else {"position_ids": [2, 3, 4, 7, 9]}
    ids = {"input_ids": [9, 8, 7, 6, 5]}
    kinds = [{**ids, **types}, {**ids, **places}, {**ids, **types, **places}]
    # (OPT counts positions from the mask where it is not told.)
    return ragged() + [kind for kind in kinds if len(kind) > 1]


def continuing(monkeypatch):
    """Tiny layers are cheaper to run than to read."""
    monkeypatch.setattr(planner, "continuing_pays", lambda *args: True)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_each_text_alone(family, tmp_path):
    """Three cuts in one pass, from padded batches; and the same bytes as cut by cut."""
    model, data = tiny(family), mixed(family)
    cache = ActivationCache.open(tmp_path / "a", model, insertion_layer=CUTS[0], store="fp32")
    report = cache.build(model, data, insertion_layer=CUTS, batch_tokens=30)
    unique = len({str(sorted(example.items())) for example in data})
    assert (report.rows, report.unique, report.computed) == (len(data), unique, unique)
    for k in CUTS:
        of_k = ActivationCache.open(tmp_path / "a", model, insertion_layer=k)
        expected = [alone(model, example, k) for example in data]
        rows = of_k.rows(data)
        assert_rows(of_k, rows, expected)
        batch = of_k.read(rows)
        assert batch.layer == k and batch.hidden.dtype == torch.float32
        assert batch.input_ids.tolist() == [i for e in data for i in e["input_ids"]]
        separate, _ = filled(tmp_path / f"{k}", model, data, k, batch_tokens=30)
        assert files(tmp_path / f"{k}" / separate.identity.folder) == files(
            tmp_path / "a" / of_k.identity.folder
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_types_and_positions_matter(family, tmp_path):
    """Rows of the same ids differ by them where the model reads them (canary and all)."""
    model, data = tiny(family), mixed(family)
    cache, rows = filled(tmp_path, model, data)
    plain = [{"input_ids": example["input_ids"]} for example in data]
    for example, row, other in zip(data, rows, cache.ensure(model, plain).tolist(), strict=True):
        batch = cache.read([row])
        differs = not torch.allclose(batch.hidden, cache.read([other]).hidden, atol=1e-3)
        # (Turning all positions alike changes nothing for rotary models; these jump.)
        assert differs == (len(example) > 1)
        positions = example.get("position_ids")
        assert (None if batch.position_ids is None else batch.position_ids.tolist()) == positions
    places = [i for i, example in enumerate(data) if "position_ids" in example]
    if places:  # beside a text that has none, which counts from 0
        both = cache.read([rows[1], rows[places[0]]]).position_ids.tolist()
        assert both == [*range(len(data[1]["input_ids"])), 2, 3, 4, 7, 9]
    again = ActivationCache.open(tmp_path, model, insertion_layer=2)
    assert len(again) == len(cache)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_deeper_cut_from_a_shallower_one(family, tmp_path, monkeypatch):
    continuing(monkeypatch)
    model, data = tiny(family), mixed(family)
    filled(tmp_path, model, data, 1)
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda *args: pytest.fail("the words were read"))
    cache = ActivationCache.open(tmp_path, model, insertion_layer=2, store="fp32")
    assert cache.build(model, data, insertion_layer=[2, 3]).continued_from == 1
    handle.remove()
    for k in (2, 3):
        cache = ActivationCache.open(tmp_path, model, insertion_layer=k, store="fp32")
        rows = cache.rows(data)
        assert_rows(cache, rows, [alone(model, example, k) for example in data])
    cache, _ = filled(tmp_path, model, data, 3, store="bf16")
    assert len(cache) == len(set(rows.tolist()))


@pytest.mark.slow
@pytest.mark.parametrize("store", ["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_deeper_cut_of_a_half_precision_model(family, store, tmp_path, monkeypatch):
    """Exact stores of what it gives are bf16 and fp32; the numbers are those of a direct build."""
    continuing(monkeypatch)
    model, data = tiny(family).bfloat16(), mixed(family)
    direct, rows = filled(tmp_path / "direct", model, data, 3, store)
    filled(tmp_path / "a", model, data, 1, store)
    cache = ActivationCache.open(tmp_path / "a", model, insertion_layer=3, store=store)
    assert cache.build(model, data).continued_from == 1
    assert torch.equal(cache.read(cache.rows(data)).hidden, direct.read(rows).hidden)


# (Transformers' DeBERTa itself does not run under autocast.)
@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deberta"])
def test_under_autocast(family, tmp_path, monkeypatch):
    """Each layer says then in which dtype its output is, and rows do not keep that: none serve."""
    continuing(monkeypatch)
    model, data, opened = tiny(family), mixed(family), {"compute_dtype": "bfloat16"}
    direct, rows = filled(tmp_path / "direct", model, data, 3, **opened)
    for store in ("bf16", "fp32"):
        filled(tmp_path / "a", model, data, 1, store, **opened)
    cache = ActivationCache.open(tmp_path / "a", model, insertion_layer=3, store="fp32", **opened)
    cache.build(model, data)
    assert_rows(cache, cache.rows(data), texts_of(direct.read(rows)))
    exact = [alone(model, example, 3) for example in data]
    got = texts_of(cache.read(cache.rows(data)))
    gaps = [float((a - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]
    assert 1e-4 < max(gaps) < 3e-2


@pytest.mark.slow
def test_which_shallower_caches_serve(tmp_path, monkeypatch):
    """The deepest exact one of this model that has the texts, if that pays."""
    model, data = tiny("bert"), ragged()

    def built(k, source=None, of=model, data=data):
        cache = ActivationCache.open(tmp_path, of, insertion_layer=k, store="fp32")
        return cache.build(of, data).continued_from

    for store in ("bf16", "fp16", "int8c", "fp8"):
        filled(tmp_path, model, data, 1, store)
    filled(tmp_path, tiny("bert", seed=1), data, 2)
    filled(tmp_path, model, data, 1)
    assert built(2) == 0  # it does not pay
    continuing(monkeypatch)
    assert built(3, data=ragged(seed=5)) == 0  # not these texts
    assert built(3) == 2
    more = ragged(14)
    filled(tmp_path, model, more, 1)
    assert built(3, data=more) == 1  # of the two new ones layer 2 knows nothing
    expected = [alone(model, example, 3) for example in more]
    cache = ActivationCache.open(tmp_path, model, insertion_layer=3, store="fp32")
    assert_rows(cache, cache.rows(more), expected)


def test_only_exact_shallower_caches_serve(tmp_path, monkeypatch):
    continuing(monkeypatch)
    model, data = tiny("bert"), ragged()
    for store in ("bf16", "fp16", "int8c", "fp8"):
        filled(tmp_path, model, data, 1, store)
    filled(tmp_path, tiny("bert", seed=1), data, 1)  # another model's
    cache = ActivationCache.open(tmp_path, model, insertion_layer=2, store="fp32")
    assert cache.build(model, data).continued_from == 0
    double = tiny("bert").double()
    filled(tmp_path, double, data, 1)
    cache = ActivationCache.open(tmp_path, double, insertion_layer=2, store="fp32")
    assert cache.build(double, data).continued_from == 0
