"""The packed stack against the padded way: the same numbers, whatever is in the batch."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from lpt_fast.backbone.families import find_backbone
from lpt_fast.method.config import GENERATORS
from lpt_fast.packed import attention as packed_attention
from lpt_fast.packed.blocks import BLOCKS
from lpt_fast.packed.plan import Plan
from tests.adapters import lpt
from tests.method.cases import M, adapted, cached
from tests.packed.cases import HEADS, assert_same, labels_for, outcome, pair, still
from tests.tiny import CAUSAL, LAYERS, PAD, batch, tiny

ENCODERS = ["bert", "roberta", "xlm-roberta", "electra", "mpnet"]
DECODERS = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]
CASES = [
    *((family, head) for family in ENCODERS for head in [*HEADS, "MASKED_LM"]),
    *((family, head) for family in DECODERS for head in [*HEADS, "CAUSAL_LM"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, LAYERS - 1])
@pytest.mark.parametrize(("family", "head"), CASES)
def test_equals_the_padded_way(family, head, k):
    """Every family, head and place, on ragged texts padded on either side."""
    model = still(pair(family, head, k=k)[1])
    for side in ("right", "left"):
        inputs = batch(side)
        at = None if head == "SEQ_CLS" else inputs["attention_mask"].bool()
        if family in ENCODERS and head == "SEQ_CLS" and side == "left":
            continue  # a head that reads the first column reads padding: that runs padded
        if head == "QUESTION_ANS":
            inputs = batch("none")
            at = None
        call = {**inputs, **labels_for(head, inputs)}
        if head == "base":
            call |= {"use_cache": False} if family in DECODERS else {}
        expected = outcome(model, "padded", at, **call)
        got = outcome(model, "packed", at, **call)
        assert_same(got, expected)
        if expected[1] is not None:
            torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "llama"])
@pytest.mark.parametrize("k", [1, LAYERS - 1])
def test_every_generator_from_text_and_cache(family, generator, k):
    base, model = pair(family, "SEQ_CLS", k=k, generator=generator)
    still(model)
    inputs = batch()
    labels = labels_for("SEQ_CLS", inputs)
    expected = outcome(model, "padded", **inputs, **labels)
    assert_same(outcome(model, "packed", **inputs, **labels), expected)
    for room in (0, M, M + 1):
        rows = cached(base, inputs, k=k, room=room)
        assert_same(outcome(model, "packed", cached_hidden=rows, **labels), expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["products", "sdpa"])
@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_double_precision(family, way, monkeypatch):
    """What is not a matter of rounding is equal to twelve digits."""
    if way == "sdpa":
        monkeypatch.setattr(packed_attention, "PRODUCTS_UP_TO", 0)
    for head in ("SEQ_CLS", "TOKEN_CLS"):
        for k in (1, LAYERS - 1):
            _, model = pair(family, head, torch.float64, k=k, generator="mppg")
            still(model)
            inputs = batch(lengths=(9, 1, 8, 9, 2, 3))
            call = {**inputs, **labels_for(head, inputs)}
            at = None if head == "SEQ_CLS" else inputs["attention_mask"].bool()
            expected = outcome(model, "padded", at, **call)
            assert_same(outcome(model, "packed", at, **call), expected, 1e-12)


VARIANTS = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"scale_attn_weights": False, "activation_function": "relu"}),
    ("bert", {"hidden_act": "gelu_new"}),
    ("mpnet", {"hidden_act": "relu", "num_attention_heads": 2}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ("qwen3", {"attention_bias": True, "head_dim": 16}),
]


@pytest.mark.parametrize(("family", "settings"), VARIANTS)
@pytest.mark.parametrize("k", [1, LAYERS - 1])
def test_settings_of_the_layers(family, settings, k):
    base = tiny(family, "SEQ_CLS", **settings).double()
    model = adapted(family, "SEQ_CLS", task="SEQ_CLS", base=base, k=k)[1].double()
    expected, got = (outcome(model, upper, **batch()) for upper in ("padded", "packed"))
    assert_same(got, expected, 1e-12)


@pytest.mark.parametrize("family", ["roberta", "mpnet", "gpt2", "qwen3"])
def test_half_precision(family):
    """bf16: no farther from fp32 than twice the padded way in bf16."""
    inputs = batch()
    labels = labels_for("SEQ_CLS", inputs)
    _, exact = pair(family, "SEQ_CLS")
    truth = outcome(still(exact), "padded", **inputs, **labels)
    model = still(pair(family, "SEQ_CLS", torch.bfloat16)[1])
    errors = {}
    for upper in ("padded", "packed"):
        got = outcome(model, upper, **inputs, **labels)
        both = [(got[0], truth[0]), *((got[2][n], g) for n, g in truth[2].items())]
        errors[upper] = torch.tensor([float((a.double() - b.double()).norm()) for a, b in both])
        sizes = torch.tensor([float(b.double().norm()) for _, b in both])
    # (Below the resolution of bf16 an error is chance.)
    assert (errors["packed"] <= 2 * errors["padded"] + sizes * 2**-8).all(), errors
    assert errors["packed"].max() > 0


@pytest.mark.parametrize("changed", [0, 1, 4])
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "qwen3"])
def test_texts_do_not_see_each_other(family, changed):
    """Another text in the batch, NaN included, changes no bit of its neighbours."""
    base, model = pair(family, "TOKEN_CLS")
    model.eval()
    find_backbone(model)[1].late_prompt.upper = "packed"
    rows = cached(base, batch(lengths=(9, 4, 9, 1, 7)), k=2)
    first = model(cached_hidden=rows).logits
    begin, end = rows.cu_seqlens[changed : changed + 2].tolist()
    others = [i for i in range(5) if i != changed]
    for value in (torch.randn(end - begin, rows.hidden.shape[1]), float("nan")):
        hidden = rows.hidden.clone()
        hidden[begin:end] = value
        got = model(cached_hidden=type(rows)(hidden, rows.cu_seqlens, rows.max_seqlen)).logits
        assert torch.equal(got[others], first[others])
        assert not torch.equal(got[changed, : end - begin], first[changed, : end - begin])


def test_a_batch_serves_twice_before_a_backward():
    base, model = pair("gpt2", "SEQ_CLS", k=LAYERS - 1)
    find_backbone(still(model))[1].late_prompt.upper = "packed"
    rows = cached(base, batch(), k=LAYERS - 1, room=M)
    labels = torch.tensor([0, 1, 0, 1, 1])
    once = model(cached_hidden=rows, labels=labels).loss
    (once + model(cached_hidden=rows, labels=1 - labels).loss).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for y in (labels, 1 - labels):
        model(cached_hidden=rows, labels=y).loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, grads[name])
    assert not rows.hidden.requires_grad


# -- what a head reads -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("upper", ["packed", "padded"])
@pytest.mark.parametrize("source", ["right", "left", "cache"])
@pytest.mark.parametrize(
    "family", ["bert", "roberta", "electra", "mpnet", "gpt2", "llama", "qwen3"]
)
def test_readout_of_language_models(family, source, upper):
    """Logits and loss of the one token that is read are those of the whole run."""
    head = "CAUSAL_LM" if family in CAUSAL else "MASKED_LM"
    base, model = pair(family, head)
    late = find_backbone(still(model))[1].late_prompt
    late.upper = "padded"
    inputs = batch("left" if source == "left" else "right", lengths=(9, 4, 7, 3, 3))
    mask = inputs["attention_mask"].bool()
    place = torch.tensor([3, 0, 5, 1, 1])
    column = mask.int().argmax(1) + place
    at = torch.arange(5)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[at, column + (family in CAUSAL)] = torch.tensor([11, 12, 13, 14, 15])
    whole = model(**inputs, labels=labels)
    whole.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    late.upper = upper
    call = inputs if source != "cache" else {"cached_hidden": cached(base, inputs, room=M)}
    got = model(**call, labels=labels, readout=place)
    assert got.logits.shape == (5, 1, 99)
    torch.testing.assert_close(got.logits[:, 0], whole.logits[at, column], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.loss, whole.loss, atol=1e-5, rtol=1e-5)
    got.loss.backward()
    for name, grad in grads.items():
        new = dict(model.named_parameters())[name].grad
        assert (new - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name
    assert model(**call, readout=place.tolist()).logits.shape == (5, 1, 99)


def test_readout_says_what_is_wrong():
    model = get_peft_model(tiny("bert", "MASKED_LM"), lpt())
    for wrong, word in (
        (torch.zeros(4, dtype=torch.long), "shape"),
        (torch.zeros(5), "float32"),
        (torch.tensor([0, 0, 0, 1, 0]), "number of tokens"),
    ):
        with pytest.raises(ValueError, match=word):
            model(**batch(), readout=wrong)
    head = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="BertForSequenceClassification got `readout`"):
        head(**batch(), readout=torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="active late prompt"), model.disable_adapter():
        model(**batch(), readout=torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_classifier_of_a_decoder_reads_what_transformers_reads(family):
    """The last id that is not padding: ids of padding inside of a text and at its end count as
    padding there, also where they are attended to; a token that is not attended to is read too.
    """
    base, model = pair(family, "SEQ_CLS")
    still(model)
    inputs = batch()
    inputs["input_ids"][0, 8] = PAD
    inputs["input_ids"][2, 3] = PAD
    expected = outcome(model, "padded", **inputs)
    assert_same(outcome(model, "packed", **inputs), expected)
    assert_same(outcome(model, "packed", cached_hidden=cached(base, inputs)), expected)
    inputs["attention_mask"][0, 7:] = 0  # its last id stays
    expected = outcome(model, "padded", **inputs)
    assert torch.equal(outcome(model, "auto", **inputs)[0], expected[0])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["roberta", "mpnet", "gpt2", "llama", "qwen3"])
def test_masks_with_holes(family, side):
    """Positions go on over tokens in the middle of a text that are not attended to."""
    model = still(pair(family, "TOKEN_CLS", torch.float64)[1])
    inputs = batch(side)
    inputs["attention_mask"][0, 3:5] = 0
    inputs["attention_mask"][2, 6] = 0
    at = inputs["attention_mask"].bool()
    expected = outcome(model, "padded", at, **inputs)
    # (Rotary angles are fp32 in any dtype, and others where padding on the left counts.)
    exact = side == "right" or family not in ("llama", "qwen3")
    assert_same(outcome(model, "packed", at, **inputs), expected, 1e-12 if exact else 1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_a_head_that_reads_the_first_column_gets_it(family):
    """Padded on the left, that is padding: such batches run the padded way."""
    _, model = pair(family, "SEQ_CLS")
    model.eval()
    late = find_backbone(model)[1].late_prompt
    late.upper = "padded"
    expected = model(**batch("left")).logits
    late.upper = "auto"
    assert torch.equal(model(**batch("left")).logits, expected)


@pytest.mark.parametrize(("family", "name"), [("bert", "bert.pooler"), ("electra", "classifier")])
def test_a_head_that_somebody_watches_gets_every_row(family, name):
    _, model = pair(family, "SEQ_CLS")
    root, seen = model.eval().get_base_model(), []
    module = root.get_submodule(name)
    model(**batch())
    for child in module.modules_to_save.values():
        child.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    find_backbone(model)[1].late_prompt.upper = "packed"
    model(**batch())
    assert seen == [(5, 9, 32)]


def test_the_arithmetic_that_is_left():
    """Matrix products of a step: full layers on packed rows, the first without a backward of text
    rows' queries, keys and values, the last on one row a text.
    """
    D, F, layers, k, m = 64, 256, 4, 2, M
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=99,
        hidden_size=D,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=F,
    )
    base = BertForSequenceClassification(config).eval()
    settings = lpt(task_type="SEQ_CLS", insertion_layer=k, generator="static")
    model = get_peft_model(copy.deepcopy(base), settings)
    still(model.train())
    inputs = batch(lengths=(30, 30, 30, 30))
    rows = cached(base, inputs, k=k, room=m)
    late = find_backbone(model)[1].late_prompt
    counts = {}
    for upper in ("padded", "packed"):
        late.upper = upper
        with FlopCounterMode(display=False) as counter:
            model(cached_hidden=rows, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        counts[upper] = counter.get_total_flops()
    B, n = 4, 30 + m
    N = B * n
    d_model, feed = 2 * D * D, 2 * D * F
    forward = N * (4 * d_model + 2 * feed + 4 * n * D)
    backward = N * (d_model + 2 * feed) + B * m * 3 * d_model
    # Attention's backward for the prompts: as keys and values they meet all rows, and as queries.
    backward += B * (4 * n * m * 2 * D + 0)
    last = B * (4 * d_model + 2 * feed) * 2 + N * 3 * 4 * 2 * D
    head = B * 3 * (d_model + 2 * 2 * D)
    assert counts["packed"] <= 1.1 * (forward + backward + last + head)
    assert counts["packed"] < 0.5 * counts["padded"]


@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "llama"])
def test_autocast(family):
    """Under bf16 autocast: as far from fp32 as the padded way under autocast, twice at most."""
    model = still(pair(family, "SEQ_CLS")[1])
    inputs = batch()
    call = {**inputs, **labels_for("SEQ_CLS", inputs)}
    truth = outcome(model, "padded", **call)
    errors = {}
    for upper in ("padded", "packed"):
        got = outcome(model, upper, autocast=torch.bfloat16, **call)
        errors[upper] = (got[0].float() - truth[0]).norm()
        name = max(truth[2], key=lambda n: truth[2][n].norm())
        errors[upper, "grad"] = (got[2][name] - truth[2][name]).norm()
    assert 0 < errors["packed"] <= 2 * errors["padded"] + 2**-8 * truth[0].norm()
    assert errors["packed", "grad"] <= 2 * errors["padded", "grad"] + 2**-8 * truth[2][name].norm()


def test_every_block_is_a_known_family():
    from lpt_fast.backbone.families import FAMILIES

    assert set(BLOCKS) <= set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("generator", ["npg", "mppg"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "qwen3"])
def test_a_step_from_the_cache_looks_at_no_number(family, generator, head, monkeypatch):
    """On a GPU, looking would make the host wait for it. Here on tensors that have none."""
    from lpt_fast.insertion import reference
    from lpt_fast.method import context

    for module in (context, reference):
        monkeypatch.setattr(module, "check", lambda *_: None)  # an assertion in the stream there
    base, model = pair(family, head, generator=generator)
    rows = cached(base, batch(), room=M)
    find_backbone(model)[1].late_prompt.upper = "packed"
    empty = torch.nn.Module.to_empty
    out = empty(model, device="meta")(
        cached_hidden=rows.to("meta"),
        labels=torch.zeros((5,) if head == "SEQ_CLS" else (5, 9), dtype=torch.long, device="meta"),
    )
    out.loss.backward()
    assert out.loss.is_meta and out.logits.shape[0] == 5
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_plans_of_several_adapters():
    """Texts of 2, 1 and 3 tokens with 1, 0 and 2 prompt rows: rows P T T | T | P P T T T."""
    ends = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    plan = Plan(ends, 3, [1, 0, 2], 9)
    assert not plan.even and plan.m.tolist() == [1, 0, 2] and (plan.most, plan.size) == (2, 5)
    assert plan.starts.tolist() == [0, 3, 4] and plan.lengths.tolist() == [3, 1, 5]
    assert plan.prompt_rows.tolist() == [0, 4, 5]
    assert plan.text_rows.tolist() == [1, 2, 3, 6, 7, 8]
    assert plan.places_in_text.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert plan.readout_rows(None).tolist() == [1, 3, 6]
    assert plan.readout_rows(torch.tensor([1, 0, 2])).tolist() == [2, 3, 8]
    same = Plan(ends, 3, [2, 2, 2], 12)
    assert same.even and same.m == 2 and same.prompt_rows.tolist() == [0, 1, 4, 5, 7, 8]
