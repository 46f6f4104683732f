"""`adapter_names`: texts of several adapters in one call give what each adapter gives alone."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from lpt_fast.backbone.families import find_backbone
from lpt_fast.method.config import GENERATORS
from tests.adapters import lpt, stir
from tests.method.cases import cached
from tests.packed.cases import TASK, labels_for, pair, still
from tests.packed.test_packed import DECODERS, ENCODERS
from tests.tiny import batch

ALL = {"lora_r": 2, "lora_target_modules": "all-linear"}
# Adapters of several layers, prompts, labels; "default" is npg, m = 3, k = 2, two labels.
OTHERS = {
    "mppg": {"insertion_layer": 2, "generator": "mppg", "num_virtual_tokens": 5, "num_labels": 4},
    "lower": {"insertion_layer": 1, "generator": "appg", "num_virtual_tokens": 3, **ALL},
    "alone": {"insertion_layer": 3, "generator": "none", "num_labels": 3, **ALL},
    "both": {"insertion_layer": 2, "generator": "static", "num_virtual_tokens": 2, **ALL},
}
BASE = "__base__"
MIXES = [
    ["default", "mppg", "lower", BASE, "alone"],
    ["both", "default", "both", "default", "mppg"],
    ["lower", "alone", "both", "alone", "lower"],
]


def several(family, head, others=OTHERS, dtype=torch.float32, **config):
    """A model with all these adapters, moved as by training; all of them train."""
    model = pair(family, head, dtype, **config)[1]
    task = TASK.get(head, head)
    for name, settings in others.items():
        model.add_adapter(name, lpt(task_type=task, prompt_dropout=0.0, **settings))
    stir(model)
    model.to(dtype)
    model.set_requires_grad(["default", *others])
    return still(model)


def late_of(model):
    return find_backbone(model)[1].late_prompt


def alone(model, name, numbers, **call):
    """An adapter's own run on some of the texts, padded."""
    own = {n: v[numbers] if isinstance(v, torch.Tensor) else v for n, v in call.items()}
    late_of(model).upper = "padded"
    try:
        if name == BASE:
            with model.disable_adapter():
                return model(**own)
        model.set_adapter(name)
        model.set_requires_grad(list(model.peft_config))
        return model(**own)
    finally:
        late_of(model).upper = None
        model.set_adapter("default")
        model.set_requires_grad(list(model.peft_config))


def value_of(out):
    names = ("logits", "start_logits", "last_hidden_state")
    return next(out[name] for name in names if out.get(name) is not None)


def pulled(value, where=None):
    """A number that depends on all of it."""
    value = value.masked_fill(value == float("-inf"), 0)
    pull = torch.linspace(-1, 1, 7, dtype=value.dtype)[torch.arange(value.shape[-1]) % 7]
    return (value * pull if where is None else (value * pull)[where]).sum()


def grads_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check(model, names, at=None, tolerance=1e-5, given=None, **call):
    """One call for all against one call for each adapter: values and gradients."""
    out = model(**(given or call), adapter_names=names)
    value, total = value_of(out), 0
    grads = grads_of(model, pulled(value, at))
    for name in dict.fromkeys(names):
        numbers = [i for i, own in enumerate(names) if own == name]
        expected = value_of(alone(model, name, numbers, **call))
        got = value[numbers]
        rest, got = got[..., expected.shape[-1] :], got[..., : expected.shape[-1]]
        assert (rest == float("-inf")).all()
        where = None if at is None else at[numbers]
        pick = (lambda x: x) if at is None else (lambda x, where=where: x[where])
        torch.testing.assert_close(pick(got), pick(expected), atol=tolerance, rtol=tolerance)
        total = total + pulled(expected, where)
    wanted = grads_of(model, total)
    assert grads.keys() == wanted.keys() and len(grads) > 4
    largest = max(grad.norm() for grad in wanted.values())
    for name, grad in wanted.items():
        assert (grads[name] - grad).norm() <= tolerance * grad.norm() + 1e-7 * largest, name
    return out


