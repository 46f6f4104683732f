"""LPTTrainer with labels of tokens, and with the one token that is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import default_data_collator

from lpt_fast import ActivationCache, LPTTrainer
from lpt_fast.train.collators import find_readout
from tests.tiny import VOCAB
from tests.train.cases import (
    CLOSE,
    arguments,
    assert_same,
    both,
    cached,
    model_of,
    padded_labels,
    stock,
    trained,
    with_labels,
)

# -- labels of tokens ------------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
