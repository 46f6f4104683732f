"""Texts of a tokenised data set as rows of a cache: which are the same, which are refused."""

from __future__ import annotations

import random

import datasets
import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from lpt_fast.backbone.families import find_backbone
from lpt_fast.cache import ActivationCache, CacheError, MissingRowsError
from lpt_fast.cache.rows import TextRules, read_keys, to_text
from tests.cache.cached_texts import alone, assert_rows, counted, filled, ragged
from tests.tiny import PAD, VOCAB, tiny


def rules_of(model) -> TextRules:
    return TextRules.of(*find_backbone(model)[1:])


def padded(example: dict, width: int, side: str) -> dict:
    """With `attention_mask`; padding holds other values than tokens may."""
    n = len(example["input_ids"])
    rest = width - n
    out = {"attention_mask": ([0] * rest + [1] * n) if side == "left" else [1] * n + [0] * rest}
    for name, values in example.items():
        fill = [PAD if name == "input_ids" else 77] * rest
        out[name] = fill + values if side == "left" else values + fill
    return out


SAME = {
    "padded left": lambda e: padded(e, 12, "left"),
    "padded right": lambda e: padded(e, 12, "right"),
    "with a mask": lambda e: {**e, "attention_mask": [1] * len(e["input_ids"])},
    "with a label": lambda e: {**e, "labels": 1, "text": "what it was"},
    "torch": lambda e: {n: torch.tensor(v) for n, v in e.items()},
    "numpy": lambda e: {n: np.array(v, np.uint16) for n, v in e.items()},
    "tokenizer": lambda e: BatchEncoding(padded(e, 9, "right")),
    "nothing given": lambda e: {"token_type_ids": None, "position_ids": None, **e},
}


@pytest.mark.parametrize("way", SAME)
def test_the_same_text(model, way, tmp_path):
    typed = [
        {**e, "token_type_ids": [0] + [1] * (len(e["input_ids"]) - 1)}
        for e in ragged(8, seed=3)[1:]
    ]
    placed = [{**e, "position_ids": [2 + i for i in range(len(e["input_ids"]))]} for e in ragged(4)]
    data = ragged() + typed + placed
    cache, rows = filled(tmp_path, model, data)
    assert len(set(rows)) == len(data) == len(cache)
    with counted(model) as seen:
        again = cache.ensure(model, [SAME[way](example) for example in data])
    assert again.tolist() == rows and not seen
    filled(tmp_path / "other", model, [SAME[way](example) for example in data])
    other = ActivationCache.open(tmp_path / "other", insertion_layer=2)
    assert_rows(other, other.rows(data), [alone(model, example, 2) for example in data])


def test_token_types(model, tmp_path):
    """All zero is what encoders take by themselves, and a word of GPT-2's."""
    ids = {"input_ids": [5, 6, 7]}
    zero, one = ({**ids, "token_type_ids": types} for types in ([0, 0, 0], [0, 1, 1]))
    for family, different in (("bert", 2), ("gpt2", 3), ("llama", 1), ("modernbert", 1)):
        cache, rows = filled(tmp_path, tiny(family), [ids, zero, one])
        assert len(cache) == len(set(rows)) == different
        assert (rows[0] == rows[1]) == (family != "gpt2")
        assert cache.rows([ids, zero, one]).tolist() == rows
        blind = ActivationCache.open(tmp_path / cache.identity.folder)
        texts = [ids, zero, one] if family in ("bert", "gpt2") else [ids]
        assert (blind.lengths == 3).all()
        got = blind.read(blind.rows(texts)).hidden
        assert torch.equal(got, cache.read(rows[: len(texts)]).hidden)
    with pytest.raises(MissingRowsError):  # what it ignores only the model says
        blind.rows([one])
    assert cache.rows([one], rules_of(tiny("modernbert"))).tolist() == rows[:1]


