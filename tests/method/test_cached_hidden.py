"""`model(cached_hidden=batch)` against the run on the text, whose layers 1..k it leaves out.

The hidden states of a batch come from the unsplit model, which read each text alone and unpadded.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

from lpt_fast.backbone.families import find_backbone
from tests.adapters import lpt, needs_own_adapters
from tests.method.cases import (
    M,
    adapted,
    assert_equal_runs,
    cached,
    run,
    text_batch,
)
from tests.oracle import layer_list
from tests.tiny import CAUSAL, CONFIGS, FAMILIES, LAYERS, batch, tiny
from tests.train.cases import assert_same, trained


@pytest.mark.slow
@pytest.mark.parametrize(("k", "generator"), [(1, "appg"), (2, "npg"), (3, "mppg")])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, k, generator):
    base, model = adapted(family, k=k, generator=generator)
    inputs = batch()
    at = inputs["attention_mask"].bool()
    expected = run(model, at, **inputs)
    for room in (0, M):
        assert_equal_runs(run(model, at, cached_hidden=cached(base, inputs, k, room)), expected)
    # The batch must matter, or the comparison says nothing.
    other = cached(base, batch(seed=2), k)
    assert not torch.allclose(run(model, at, cached_hidden=other)[0], expected[0], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["static", "npg", "appg", "mppg", "attention", "residual"])
@pytest.mark.parametrize("family", ["roberta", "mpnet", "gpt2"])
def test_every_generator_without_padding(family, generator):
    base, model = adapted(family, generator=generator, num_virtual_tokens=5)
    inputs = batch("none")
    call = {"cached_hidden": cached(base, inputs)}
    assert_equal_runs(run(model, **call), run(model, **inputs))
    assert_equal_runs(run(model, **call), run(model, input_ids=inputs["input_ids"]))


def labels_for(family, task, inputs):
    """Labels of each task type, and where its logits are to be compared (None: everywhere)."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    if task == "SEQ_CLS":
        return {"labels": torch.tensor([0, 1, 0, 1, 1])}, None
    if task == "TOKEN_CLS":
        return {"labels": (ids % 2).masked_fill(~mask, -100)}, mask
    if task == "QUESTION_ANS":
        start, end = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 2, 3, 0, 2])
        return {"start_positions": start, "end_positions": end}, None
    if task == "SEQ_2_SEQ_LM":
        return {"labels": torch.arange(20).view(5, 4) + 3}, None
    labels = ids.masked_fill(~mask, -100)
    if task == "CAUSAL_LM":  # contexts of 4, 4, 4, 1, 3 tokens
        labels[:, :4] = -100
        return {"labels": labels}, mask
    return {"labels": labels.masked_fill(ids % 3 > 0, -100)}, mask  # MASKED_LM