@pytest.mark.slow
@pytest.mark.parametrize("names", MIXES, ids=["layers", "one", "lora"])
@pytest.mark.parametrize("head", ["SEQ_CLS", "TOKEN_CLS", "base"])
@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_mixed_equals_single(family, head, names, caplog):
    """Every packed family, several layers, prompts of other lengths, heads of other sizes. (In
    double precision: what is not a matter of rounding is equal to ten digits.)
    """
    if head == "base" and family not in ("bert", "gpt2"):
        pytest.skip("as with heads")
    caplog.set_level(logging.INFO, logger="lpt_fast")
    model = several(family, head, dtype=torch.float64)
    inputs = batch()
    at = inputs["attention_mask"].bool() if head != "SEQ_CLS" else None
    more = {"use_cache": False} if head == "base" and family in DECODERS else {}
    check(model, names, at, 1e-10, **inputs, **more)
    assert any("packed" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_in_float32(family):
    model = several(family, "SEQ_CLS")
    for names in MIXES:
        check(model, names, **batch())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_it_is_one_pass(family, monkeypatch):
    """The lower layers run each text once, and the packed layers all of them at once."""
    model = several(family, "SEQ_CLS")
    seen, counted = [], []
    backbone = find_backbone(model)[1]
    from lpt_fast.packed import stages

    def layers(*args, **kwargs):
        seen.append((args[2], args[4].texts))
        return run(*args, **kwargs)

    run = stages.run_layers
    monkeypatch.setattr(stages, "run_layers", layers)
    first = (backbone.encoder.layer if family == "bert" else backbone.get_submodule(
        "h" if family == "gpt2" else "layers"
    ))[0]  # fmt: skip
    first.register_forward_pre_hook(lambda m, a, k: counted.append(1), with_kwargs=True)
    with torch.no_grad():
        model(**batch(), adapter_names=MIXES[0])
    assert counted == [1]
    assert seen == [(range(1, 2), 2), (range(2, 3), 4), (range(3, 4), 5)]


@pytest.mark.slow
@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "llama"])
def test_every_generator(family, generator):
    others = {
        "one": {"insertion_layer": 2, "generator": generator, "num_virtual_tokens": 4},
        "two": {"insertion_layer": 1, "generator": generator, "num_virtual_tokens": 2},
    }
    model = several(family, "SEQ_CLS", others)
    check(model, ["one", "two", "default", "one", BASE], **batch())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_losses(family):
    """The mean over all texts of the adapters' own; heads of other sizes, labels of their own."""
    model = several(family, "SEQ_CLS")
    labels = torch.tensor([1, 3, 0, 1, 2])
    names = ["default", "mppg", "lower", "default", "alone"]
    call = {**batch(), "labels": labels}
    got = model(**call, adapter_names=names)
    losses = [alone(model, name, [i], **call).loss for i, name in enumerate(names)]
    torch.testing.assert_close(got.loss, torch.stack(losses).mean())
    wanted = grads_of(model, torch.stack(losses).mean())
    grads = grads_of(model, got.loss)
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["TOKEN_CLS", "CAUSAL_LM", "MASKED_LM"])
def test_losses_of_tokens(head):
    """The mean over labels, which texts have different numbers of."""
    family = "bert" if head != "CAUSAL_LM" else "gpt2"
    model = several(family, head)
    names = ["default", "mppg", "lower", "default", "alone"]
    call = {**batch(), **labels_for(head, batch())}
    got = model(**call, adapter_names=names)
    total = count = 0
    for i, name in enumerate(names):
        own = call["labels"][i][1:] if head == "CAUSAL_LM" else call["labels"][i]
        n = int((own != -100).sum())
        if n:
            total, count = total + n * alone(model, name, [i], **call).loss, count + n
    torch.testing.assert_close(got.loss, total / count)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "qwen3"])
