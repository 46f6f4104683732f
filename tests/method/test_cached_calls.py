"""Calls with hidden states from elsewhere: they do not mix, and what cannot be is refused."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers as tf

from lpt_fast.packing import PackedBatch
from tests.adapters import stir
from tests.method.cases import (
    M,
    adapted,
    cached,
)
from tests.tiny import CONFIGS, PAD, batch, tiny
from tests.train.cases import assert_same, collate, new_model, rows, trained, trainer_for

# -- calls do not mix ------------------------------------------------------------------------------


def test_threads_do_not_mix_batches():
    base, model = adapted("gpt2", "CAUSAL_LM", task="CAUSAL_LM")
    inputs = [batch(seed=1), batch(seed=2)]
    # Without ids: what took the wrong way would not find the text there.
    calls = [{"cached_hidden": cached(base, i, ids=False)} for i in inputs]
    with torch.no_grad():
        expected = [model(**i).logits for i in inputs]
    barrier = threading.Barrier(2)

    def meet(*_):
        barrier.wait()

    model.get_base_model().register_forward_pre_hook(meet)
    got = [None, None]

    def work(i):
        with torch.no_grad():
            got[i] = model(**calls[i]).logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    at = inputs[0]["attention_mask"].bool()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a[at], b[at], atol=1e-5, rtol=1e-5)


def test_nothing_is_left_for_the_next_call():
    base, model = adapted("gpt2", "CAUSAL_LM", task="CAUSAL_LM")
    inputs, call = batch("none"), {"cached_hidden": cached(base, batch(seed=2))}
    root = model.get_base_model()
    expected = root.transformer(**inputs).last_hidden_state
    late = root.transformer.late_prompt

    def check():
        assert not late.context._calls
        torch.testing.assert_close(root.transformer(**inputs).last_hidden_state, expected)

    model(**call)
    check()
    with pytest.raises(ValueError):  # in the backbone
        model(**call, context_lengths=torch.full((5,), 99))
    check()
    with pytest.raises(ValueError):  # in the checks
        model(**call, **inputs)
    check()

    def fail(*_):
        raise RuntimeError("before the backbone")

    handle = root.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="before the backbone"):
        model(**call)
    handle.remove()
    check()
    twin = copy.deepcopy(model)
    stir(twin)
    del model
    assert not torch.allclose(twin(**call).logits[:, 0], root(**call).logits[:, 0], atol=1e-3)


# -- refusals --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    base, model = adapted("gpt2", "CAUSAL_LM", task="CAUSAL_LM")
    return model, cached(base, batch())


def changed(packed, **more):
    fields = ("hidden", "cu_seqlens", "max_seqlen")
    return PackedBatch(**{**{n: getattr(packed, n) for n in fields}, **more})


REFUSED = {
    "`input_ids` together with `cached_hidden`, expected one": {"input_ids": torch.ones(5, 9)},
    "`inputs_embeds` together": {"inputs_embeds": torch.ones(5, 9, 32)},
    "`attention_mask` together": {"attention_mask": torch.ones(5, 9)},
    "`position_ids` together": {"position_ids": torch.ones(5, 9)},
    "`use_cache` together with `cached_hidden`, expected no KV cache": {"use_cache": True},
    "`cache` together": {"cache": tf.DynamicCache()},
    "`past_key_values` together": {"past_key_values": tf.DynamicCache()},
    "output_hidden_states=True together .*expected False.*or give the text": {
        "output_hidden_states": True
    },
    "output_attentions=True together": {"output_attentions": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_come_with_a_batch(lm, message):
    model, packed = lm
    with pytest.raises(ValueError, match=message):
        model(cached_hidden=packed, **REFUSED[message])
    nothing = dict.fromkeys(REFUSED[message])
    expected = model(cached_hidden=packed).logits
    assert torch.equal(model(cached_hidden=packed, **nothing).logits, expected)
    if message.startswith("`use_cache"):
        assert model(cached_hidden=packed, use_cache=False).past_key_values is None


def test_positional_arguments(lm):
    model, packed = lm
    with pytest.raises(ValueError, match="`input_ids` together with `cached_hidden`"):
        model(batch()["input_ids"], cached_hidden=packed)
    with pytest.raises(ValueError, match="`input_ids` together with `cached_hidden`"):
        model.base_model(batch()["input_ids"], cached_hidden=packed)
    got = model.base_model(None, None, cached_hidden=packed).logits
    assert torch.equal(got, model(cached_hidden=packed).logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b: torch.ones(5, 9, 32), r"is a Tensor, expected a PackedBatch; lpt_fast.packing"),
        (lambda b: changed(b, layer=3), "output of layer 3, expected that of layer 2"),
        (
            lambda b: changed(b, hidden=b.hidden[:, :16]),
            "rows of 16 torch.float32, expected the model's hidden size 32",
        ),
        (lambda b: changed(b, hidden=b.hidden.char()), "rows of 32 torch.int8, expected"),
        (
            lambda b: PackedBatch(torch.ones(0, 32), torch.zeros(1, dtype=torch.int32), 0),
            "holds no text, expected at least one",
        ),
    ],
)
def test_batches_that_do_not_fit(lm, make, message):
    model, packed = lm
    with pytest.raises(ValueError, match=message):
        model(cached_hidden=make(packed))
    model(cached_hidden=changed(packed, layer=2))


def test_hidden_states_and_attentions_of_the_config(lm):
    model, packed = lm
    config = model.get_base_model().config
    config.output_hidden_states = True
    try:
        with pytest.raises(ValueError, match="output_hidden_states=True together"):
            model(cached_hidden=packed)
        model(cached_hidden=packed, output_hidden_states=False)
    finally:
        config.output_hidden_states = False


def test_the_base_model_needs_the_text(lm):
    model, packed = lm
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="no late prompt is active, expected the text"),
    ):
        model(cached_hidden=packed)
    with pytest.raises(ValueError, match=r"generate\(\) got `cached_hidden`, expected the text"):
        model.generate(cached_hidden=packed, max_new_tokens=2)
    with pytest.raises(ValueError, match="GPT2Model got .*the whole model, GPT2LMHeadModel"):
        model.get_base_model().transformer(cached_hidden=packed)
    assert model(cached_hidden=None, **batch()).logits.shape == (5, 9, 99)


@pytest.mark.slow
def test_heads_that_need_more_than_states():
    for head in (tf.T5ForSequenceClassification, tf.T5ForQuestionAnswering):
        base, model = adapted("t5", base=head(tf.T5Config(**CONFIGS["t5"])).eval())
        with pytest.raises(ValueError, match=f"{head.__name__} got .* without input_ids"):
            model(cached_hidden=cached(base, batch(), ids=False))
    base, model = adapted("bert", base=tf.BertForMultipleChoice(tiny("bert").config).eval())
    with pytest.raises(ValueError, match="the number of choices"):
        model(cached_hidden=cached(base, batch()))


def test_a_batch_is_checked_by_its_guard(lm):
    model, packed = lm
    seen = []
    late = model.get_base_model().transformer.late_prompt
    model(cached_hidden=packed)
    guarded = changed(packed, guard=lambda *call: seen.append(call))
    model(cached_hidden=guarded)
    assert seen == [(late, guarded)]


# -- the stock Trainer -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_trainer(family, tmp_path):
    """Training, evaluation and prediction on batches of states equal those on texts."""
    base = tiny(family, "SEQ_CLS")

    def collate_cached(examples):
        inputs = collate(examples)
        return {"cached_hidden": cached(base, inputs), "labels": inputs["labels"]}

    ends, metrics, predictions = [], [], []
    for collator in (collate, collate_cached):
        model = new_model(family)
        before = trained(model)
        trainer = trainer_for(model, tmp_path, remove_unused_columns=False, max_steps=6)
        trainer.data_collator = collator
        trainer.train()
        ends.append(trained(model))
        metrics.append(trainer.evaluate())
        predictions.append(torch.as_tensor(trainer.predict(rows(10, 1)).predictions))
    assert_same(*ends, atol=1e-5, rtol=1e-4)
    assert all(not torch.equal(before[n], p) for n, p in ends[1].items() if "bias" not in n)
    assert metrics[0]["eval_accuracy"] == metrics[1]["eval_accuracy"]
    assert abs(metrics[0]["eval_loss"] - metrics[1]["eval_loss"]) < 1e-5
    torch.testing.assert_close(*predictions, atol=1e-4, rtol=1e-4)


def test_padding_rows_hold_zeros():
    """What no mask keeps a head from reading is at least the same in every batch."""
    base, model = adapted("bert")
    packed = cached(base, batch(), room=M)
    late = model.get_base_model().late_prompt
    late.upper = "padded"
    seen = []
    late.lpt_generator["default"].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(cached_hidden=packed)
    padding = batch()["attention_mask"] == 0
    assert not seen[0][padding].any() and seen[0].isfinite().all()
    assert batch()["input_ids"][padding].eq(PAD).all()
