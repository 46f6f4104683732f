"""What LPTTrainer makes of data sets and collators: labels token by token, the token that is read,
and data that it refuses.
"""

from __future__ import annotations

import shutil

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

from lpt_fast import ActivationCache, LPTConfig, LPTTrainer
from lpt_fast.cache import CacheError
from tests.cache.cached_texts import counted
from tests.tiny import tiny
from tests.train.cases import (
    CLOSE,
    K,
    Stop,
    arguments,
    assert_same,
    cached,
    collate,
    model_of,
    on_text,
    padded_labels,
    rows,
    stock,
    trained,
    with_labels,
)

# -- kinds of data sets ----------------------------------------------------------------------------


class Items(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["list", "torch", "datasets", "tensors"])
@pytest.mark.parametrize("remove", [True, False])
def test_kinds_of_data_sets(tmp_path, kind, remove):
    data = rows()
    more = data if not remove else [{**row, "text": "x"} for row in data]
    table = datasets.Dataset.from_list(more)
    made = {"list": more, "torch": Items(more), "datasets": table}
    made["tensors"] = table.with_format("torch", ["input_ids", "attention_mask", "labels"])

    def collator(examples):
        assert all("text" not in e for e in examples)
        return collate([{n: torch.as_tensor(v).tolist() for n, v in e.items()} for e in examples])

    settings = {
        "remove_unused_columns": remove,
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "length",
    }
    models = [model_of() for _ in range(2)]
    on_text(models[0], tmp_path, data_collator=collator, train_dataset=data, **settings).train()
    settings |= {"data_collator": collator, "train_dataset": made[kind]}
    cached(models[1], tmp_path, tmp_path / "cache", **settings).train()
    assert_same(trained(models[1]), trained(models[0]), **CLOSE)


@pytest.mark.slow
def test_columns_that_a_text_needs(tmp_path):
    """Types and positions are part of a text, and stay; context_lengths reach the model."""
    data = [
        {**row, "token_type_ids": [0, 1] + [1] * (len(row["input_ids"]) - 2), "other": 1}
        for row in rows()
        if len(row["input_ids"]) == 6
    ]
    data = [{**row, "position_ids": list(range(i, i + 6))} for i, row in enumerate(data)]
    models = [model_of() for _ in range(2)]
    a = stock(models[0], tmp_path, data, data_collator=default_data_collator)
    a.train()
    b = cached(models[1], tmp_path, tmp_path / "c", data, data_collator=default_data_collator)
    b.train()
    assert_same(trained(models[1]), trained(models[0]), **CLOSE)
    table = b.open_cache().table
    assert (table.token_type_ids >= 0).all() and (table.position_ids >= 0).all()
    data = [{**row, "context_lengths": 1 + i % 3} for i, row in enumerate(with_labels("answer"))]
    data = [row for row in data if len(row["input_ids"]) == 7]
    for row in data:
        row["labels"] = [-100] * 3 + row["labels"][3:]
    weights = []
    for context in (True, False):
        model = model_of("gpt2", "CAUSAL_LM")
        given = data if context else [{**row, "context_lengths": 3} for row in data]
        cached(model, tmp_path, tmp_path / "d", given, data_collator=default_data_collator).train()
        weights.append(trained(model))
    plain = model_of("gpt2", "CAUSAL_LM")
    more = {"remove_unused_columns": False, "data_collator": default_data_collator}
    stock(plain, tmp_path, data, **more).train()
    assert_same(weights[0], trained(plain), **CLOSE)
    with pytest.raises(AssertionError):
        assert_same(*weights, **CLOSE)


class OwnHead(BertForSequenceClassification):
    def forward(self, input_ids=None, labels=None, **kwargs):
        return super().forward(input_ids, labels=labels, **kwargs)


@pytest.mark.slow
def test_columns_that_a_head_hands_on(tmp_path):
    """A head of one's own need not name the types of a text."""
    data = [row for row in rows() if len(row["input_ids"]) == 6]
    data = [
        {"input_ids": row["input_ids"], "token_type_ids": [0, 0, 1, 1, 1, 1], "labels": 1}
        for row in data
    ]
    for cls in (BertForSequenceClassification, OwnHead):
        base = tiny("bert", "SEQ_CLS")
        base.__class__ = cls
        model = get_peft_model(base, LPTConfig(task_type="SEQ_CLS", prompt_dropout=0.0))
        cache = tmp_path / cls.__name__
        trainer = cached(model, tmp_path, cache, data, data_collator=default_data_collator)
        trainer.train()
        assert (trainer.open_cache().table.token_type_ids >= 0).all()
    assert trainer.label_names == ["labels"]