def test_readout_and_context_lengths(family):
    head = "CAUSAL_LM" if family in DECODERS else "MASKED_LM"
    model = several(family, head)
    inputs = batch()
    count = inputs["attention_mask"].sum(1)
    call = {**inputs, "readout": count - 1}
    if head == "CAUSAL_LM":
        call["context_lengths"] = (count - 1).clamp(min=1)
    check(model, ["default", "mppg", "lower", "both", "alone"], **call)
    with pytest.raises(ValueError, match="got `readout`, expected it for .* an active late prompt"):
        model(**call, adapter_names=MIXES[0])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_from_a_cache(family):
    """Of the lowest layer; adapters of higher ones go on from there."""
    base, _ = pair(family, "SEQ_CLS", k=2)
    model = several(family, "SEQ_CLS")
    inputs = batch()
    for k, names in ((1, MIXES[0]), (2, MIXES[1])):
        held = cached(base, inputs, k=k, room=2)
        check(model, names, given={"cached_hidden": held}, **inputs)
    with pytest.raises(ValueError, match="layer 1, expected that of layer 2"):
        model(cached_hidden=replace(cached(base, inputs, k=1), layer=1), adapter_names=MIXES[1])


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_texts_never_influence_each_other(family):
    model = several(family, "SEQ_CLS").eval()
    inputs = batch()
    with torch.no_grad():
        before = model(**inputs, adapter_names=MIXES[0]).logits
        ids = inputs["input_ids"].clone()
        ids[1, 0] = 7 if ids[1, 0] != 7 else 8
        after = model(**{**inputs, "input_ids": ids}, adapter_names=MIXES[0]).logits
    assert not torch.equal(after[1], before[1])
    others = [0, 2, 3, 4]
    assert torch.equal(after[others], before[others])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deberta-v2", "opt", "modernbert", "t5"])
def test_families_without_a_packed_way(family):
    """Group by group."""
    others = {n: c for n, c in OTHERS.items() if "lora_r" not in c}
    model = several(family, "SEQ_CLS", others).eval()
    inputs = batch()
    if family == "t5":
        last = inputs["attention_mask"].sum(1) - 1
        inputs["input_ids"][torch.arange(5), last] = 1
    check(model, ["default", "mppg", BASE, "mppg", "default"], **inputs)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_language_models_by_default(family):
    """Where one adapter would leave a KV cache each runs by itself: the same at padding too."""
    model = several(family, "CAUSAL_LM").eval()
    out = check(model, MIXES[0], **batch())
    assert out.past_key_values is None
    with pytest.raises(ValueError, match="`use_cache` together with `adapter_names`"):
        model(**batch(), adapter_names=MIXES[0], use_cache=True)
    at = batch()["attention_mask"].bool()
    check(model, MIXES[0], at, **batch(), use_cache=False)