def test_another_template_is_another_text(model, tmp_path):
    cache, rows = filled(tmp_path, model, ragged())
    for change in (
        lambda e: {"input_ids": [*e["input_ids"], 4]},
        lambda e: {"input_ids": [4, *e["input_ids"]]},
        lambda e: {"input_ids": [e["input_ids"][0] ^ 1, *e["input_ids"][1:]]},
        lambda e: {**e, "position_ids": list(range(len(e["input_ids"])))},
        lambda e: {**e, "token_type_ids": [1] * len(e["input_ids"])},
    ):
        data = [change(example) for example in ragged()]
        with pytest.raises(MissingRowsError, match=r"12 of 12 texts .*\(row 0 of the data set"):
            cache.rows(data)
        assert not set(cache.ensure(model, data)) & set(rows)
        assert_rows(cache, cache.rows(data), [alone(model, example, 2) for example in data])


def test_keys_do_not_run_into_each_other():
    """Ids, types and positions are told apart, whatever they are."""
    parts = [[5], [6], [5, 6], [6, 5], [1, 1], [5, 6, 1], [0, 5, 6], [256], [5, 0]]
    texts = [{"input_ids": part} for part in parts]
    texts += [{"input_ids": [5, 6], "token_type_ids": types} for types in ([1, 0], [0, 1], [1, 1])]
    texts += [{"input_ids": [5, 6], "position_ids": places} for places in ([1, 0], [0, 1], [1, 1])]
    texts.append({"input_ids": [5, 6], "token_type_ids": [1, 0], "position_ids": [1, 0]})
    keys = read_keys(texts, TextRules())
    assert len(np.unique(keys.keys, axis=0)) == len(texts)
    assert keys.lengths.tolist() == [len(text["input_ids"]) for text in texts]
    assert keys.kinds.tolist() == [0] * 9 + [1] * 3 + [2] * 3 + [3]
    # Of today's format: a cache of last year must not be missed by a change here.
    assert to_text(0, texts[0], TextRules()).key.hex() == "b4f1e4bb4720d8750aa6302771fa86bc"
    assert to_text(0, texts[-1], TextRules()).key.hex() == "bb8d699eb0bebac0fef13a4d529ddbb4"


# -- kinds of data sets ----------------------------------------------------------------------------


def test_kinds_of_data_sets(model, tmp_path):
    data = [padded(example, 9, "left") for example in ragged()]
    plain = datasets.Dataset.from_list([{**example, "labels": 0} for example in data])
    kinds = {
        "list": data,
        "tuple": tuple(data),
        "datasets": plain,
        "datasets torch": plain.with_format("torch"),
        "datasets numpy": plain.with_format("numpy"),
        "datasets mapped": datasets.Dataset.from_list(ragged()).select(range(12)),
        "torch": torch.utils.data.Subset(data, range(12)),
    }
    cache, rows = filled(tmp_path / "a", model, data)
    expected = cache.read(rows).hidden
    for name, kind in kinds.items():
        other, rows = filled(tmp_path / name, model, kind)
        assert torch.equal(other.read(rows).hidden, expected), name
    for kind, message in (
        (iter(data), "is a list_iterator, expected one with a length"),
        ({"input_ids": [[5]]}, "is a mapping, expected rows"),
        (datasets.DatasetDict(train=plain), "is a mapping, expected rows; give one split"),
        ([], "has no rows, expected at least one text"),
        (["a text"], r"Row 0 .* has no `input_ids`, got <class 'str'>; tokenise"),
        ([{"text": "a text"}], r"Row 0 .* has no `input_ids`, got \['text'\]; tokenise"),
        (None, "is a NoneType, expected one with a length"),
    ):
        with pytest.raises(CacheError, match=message):
            cache.ensure(model, kind)


def test_a_data_set_that_changes(model, tmp_path):
    """Texts with random transforms have no rows."""

    class Random(list):
        def __getitem__(self, i):
            example = super().__getitem__(i)
            return {"input_ids": [*example["input_ids"], random.randrange(3, VOCAB)]}

    cache = ActivationCache.open(tmp_path, model, insertion_layer=2)
    with pytest.raises(CacheError, match=r"Row \d+ .* is another text when it is read again"):
        cache.ensure(model, Random(ragged()))
    assert len(cache) == 0
    (folder,) = tmp_path.iterdir()
    assert not list(folder.glob("*.safetensors*"))


