"""What LPTTrainer makes of data sets and collators: labels token by token, the token that is read,
and data that it refuses.
"""

from __future__ import annotations

import shutil

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

from lpt_fast import ActivationCache, LPTConfig, LPTTrainer
from lpt_fast.cache import CacheError
from lpt_fast.train.collators import find_readout
from tests.cache.cached_texts import counted
from tests.tiny import VOCAB, tiny
from tests.train.cases import K, Stop, arguments, cached, model_of, padded_labels, stock
from tests.train.test_trainer import assert_same, collate, rows, trained

CLOSE = {"atol": 1e-6, "rtol": 1e-4}


def with_labels(kind: str, n=16, seed=0) -> list[dict]:
    """Texts of unequal lengths with labels for a task: one a token, one in all, or places."""
    own = torch.Generator().manual_seed(seed + 100)
    out = []
    for row in rows(n, seed):
        size = len(row["input_ids"])
        at = int(torch.randint(1, size, (1,), generator=own))
        word = int(torch.randint(3, VOCAB, (1,), generator=own))
        labels = {
            "token": torch.randint(0, 2, (size,), generator=own).tolist(),
            "one": [word if i == at else -100 for i in range(size)],
            "answer": [-100] * 2 + row["input_ids"][2:],
        }
        if kind == "places":
            del row["labels"]
            out.append({**row, "start_positions": at, "end_positions": min(at + 1, size - 1)})
        else:
            out.append({**row, "labels": labels[kind]})
    return out


def both(tmp_path, family, kind, data, collator, **settings):
    """The same training on the text and from a cache: the models, and the Trainers."""
    models = [model_of(family, kind) for _ in range(2)]
    more = {"data_collator": collator, "eval_dataset": data[:7], "per_device_eval_batch_size": 4}
    more |= settings
    plain = stock(
        models[0], tmp_path / "a", data, **{n: v for n, v in more.items() if n != "readout_only"}
    )
    fast = cached(models[1], tmp_path / "b", tmp_path / "cache", data, **more)
    plain.train()
    fast.train()
    return models, plain, fast


# -- labels of tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "multiple"), [("right", 1), ("right", 8), ("left", 8)])
@pytest.mark.parametrize(
    ("family", "kind", "labels"),
    [("roberta", "TOKEN_CLS", "token"), ("bert", "MASKED_LM", "one"), ("llama", "CAUSAL_LM", "one"),
     ("gpt2", "CAUSAL_LM", "answer")],
)  # fmt: skip
def test_labels_stay_at_their_tokens(tmp_path, family, kind, labels, side, multiple):
    data = with_labels(labels)
    # (Below 1e-8 of gradient AdamW's default would turn its rounding into steps of any size.)
    how = {"adam_epsilon": 1e-6}
    models, plain, fast = both(tmp_path, family, kind, data, padded_labels(side, multiple), **how)
    if not (side == "left" and family != "llama"):  # the others' own positions count padding
        assert_same(trained(models[1]), trained(models[0]), **CLOSE)
        assert fast.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], 1e-4)
    got = fast.predict(data[:7])
    assert got.label_ids.shape[1] == max(len(row["input_ids"]) for row in data[:7])
    for line, row in zip(got.label_ids, data, strict=False):
        size = len(row["labels"])
        assert line[:size].tolist() == row["labels"] and (line[size:] == -100).all()


def test_question_answering(tmp_path):
    """Texts of one length: transformers' loss looks at padding too, which no cache keeps."""
    data = [row for row in with_labels("places", 40) if len(row["input_ids"]) == 6]
    models, plain, fast = both(tmp_path, "bert", "QUESTION_ANS", data, default_data_collator)
    assert fast.label_names == ["start_positions", "end_positions"]
    assert_same(trained(models[1]), trained(models[0]), **CLOSE)
    for a, b in zip(plain.predict(data).predictions, fast.predict(data).predictions, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)
    ragged = with_labels("places", 8)

    def left(examples):
        batch = padded_labels("left")([{**e, "labels": []} for e in examples])
        del batch["labels"]
        names = ("start_positions", "end_positions")
        return batch | {name: torch.tensor([e[name] for e in examples]) for name in names}

    fast.data_collator = left
    with pytest.raises(ValueError, match="pads on the left and the labels are places"):
        fast.evaluate(ragged)


def test_labels_of_padding_are_refused(tmp_path):
    data = with_labels("token")
    fill = padded_labels()

    def zeros(examples):
        batch = fill(examples)
        return batch | {"labels": batch["labels"].clamp(min=0)}

    model = model_of("bert", "TOKEN_CLS")
    trainer = cached(model, tmp_path, tmp_path / "cache", data, data_collator=zeros)
    with pytest.raises(ValueError, match="padding the `labels` 0, expected -100"):
        trainer.train()


# -- the one token that is read --------------------------------------------------------------------