TASKS = [
    *((family, "SEQ_CLS") for family in FAMILIES),
    *(
        (family, "TOKEN_CLS")
        for family in ("bert", "mpnet", "deberta-v2", "modernbert", "gpt2", "t5")
    ),
    *(
        (family, "QUESTION_ANS")
        for family in ("bert", "mpnet", "modernbert", "gpt2", "llama", "t5")
    ),
    *((family, "CAUSAL_LM") for family in CAUSAL),
    *((family, "MASKED_LM") for family in ("bert", "roberta", "mpnet", "modernbert")),
    ("t5", "SEQ_2_SEQ_LM"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task"), TASKS)
def test_every_task_type(family, task):
    """Through PEFT's own wrapper of each, with labels: output, loss and all gradients."""
    base, model = adapted(family, task, task=task if task != "MASKED_LM" else None)
    inputs = text_batch(family)
    if task == "QUESTION_ANS":
        # Transformers' loss looks for answers among padding rows too, which the batch does not
        # have.
        inputs = batch("none")
    labels, at = labels_for(family, task, inputs)
    call = {"cached_hidden": cached(base, inputs, room=M), **labels}
    assert_equal_runs(run(model, at, **call), run(model, at, **inputs, **labels))


def test_question_answering_with_padding():
    """Without labels; the loss would read padding."""
    base, model = adapted("bert", "QUESTION_ANS", task="QUESTION_ANS")
    inputs = batch()
    at = inputs["attention_mask"].bool()
    got = run(model, at, cached_hidden=cached(base, inputs))
    assert_equal_runs(got, run(model, at, **inputs))


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", None])
def test_bare_backbone_under_peft(task):
    base, model = adapted("bert", task=task)
    inputs = batch()
    got, expected = model(cached_hidden=cached(base, inputs)), model(**inputs)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)
    by_tuner = model.base_model(cached_hidden=cached(base, inputs), return_dict=False)
    torch.testing.assert_close(by_tuner[1], expected.pooler_output, atol=1e-5, rtol=1e-5)


@needs_own_adapters
def test_through_transformers_own_adapter_methods():
    base = tiny("bert", "SEQ_CLS")
    model = copy.deepcopy(base)
    model.add_adapter(lpt(), "mine")
    inputs, call = batch(), {"cached_hidden": cached(base, batch())}
    got, expected = model.eval()(**call).logits, model(**inputs).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, base(**inputs).logits, atol=1e-3)
    model.disable_adapters()
    with pytest.raises(ValueError, match="no late prompt is active"):
        model(**call)


def test_encoder_decoder_without_a_head():
    base, model = adapted("t5", base=tf.T5Model(tf.T5Config(**CONFIGS["t5"])).eval())
    inputs, more = batch(), {"decoder_input_ids": torch.arange(10).view(5, 2)}
    got = run(model, cached_hidden=cached(base, inputs), use_cache=True, **more)
    assert_equal_runs(got, run(model, **inputs, **more))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_context_lengths(family):
    base, model = adapted(family, "CAUSAL_LM", task="CAUSAL_LM", generator="appg")
    inputs, more = batch(), {"context_lengths": torch.tensor([5, 4, 1, 1, 2])}
    at = inputs["attention_mask"].bool()
    call = {"cached_hidden": cached(base, inputs)}
    got = run(model, at, **call, **more)
    assert_equal_runs(got, run(model, at, **inputs, **more))
    assert not torch.allclose(got[0], run(model, at, **call)[0], atol=1e-4)
    with pytest.raises(ValueError, match=r"got \[9, 5, 1, 1, 1\] for \[9, 4, 7, 1, 3\] tokens"):
        model(**call, context_lengths=torch.tensor([9, 5, 1, 1, 1]))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_last_token_where_padding_is_the_end_token(family):
    """Heads look for the last id that is not padding: for the batch's ids, not for its mask."""
    base, model = adapted(family, base=tiny(family, "SEQ_CLS", pad_token_id=2), task="SEQ_CLS")
    inputs, labels = batch(), {"labels": torch.tensor([0, 1, 0, 1, 1])}
    inputs["input_ids"][0, -1] = inputs["input_ids"][2, 6] = 2
    inputs["input_ids"].masked_fill_(inputs["attention_mask"] == 0, 2)
    expected = run(model, **inputs, **labels)
    assert_equal_runs(run(model, cached_hidden=cached(base, inputs), **labels), expected)
    without = model(cached_hidden=cached(base, inputs, ids=False)).logits
    torch.testing.assert_close(without[[1, 3, 4]], expected[0][[1, 3, 4]], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(without[[0, 2]], expected[0][[0, 2]], atol=1e-3)


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "SEQ_CLS"), ("llama", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM")]
)
def test_without_ids(family, task):
    base, model = adapted(family, task, task=task)
    inputs = text_batch(family)
    labels, _ = labels_for(family, task, inputs)
    got = run(model, cached_hidden=cached(base, inputs, ids=False), **labels)
    assert_equal_runs(got, run(model, **inputs, **labels))


