"""Heads and losses of every task type, contexts of decoders, and generation."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from lpt_fast import LPTConfig
from lpt_fast.backbone.families import find_backbone
from tests.oracle import late_prompt_by_hand
from tests.tiny import CAUSAL, batch, tiny

ENCODERS = ["bert", "roberta", "electra", "mpnet", "deberta", "deberta-v2", "modernbert"]
M = 3


def adapted(family, kind, task, **more):
    base = tiny(family, kind)
    torch.manual_seed(11)
    settings = {"generator": "npg", "bottleneck_size": 6, "num_virtual_tokens": M}
    settings |= {"prompt_dropout": 0.0, **more}
    model = get_peft_model(copy.deepcopy(base), LPTConfig(task_type=task, **settings)).eval()
    return base, model


def generator_weights(model) -> dict:
    late = find_backbone(model.get_base_model())[1].late_prompt
    return dict(late.lpt_generator["default"].named_parameters())


@pytest.mark.parametrize("family", [*ENCODERS, *CAUSAL, "t5"])
def test_sequence_classification(family):
    _, model = adapted(family, "SEQ_CLS", "SEQ_CLS", generator="appg")
    inputs, labels = batch(), torch.tensor([0, 1, 0, 1, 1])
    if family == "t5":
        ends = inputs["attention_mask"].sum(1) - 1
        inputs["input_ids"][torch.arange(5), ends] = 1  # T5 classifies at its end token
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    out.loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_the_head_reads_the_text_and_not_the_prompt(family):
    """Logits of the whole model equal the base model's head on the independently computed
    states.
    """
    base, model = adapted(family, "SEQ_CLS", "SEQ_CLS", insertion_layer=2)
    inputs = batch()
    weights = {n: p.detach() for n, p in generator_weights(model).items()}
    with torch.no_grad():
        backbone = find_backbone(base)[1]
        states = late_prompt_by_hand(backbone, 2, "npg", weights, M, inputs)
        pooled = base.bert.pooler(states) if family == "bert" else states
        torch.testing.assert_close(
            model(**inputs).logits, base.classifier(pooled), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("family", ["bert", "mpnet", "deberta-v2", "modernbert", "gpt2", "qwen2"])
def test_token_classification(family):
    _, model = adapted(family, "TOKEN_CLS", "TOKEN_CLS")
    inputs = batch()
    labels = torch.randint(0, 2, inputs["input_ids"].shape).masked_fill(
        inputs["attention_mask"] == 0, -100
    )
    out = model(**inputs, labels=labels)
    assert out.logits.shape == (5, 9, 2)
    torch.testing.assert_close(
        out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    )
    # Labels of tokens are no answer that the prompt could give away: it is made from all tokens
    # with and without.
    torch.testing.assert_close(out.logits, model(**inputs).logits)


@pytest.mark.parametrize("family", ["bert", "electra", "mpnet", "gpt2", "llama"])
def test_question_answering(family):
    _, model = adapted(family, "QUESTION_ANS", "QUESTION_ANS")
    start, end = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 2, 3, 0, 2])
    out = model(**batch("none"), start_positions=start, end_positions=end)
    expected = (F.cross_entropy(out.start_logits, start) + F.cross_entropy(out.end_logits, end)) / 2
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()


def test_cloze():
    base, model = adapted("roberta", "MASKED_LM", None)
    inputs = batch()
    weights = {n: p.detach() for n, p in generator_weights(model).items()}
    with torch.no_grad():
        states = late_prompt_by_hand(base.roberta, 2, "npg", weights, M, inputs)
        tokens = inputs["attention_mask"].bool()
        got, expected = model(**inputs).logits, base.lm_head(states)
        torch.testing.assert_close(got[tokens], expected[tokens], atol=1e-5, rtol=1e-5)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, 1] = 7
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, 1], torch.full((5,), 7)))


def test_seq2seq():
    base, model = adapted("t5", "SEQ_2_SEQ_LM", "SEQ_2_SEQ_LM")
    inputs = batch("left")
    labels = torch.randint(3, 90, (5, 4))
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(
        out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    )
    weights = {n: p.detach() for n, p in generator_weights(model).items()}
    with torch.no_grad():
        states = late_prompt_by_hand(base.encoder, 2, "npg", weights, M, inputs)
        expected = base(
            encoder_outputs=(states,), attention_mask=inputs["attention_mask"], labels=labels
        ).logits
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
    # Greedy generation equals asking for one token after the other.
    got = model.generate(**inputs, max_new_tokens=5, do_sample=False, min_new_tokens=5)
    ids = torch.zeros(5, 1, dtype=torch.long)
    for _ in range(5):
        logits = model(**inputs, decoder_input_ids=ids).logits[:, -1]
        logits[:, 1] = float("-inf")  # min_new_tokens: no end token
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert got.tolist() == ids.tolist()


# -- contexts of decoders --------------------------------------------------------------------------


def context_batch(side):
    """Texts of 9, 4, 7, 1, 3 tokens with contexts of 5, 4, 1, 1, 2."""
    inputs = batch(side)
    return inputs, torch.tensor([5, 4, 1, 1, 2])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("generator", ["npg", "appg", "mppg", "attention"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_context_lengths(family, generator, side):
    base, model = adapted(family, "CAUSAL_LM", "CAUSAL_LM", generator=generator, insertion_layer=2)
    inputs, context = context_batch(side)
    mask = inputs["attention_mask"].bool()
    readable = mask & (mask.cumsum(1) <= context[:, None])
    weights = {n: p.detach() for n, p in generator_weights(model).items()}
    with torch.no_grad():
        backbone = find_backbone(base)[1]
        states = late_prompt_by_hand(backbone, 2, generator, weights, M, inputs, readable)
        expected = base.lm_head(states)
        got = model(**inputs, context_lengths=context).logits
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-5, rtol=1e-5)
    # From labels: the attended positions before the first label that counts.
    labels = inputs["input_ids"].masked_fill(readable | ~mask, -100)
    with torch.no_grad():
        from_labels = model(**inputs, labels=labels).logits
    torch.testing.assert_close(from_labels[mask], expected[mask], atol=1e-5, rtol=1e-5)
    # With neither: everything attended.
    with torch.no_grad():
        states = late_prompt_by_hand(backbone, 2, generator, weights, M, inputs, mask)
        torch.testing.assert_close(
            model(**inputs).logits[mask], base.lm_head(states)[mask], atol=1e-5, rtol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("generator", ["npg", "appg", "mppg"])
def test_the_answer_never_reaches_the_prompt(family, generator):
    """Change a token of the answer: no logit before it moves."""
    _, model = adapted(family, "CAUSAL_LM", "CAUSAL_LM", generator=generator)
    inputs = batch("none")
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    with torch.no_grad():
        before = model(**inputs, labels=labels).logits
        inputs["input_ids"][:, 6] = (inputs["input_ids"][:, 6] + 1) % 99
        after = model(**inputs, labels=labels).logits
    torch.testing.assert_close(before[:, :6], after[:, :6], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-4)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ([0, 1, 1, 1, 1], r"between 1 and the number of attended tokens.*got \[0, 1, 1, 1, 1\]"),
        ([9, 5, 1, 1, 1], r"got \[9, 5, 1, 1, 1\] for \[9, 4, 7, 1, 3\] tokens"),
        ([1.5, 1.0, 1.0, 1.0, 1.0], "must be whole numbers, got torch.float32"),
        ([1, 1], r"one number for each of the 5 examples, got the shape \(2,\)"),
    ],
)
def test_wrong_context_lengths(context, message):
    _, model = adapted("gpt2", "CAUSAL_LM", "CAUSAL_LM")
    with pytest.raises(ValueError, match=message):
        model(**batch(), context_lengths=torch.tensor(context))


def test_labels_without_a_context():
    _, model = adapted("gpt2", "CAUSAL_LM", "CAUSAL_LM")
    inputs = batch("none")
    with pytest.raises(ValueError, match="expected a context.*-100.*context_lengths"):
        model(**inputs, labels=inputs["input_ids"])


# -- generation ------------------------------------------------------------------------------------


def step_by_step(model, inputs, steps):
    """Greedy decoding without a cache: each step recomputes everything, the prompt from the
    first text alone.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    context = mask.sum(1)
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, context_lengths=context
        ).logits[:, -1]
        logits[:, 2] = float("-inf")  # no end token
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("generator", ["npg", "mppg"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("family", CAUSAL)
def test_generate(family, k, generator):
    """Batched, left-padded, greedy, past the sliding window: with a cache equals step-by-step
    recomputation.
    """
    _, model = adapted(family, "CAUSAL_LM", "CAUSAL_LM", insertion_layer=k, generator=generator)
    inputs = batch("left")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = step_by_step(model, inputs, 8)
    got = model.generate(**inputs, **settings)
    assert got.tolist() == expected.tolist()
    uncached = model.generate(**inputs, **settings, use_cache=False)
    assert uncached.tolist() == expected.tolist()
    with model.disable_adapter():
        assert model.generate(**inputs, **settings).tolist() != expected.tolist()


@pytest.mark.slow
@torch.no_grad()
def test_logits_of_cached_steps():
    """Not only the arg-max: the logits of a cached step equal those of a run over everything."""
    _, model = adapted("llama", "CAUSAL_LM", "CAUSAL_LM", insertion_layer=2)
    inputs = batch("left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    first = model(**inputs, position_ids=positions, use_cache=True)
    assert [layer.get_seq_length() for layer in first.past_key_values.layers] == [
        9,
        9,
        9 + M,
        9 + M,
    ]
    token = torch.full((5, 1), 7)
    mask = torch.cat([inputs["attention_mask"], torch.ones(5, 1, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    step = model(
        input_ids=token,
        attention_mask=mask,
        position_ids=positions[:, -1:],
        past_key_values=first.past_key_values,
    ).logits[:, 0]
    whole = model(
        input_ids=torch.cat([inputs["input_ids"], token], 1),
        attention_mask=mask,
        position_ids=positions,
        context_lengths=inputs["attention_mask"].sum(1),
    ).logits[:, -1]
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_beam_search_and_sampling():
    _, model = adapted("gpt2", "CAUSAL_LM", "CAUSAL_LM")
    inputs = batch("left")
    beams = model.generate(**inputs, max_new_tokens=5, num_beams=3, do_sample=False)
    uncached = model.generate(
        **inputs, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=False
    )
    assert beams.tolist() == uncached.tolist()
    torch.manual_seed(0)
    many = model.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert many.shape[0] == 10


@torch.no_grad()
def test_generate_from_given_context():
    _, model = adapted("gpt2", "CAUSAL_LM", "CAUSAL_LM")
    inputs = batch("none")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    whole = model.generate(**inputs, **settings)
    some = model.generate(**inputs, **settings, context_lengths=torch.full((5,), 2))
    again = model.generate(**inputs, **settings, context_lengths=torch.full((5,), 9))
    assert whole.tolist() == again.tolist() != some.tolist()


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused():
    base, model = adapted("llama", "CAUSAL_LM", "CAUSAL_LM")
    inputs = batch("none")
    foreign = base(**inputs, use_cache=True).past_key_values
    step = {
        "input_ids": torch.full((5, 1), 7),
        "attention_mask": torch.ones(5, 10, dtype=torch.long),
    }
    with pytest.raises(ValueError, match="9 entries below the insertion and 9 above, expected 12"):
        model(**step, past_key_values=foreign)
    with pytest.raises(ValueError, match="static KV cache"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="`prompt_lookup_num_tokens`"):
        model.generate(**inputs, max_new_tokens=2, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="`guidance_scale`"):
        model.generate(**inputs, max_new_tokens=2, guidance_scale=1.5)
    with pytest.raises(ValueError, match="`assistant_model`"):
        model.generate(**inputs, max_new_tokens=2, assistant_model=base)