@pytest.mark.slow
def test_columns_that_the_model_does_not_take(tmp_path):
    """Trainer drops them, so the rows are of the text without them."""
    data = [{**row, "position_ids": [7] * len(row["labels"])} for row in with_labels("token")]
    models = [model_of("t5", "TOKEN_CLS") for _ in range(2)]
    more = {"data_collator": padded_labels()}
    stock(models[0], tmp_path, data, **more).train()
    fast = cached(models[1], tmp_path, tmp_path / "cache", data, **more)
    fast.train()
    assert_same(*map(trained, models), **CLOSE)
    assert fast.open_cache().table.position_ids is None


# -- what cannot work ------------------------------------------------------------------------------


@pytest.mark.slow
def test_models_without_a_late_prompt(tmp_path):
    plain = tiny("bert", "SEQ_CLS")
    with pytest.raises(ValueError, match=r"got a BertForSequenceClassification, expected .*LPTCon"):
        LPTTrainer(plain, arguments(tmp_path), train_dataset=rows())
    lora = get_peft_model(plain, LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="with .*LORA, expected one with a late prompt"):
        LPTTrainer(lora, arguments(tmp_path))
    with pytest.raises(ValueError, match="`activation_cache` is a bool, expected a folder"):
        LPTTrainer(model_of(), arguments(tmp_path), activation_cache=True)
    with pytest.raises(ValueError, match="upper.*'quick'"):
        LPTTrainer(model_of(), arguments(tmp_path), upper="quick")
    for name, value in (("bf16_full_eval", True), ("neftune_noise_alpha", 0.1)):
        args = arguments(tmp_path, **{name: value})
        with pytest.raises(ValueError, match=f"`{name}` is {value} together"):
            LPTTrainer(model_of(), args, activation_cache=tmp_path)
    with pytest.raises(CacheError, match="is a file, expected the folder"):
        (tmp_path / "file").write_text("")
        LPTTrainer(
            model_of(), arguments(tmp_path), collate, rows(), activation_cache=tmp_path / "file"
        ).train()


@pytest.mark.slow
def test_data_without_labels(tmp_path):
    data = [{n: v for n, v in row.items() if n != "labels"} for row in rows()]

    def collator(examples):
        batch = collate([{**e, "labels": 1} for e in examples])
        return {n: v for n, v in batch.items() if n != "labels"}

    model = model_of()
    trainer = cached(model, tmp_path, tmp_path / "cache", data, data_collator=collator)
    with counted(model) as seen, pytest.raises(ValueError, match="no labels, expected `labels`"):
        trainer.train()
    assert not seen and not (tmp_path / "cache").exists()
    trainer = cached(
        model,
        tmp_path,
        tmp_path / "cache",
        data,
        data_collator=lambda es: collate([{**e, "labels": 1} for e in es]),
        max_steps=1,
    )
    trainer.train()  # a collator may make them


@pytest.mark.slow
def test_texts_that_cannot_be(tmp_path):
    """A text that is too long, in the evaluation data, is said before anything is trained."""
    long = [{"input_ids": [5] * 65, "attention_mask": [1] * 65, "labels": 0}]
    for more in (
        {"train_dataset": rows() + long},
        {"eval_dataset": rows(8) + long, "eval_strategy": "epoch"},
    ):
        model = model_of()
        before = trained(model)
        trainer = cached(model, tmp_path, tmp_path / "cache", **more)
        with pytest.raises(CacheError, match="has 65 tokens, expected at most 64"):
            trainer.train()
        assert_same(trained(model), before, atol=0, rtol=0)
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows()))
    trainer = cached(model_of(), tmp_path, tmp_path / "c", eval_dataset=stream)
    with pytest.raises(CacheError, match="expected one with a length"):
        trainer.evaluate()