@pytest.mark.parametrize("family", ["llama", "modernbert"])
def test_positions_of_the_batch(family):
    base, model = adapted(family)
    inputs = batch()
    at = inputs["attention_mask"].bool()
    positions = (torch.arange(9) * 2).repeat(5, 1)
    call = {"cached_hidden": cached(base, inputs, room=M, positions=positions)}
    got = run(model, at, **call)
    assert_equal_runs(got, run(model, at, **inputs, position_ids=positions))
    assert not torch.allclose(got[0], run(model, at, **inputs)[0], atol=1e-3)


# -- the layers below, modes and dtypes ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_below_the_insertion_runs(family, k):
    base, model = adapted(family, k=k)
    call = {"cached_hidden": cached(base, batch(), k)}
    backbone = find_backbone(model.get_base_model())[1]

    def fail(module, args):
        raise AssertionError(f"{type(module).__name__} ran")

    layers = layer_list(backbone)
    for module in (backbone.get_input_embeddings(), *layers[:k]):
        module.register_forward_pre_hook(fail)
    ran = []
    for layer in layers[k:]:
        layer.register_forward_pre_hook(lambda *a: ran.append(1))
    model.train()(**call)
    assert len(ran) == LAYERS - k
    with pytest.raises(AssertionError, match="ran"):
        model(**batch())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("setting", ["checkpointing", "upper_dropout"])
def test_modes(family, setting):
    """The same draws of dropout too, for nothing below ever draws."""
    base = tiny(family)
    call = {"cached_hidden": cached(base, batch())}
    if setting == "checkpointing":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, model = adapted(family, base=base, upper_dropout=setting == "upper_dropout")
    model.train()
    at, results = batch()["attention_mask"].bool(), []
    for given in (batch(), call):
        torch.manual_seed(5)
        results.append(run(model, at, **given))
    assert_equal_runs(*reversed(results))


def test_two_steps_of_training():
    base = tiny("gpt2", "CAUSAL_LM")
    inputs = batch()
    labels, _ = labels_for("gpt2", "CAUSAL_LM", inputs)
    ends = []
    for given in (inputs, {"cached_hidden": cached(base, inputs)}):
        _, model = adapted("gpt2", base=base, task="CAUSAL_LM", prompt_dropout=0.1)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(1)
        for _ in range(2):
            optimizer.zero_grad()
            model(**given, **labels).loss.backward()
            optimizer.step()
        ends.append(trained(model))
    assert_same(*ends, atol=1e-5, rtol=1e-4)
    moved = adapted("gpt2", base=base, task="CAUSAL_LM")[1]
    assert not torch.allclose(*(next(iter(t.values())) for t in (ends[0], trained(moved))))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_dtypes(family):
    """A bf16 store is widened under an fp32 model, an fp32 one is rounded under a bf16 model."""
    base, model = adapted(family)
    packed = cached(base, batch())
    half = packed.to(torch.bfloat16)
    at = batch()["attention_mask"].bool()
    got = run(model, at, cached_hidden=half)
    assert got[0].dtype == torch.float32
    assert_equal_runs(got, run(model, at, cached_hidden=half.to(torch.float32)))
    exact = model(**batch()).last_hidden_state[at]
    assert 0 < (got[0] - exact).abs().max() < 0.1 * exact.abs().max()
    small = model.to(torch.bfloat16)
    outs = [small(cached_hidden=b).last_hidden_state for b in (packed, half)]
    assert outs[0].dtype == torch.bfloat16 and torch.equal(*outs)


@pytest.mark.slow
def test_compiled():
    base, model = adapted("bert", "SEQ_CLS", task="SEQ_CLS")
    compiled = torch.compile(model, backend="eager")
    for seed in (1, 2):
        got = compiled(cached_hidden=cached(base, batch(seed=seed))).logits
        torch.testing.assert_close(got, model(**batch(seed=seed)).logits, atol=1e-5, rtol=1e-5)