# -- what is refused -------------------------------------------------------------------------------

IDS = [5, 6, 7]
REFUSED = {
    "`input_ids` that are float64 of the shape [0], expected a list of one or more": [],
    "`input_ids` that are int64 of the shape [1, 3], .*without return_tensors": [IDS],
    "`input_ids` that are float64 of the shape [3]": [5.0, 6.0, 7.0],
    "`input_ids` that are <U1 of the shape [2]": ["a", "b"],
    "token id 99, expected 0 .. 98; it was tokenised for another model": [5, VOCAB],
    "token id -100, expected 0 .. 98": [5, -100, 7],
    "65 tokens, expected at most 64, which the model takes; .*truncation=True": [5] * 65,
    "`attention_mask` with holes, expected the tokens of one text in one piece": {
        "attention_mask": [1, 0, 1]
    },
    "`attention_mask` without a 1": {"attention_mask": [0, 0, 0]},
    "2 `attention_mask` for 3 tokens, expected one each": {"attention_mask": [1, 1]},
    "4 `token_type_ids` for 3 tokens": {"token_type_ids": [0, 0, 0, 0]},
    "2 `position_ids` for 3 tokens": {"position_ids": [0, 1]},
    "`token_type_ids` 2, expected 0 .. 1; they were made for": {"token_type_ids": [0, 2, 0]},
    "`token_type_ids` -1, expected 0 .. 1": {"token_type_ids": [0, -1, 0]},
    "`position_ids` 64, expected 0 .. 63": {"position_ids": [0, 1, 64]},
    "`position_ids` -1, expected 0 .. 63": {"position_ids": [-1, 0, 1]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(model, message, tmp_path):
    bad = REFUSED[message]
    bad = {"input_ids": bad} if isinstance(bad, list) else {"input_ids": IDS, **bad}
    cache = ActivationCache.open(tmp_path / "a", model, insertion_layer=2)
    pattern = message.replace("[", r"\[").replace("]", r"\]").replace(" .. ", r" \.\. ")
    with pytest.raises(CacheError, match="Row 3 of the data set has .*" + pattern):
        cache.ensure(model, [*ragged(3), bad, *ragged(3)])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("family", "longest", "positions", "types"),
    [
        ("bert", 64, 64, 2),
        ("roberta", 63, 64, 2),  # its positions begin behind the padding id
        ("mpnet", 62, 64, None),  # behind 1, whatever the padding id
        ("gpt2", 64, 64, VOCAB),
        ("opt", 64, 64, None),
        ("llama", 64, None, None),
        ("deberta", 64, 64, None),  # no table of types
        ("t5", None, None, None),
    ],
)
def test_the_limits_of_a_model(family, longest, positions, types, tmp_path):
    """The last that goes, goes; the first that does not is refused and not tried."""
    model = tiny(family)
    rules = rules_of(model)
    assert (rules.max_length, rules.positions) == (longest, positions)
    takes_types = family in ("bert", "roberta", "deberta", "gpt2")
    assert rules.takes_types == takes_types and (not takes_types or rules.types == types)
    ids = {"input_ids": IDS}
    good, bad = [], []
    if longest:
        good.append({"input_ids": [5] * longest})
        bad.append({"input_ids": [5] * (longest + 1)})
    if positions:
        good.append({**ids, "position_ids": [0, 1, positions - 1]})
        bad.append({**ids, "position_ids": [0, 1, positions]})
    if takes_types and types:
        good.append({**ids, "token_type_ids": [0, 1, types - 1]})
        bad.append({**ids, "token_type_ids": [0, 1, types]})
    cache, rows = filled(tmp_path, model, good or [ids])
    assert_rows(cache, rows, [alone(model, example, 2) for example in good or [ids]])
    for example in bad:
        with pytest.raises(CacheError, match="Row 0 of the data set has"):
            cache.ensure(model, [example])
    rotary = {**ids, "position_ids": [0, 7, 1000]}
    if family == "llama":
        assert_rows(cache, cache.ensure(model, [rotary]), [alone(model, rotary, 2)])