@pytest.mark.slow
def test_a_collator_that_changes_text(tmp_path):
    """Not the first batch but the third is changed; each is looked at."""
    steps = []

    def collator(examples):
        batch = collate(examples)
        steps.append(1)
        if len(steps) == 3:
            batch["input_ids"][0, 1] += 1
        return batch

    trainer = cached(model_of(), tmp_path, tmp_path / "cache", data_collator=collator)
    with pytest.raises(ValueError, match="gave other token ids"):
        trainer.train()
    assert trainer.state.global_step == 1  # the third batch is made while the second waits

    def changed(**how):
        def collator(examples):
            batch = collate(examples)
            for name, change in how.items():
                batch[name] = change(batch)
            return {n: v for n, v in batch.items() if v is not None}

        trainer = cached(model_of(), tmp_path, tmp_path / "cache", data_collator=collator)
        with pytest.raises(ValueError, match=r"gave other token ids|expected a mapping with `inp"):
            trainer.train()

    changed(attention_mask=lambda b: None)  # padding is then text
    changed(attention_mask=lambda b: b["attention_mask"] * (torch.arange(8) != 0))
    changed(token_type_ids=lambda b: torch.ones_like(b["input_ids"]))
    changed(position_ids=lambda b: torch.zeros_like(b["input_ids"]))
    changed(input_ids=lambda b: None)
    changed(input_ids=lambda b: b["input_ids"].tolist())


@pytest.mark.slow
def test_data_that_changes(tmp_path):
    """A data set whose second reading is another text."""

    class Changing(Items):
        reads = 0

        def __getitem__(self, i):
            self.reads += 1
            row = self.items[i]
            late = self.reads > 2 * len(self) + 5
            return {**row, "input_ids": [3, *row["input_ids"][1:]]} if late else row

    trainer = cached(model_of(), tmp_path, tmp_path / "cache", Changing(rows()))
    with pytest.raises(ValueError, match="or the data set, when it was read again"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("other", ["weights", "layer", "dtype"])
def test_a_cache_of_another_model(tmp_path, other):
    cache_model = model_of(insertion_layer=1 if other == "layer" else K)
    if other == "weights":
        with torch.no_grad():
            cache_model.base_model.model.bert.embeddings.word_embeddings.weight[5] += 1
    if other == "dtype":
        cache_model.base_model.model.to(torch.bfloat16)
    cache = ActivationCache.open(tmp_path / "cache", cache_model)
    cache.ensure(cache_model, rows())
    settings = {"save_strategy": "steps", "save_steps": 4}
    cached(model_of(), tmp_path, tmp_path / "own", callbacks=[Stop(4)], **settings).train()
    model = model_of()
    trainer = cached(model, tmp_path, cache, **settings)
    with pytest.raises(CacheError, match="expected of this model") as error:
        trainer.train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)
    cached(model, tmp_path, tmp_path / "own", **settings).train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.parametrize(("tier", "kept"), [("disk", "checkpoint-6"), ("page", "checkpoint-4")])
def test_the_cache_is_gone_in_mid_run(tmp_path, tier, kept):
    """The error names a file; the last checkpoint loads, and with the cache made again the run ends
    as if nothing had been. (Batches are made one ahead: what a thread reads fails where it is used,
    what is read at once where it is made.)
    """
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 12}
    whole = model_of()
    cached(whole, tmp_path / "whole", tmp_path / "cache", **settings).train()

    class Gone(Stop):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                shutil.rmtree(tmp_path / "cache")
                trainer.open_cache()._reader.files.close()

    cache_model = model_of()
    cache = ActivationCache.open(tmp_path / "cache", cache_model, store="fp32", tier=tier)
    trainer = cached(cache_model, tmp_path / "run", cache, callbacks=[Gone(5)], **settings)
    with pytest.raises(CacheError, match=r"safetensors is missing, expected a file"):
        trainer.train()
    last = get_last_checkpoint(str(tmp_path / "run"))
    assert last.endswith(kept)
    model = model_of(seed=8)
    again = cached(model, tmp_path / "run", tmp_path / "cache", **settings)
    with counted(model) as seen:
        again.train(resume_from_checkpoint=True)
    assert sum(seen) == 32
    assert_same(trained(model), trained(whole), atol=0, rtol=0)