class Watch(LPTTrainer):
    """Notes what each step gives to the model."""

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        self.__dict__.setdefault("given", []).append(inputs)
        return inputs


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("family", "kind", "side"),
    [
        ("bert", "MASKED_LM", "right"),
        ("llama", "CAUSAL_LM", "right"),
        ("llama", "CAUSAL_LM", "left"),
    ],
)
def test_readout(tmp_path, family, kind, side, use_cache):
    """One label each: training and loss are those of all logits, and only one token has some."""
    data = with_labels("one")
    collator = padded_labels(side)
    models = [model_of(family, kind) for _ in range(2)]
    plain = stock(models[0], tmp_path, data, data_collator=collator)
    plain.train()
    more = {"activation_cache": tmp_path / "c"} if use_cache else {}
    if use_cache:
        ActivationCache.open(tmp_path / "c", models[1], store="fp32").ensure(models[1], data)
    fast = Watch(models[1], arguments(tmp_path), collator, data, data, readout_only=True, **more)
    fast.train()
    for inputs in fast.given:
        causal = int(kind == "CAUSAL_LM")
        batch = inputs.get("cached_hidden")
        ids = batch.pad(batch.input_ids) if batch is not None else inputs["input_ids"]
        assert inputs["readout"].shape == (len(ids),)
        for i, place in enumerate(inputs["readout"]):
            shift = 0 if batch is not None else int((inputs["attention_mask"][i] == 0).sum())
            at = int((inputs["labels"][i] != -100).nonzero())
            assert place == at - causal - (shift if side == "left" else 0)
    assert_same(trained(models[1]), trained(models[0]), **CLOSE)
    slow, quick = plain.predict(data), fast.predict(data)
    assert quick.predictions.shape == (16, 1, VOCAB) and quick.label_ids.shape == (16, 1)
    for i, row in enumerate(data):
        label = next(j for j, y in enumerate(row["labels"]) if y != -100)
        assert quick.label_ids[i, 0] == row["labels"][label]
        column = int((slow.label_ids[i] != -100).argmax()) - causal
        np.testing.assert_allclose(quick.predictions[i, 0], slow.predictions[i, column], atol=1e-4)
    fast.readout_only = False
    assert fast.predict(data).predictions.shape[1] > 1
    fast.given.clear()
    fast.evaluate()  # the loss alone
    assert all("readout" in inputs for inputs in fast.given)


def test_readout_is_for_one_label_and_the_models_own_loss(tmp_path):
    def given(settings=None, cls=Watch, labels="one", **more):
        model = model_of("gpt2", "CAUSAL_LM")
        args = arguments(tmp_path, max_steps=2, **settings or {})
        data = with_labels(labels)
        trainer = cls(model, args, padded_labels(), data, activation_cache=tmp_path / "c", **more)
        trainer.train()
        return ["readout" in inputs for inputs in trainer.given]

    class OwnLoss(Watch):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.mean()

    assert given() == [True, True]
    assert given(labels="answer") == [False, False]
    assert given(cls=OwnLoss) == [False, False]
    assert given(compute_loss_func=loss) == [False, False]
    with pytest.warns(UserWarning, match="answer included"):
        assert given({"label_smoothing_factor": 0.1}) == [False, False]
    with pytest.raises(ValueError, match="`readout_only` is True for GPT2LMHeadModel"):
        given({"label_smoothing_factor": 0.1}, readout_only=True)
    with pytest.raises(ValueError, match="`readout_only` is True for BertForSequence"):
        cached(model_of(), tmp_path, tmp_path / "c", readout_only=True)
    trainer = Watch(
        model_of("gpt2", "CAUSAL_LM"), arguments(tmp_path), padded_labels(), readout_only=True
    )
    with pytest.raises(ValueError, match="not exactly one label"):
        trainer.predict(with_labels("answer"))


def test_find_readout():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    none = torch.full((2, 5), -100)

    def labels(*places):
        return none.index_put((torch.arange(2), torch.tensor(places)), torch.tensor(7))

    assert find_readout(labels(4, 1), mask, False).tolist() == [2, 1]
    assert find_readout(labels(4, 1), mask, True).tolist() == [1, 0]
    assert find_readout(labels(2, 1), mask, True) is None  # nothing comes before the first token
    assert find_readout(labels(4, 4), mask, False) is None  # a label of padding
    assert find_readout(none, mask, False) is None
    assert find_readout(torch.tensor([1, 0]), mask, False) is None
    assert find_readout(None, mask, False) is None


# -- kinds of data sets ----------------------------------------------------------------------------


class Items(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


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
    stock(models[0], tmp_path, data_collator=collator, train_dataset=data, **settings).train()
    settings |= {"data_collator": collator, "train_dataset": made[kind]}
    cached(models[1], tmp_path, tmp_path / "cache", **settings).train()
    assert_same(trained(models[1]), trained(models[0]), **CLOSE)


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


def test_the_cache_is_gone_in_mid_run(tmp_path):
    """The error names a file; the last checkpoint loads, and with the cache made again the run ends
    as if nothing had been.
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
    cache = ActivationCache.open(tmp_path / "cache", cache_model, store="fp32", tier="page")
    trainer = cached(cache_model, tmp_path / "run", cache, callbacks=[Gone(5)], **settings)
    with pytest.raises(CacheError, match=r"safetensors is missing, expected a file"):
        trainer.train()
    last = get_last_checkpoint(str(tmp_path / "run"))
    assert last.endswith("checkpoint-6")  # whose batch had been read before
    model = model_of(seed=8)
    again = cached(model, tmp_path / "run", tmp_path / "cache", **settings)
    with counted(model) as seen:
        again.train(resume_from_checkpoint=True)
    assert sum(seen) == 32
    assert_same(trained(model), trained(whole), atol=0, rtol=0)