def test_what_only_the_padded_way_gives():
    model = several("bert", "SEQ_CLS", {"other": {"insertion_layer": 1, "num_virtual_tokens": 3}})
    names = ["default", "other", BASE, "other", "default"]
    out = check(model, names, **batch(), output_hidden_states=True)
    assert len(out.hidden_states) == 5 and out.hidden_states[1].shape == (
        5,
        *batch()["input_ids"].shape[1:],
        32,
    )
    with pytest.raises(ValueError, match="gives `attentions` in another form for each adapter"):
        model.set_adapter("default")
        find_backbone(model)[1].config._attn_implementation = "eager"
        model(**batch(), adapter_names=names, output_attentions=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generate(family):
    others = {n: OTHERS[n] for n in ("mppg", "lower", "alone")}
    model = several(family, "CAUSAL_LM", others).eval()
    inputs = batch("left")
    got = model.generate(**inputs, adapter_names=MIXES[0], max_new_tokens=5, do_sample=False)
    for i, name in enumerate(MIXES[0]):
        own = {n: v[i : i + 1] for n, v in inputs.items()}
        if name == BASE:
            with model.disable_adapter():
                expected = model.generate(**own, max_new_tokens=5, do_sample=False)
        else:
            model.set_adapter(name)
            expected = model.generate(**own, max_new_tokens=5, do_sample=False)
        n = expected.shape[1]
        assert torch.equal(got[i : i + 1, :n], expected) and (got[i, n:] == 0).all()
    said = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False}
    whole = model.generate(**inputs, adapter_names=MIXES[0], max_new_tokens=5, **said)
    assert torch.equal(whole.sequences, got)
    with model.disable_adapter():
        own = model.generate(**{n: v[3:4] for n, v in inputs.items()}, max_new_tokens=5, **said)
    for step, expected in zip(whole.scores, own.scores, strict=False):
        torch.testing.assert_close(step[3:4], expected, atol=1e-4, rtol=1e-4)
    assert all((step[3] == float("-inf")).all() for step in whole.scores[len(own.scores) :])
    with pytest.raises(ValueError, match="gives `hidden_states` in another form"):
        more = {"output_hidden_states": True, "return_dict_in_generate": True}
        model.generate(**inputs, adapter_names=MIXES[0], max_new_tokens=2, **more)
    with pytest.raises(ValueError, match="`streamer` together with `adapter_names`"):
        model.generate(**inputs, adapter_names=MIXES[0], streamer=object())
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 3, "do_sample": False}
    got = model.generate(**inputs, adapter_names=MIXES[0], **beams)
    model.set_adapter("mppg")
    expected = model.generate(**{n: v[1:2] for n, v in inputs.items()}, **beams)
    assert len(got) == 10 and torch.equal(got[2:4, : expected.shape[1]], expected)
    whole = model.generate(
        **inputs, adapter_names=MIXES[0], return_dict_in_generate=True, output_scores=True, **beams
    )
    assert torch.equal(whole.sequences, got) and whole.sequences_scores.shape == (10,)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_in_bfloat16(family):
    """Layers that compute in bf16: as each adapter alone does, within what rounding leaves."""
    model = several(family, "SEQ_CLS").eval()
    late = late_of(model)
    late.compute_dtype = torch.bfloat16
    with torch.no_grad():
        for names in MIXES:
            got = model(**batch(), adapter_names=names).logits
            for i, name in enumerate(names):
                own = {n: v[i : i + 1] for n, v in batch().items()}
                late.upper, late.compute_dtype = "packed", torch.bfloat16
                if name == BASE:
                    with model.disable_adapter():
                        expected = model(**own).logits
                else:
                    model.set_adapter(name)
                    expected = model(**own).logits
                late.upper = None
                torch.testing.assert_close(
                    got[i : i + 1, : expected.shape[1]], expected, atol=5e-2, rtol=5e-2
                )


def test_what_is_refused():
    model = several("bert", "SEQ_CLS")
    inputs = batch()
    for names, message in (
        (["default"] * 4, r"holds 4 names, expected a list with one name for each of the 5 texts"),
        ("default", r"holds 'default', expected a list"),
        (["default", "nobody", BASE, BASE, BASE], r"names 'nobody', expected names of this model"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, adapter_names=names)
    with pytest.raises(ValueError, match="without a text"):
        model(adapter_names=["default"])
    # A refused call leaves nothing behind.
    assert model.active_adapters == ["default"]
    assert value_of(model(**inputs)).shape == (5, 2)


def test_what_is_active_stays(caplog):
    model = several("bert", "SEQ_CLS")
    model.set_adapter("mppg")
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    before = model(**batch()).logits
    model(**batch(), adapter_names=MIXES[0])
    assert model.active_adapters == ["mppg"] and model.config.num_labels == 4
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    assert torch.equal(model(**batch()).logits, before)
    with model.disable_adapter(), torch.no_grad():
        base = model(**batch()).logits
        assert torch.equal(model(**batch(), adapter_names=MIXES[0]).logits, base)
    out = model(**batch(), adapter_names=MIXES[0], return_dict=False)
    assert isinstance(out, tuple) and out[0].shape == (5, 4)
