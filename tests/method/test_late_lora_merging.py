"""Merging late LoRA without a prompt into the weights: all heads, dtypes, and what cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from lpt_fast.backbone.families import find_backbone
from tests.adapters import lpt, stir
from tests.method.cases import text_batch
from tests.packed.test_quantised import coded
from tests.tiny import AUTO, FAMILIES, batch, tiny

ALL = {"lora_target_modules": "all-linear"}


def alone(base, kind="SEQ_CLS", **config):
    settings = {"generator": "none", "lora_r": 2, "insertion_layer": 2, **ALL, **config}
    task = None if kind in ("base", "MASKED_LM") else kind
    model = get_peft_model(copy.deepcopy(base), lpt(task_type=task, **settings)).eval()
    stir(model)
    return model


def weights_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def unchanged(model, before):
    after = weights_of(model)
    return after.keys() == before.keys() and all(
        torch.equal(p.nan_to_num(7.0), before[n].nan_to_num(7.0)) for n, p in after.items()
    )


@torch.no_grad()
def result(model, inputs):
    out = model(**inputs)
    names = ("logits", "start_logits", "last_hidden_state")
    return next(out[n] for n in names if out.get(n) is not None)


HEADS = [
    *((family, "SEQ_CLS") for family in FAMILIES if family not in ("bert", "gpt2", "t5")),
    ("bert", "TOKEN_CLS"),
    ("bert", "MASKED_LM"),
    ("roberta", "QUESTION_ANS"),
    ("gpt2", "CAUSAL_LM"),
    ("qwen3", "CAUSAL_LM"),
    ("t5", "base"),
]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("family", "kind"), HEADS)
def test_merged_is_a_plain_model(family, kind, tmp_path):
    base = tiny(family, kind)
    model = alone(base, kind, lora_alpha=3)
    inputs = text_batch(family)
    at = inputs["attention_mask"].bool() if kind != "SEQ_CLS" else slice(None)
    want = result(model, inputs)[at]
    assert not torch.allclose(want, result(base, inputs)[at], atol=1e-2)
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == list(base.state_dict())
    assert not hasattr(merged, "peft_config") and not merged._forward_pre_hooks
    torch.testing.assert_close(result(merged, inputs)[at], want, atol=2e-5, rtol=2e-5)
    if family == "mpnet":  # (The class has a padding token of its own, which the tiny one changes.)
        return
    merged.save_pretrained(tmp_path)
    again = (type(base) if kind == "base" else AUTO[kind]).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(result(again, inputs)[at], want, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_the_active_one_of_several_is_merged():
    """Its head, its names and as many labels as it has; the others are gone."""
    base = tiny("bert", "SEQ_CLS")
    model = alone(base)
    names = {0: "x", 1: "y", 2: "z"}
    config = {"generator": "none", "lora_r": 3, "insertion_layer": 3, "id2label": names}
    model.add_adapter("three", lpt(task_type="SEQ_CLS", **config))
    model.set_adapter("three")
    with torch.enable_grad():
        stir(model.eval(), 5)
    want = model(**batch()).logits
    with pytest.raises(ValueError, match="active adapter alone.*'three'"):
        model.merge_and_unload(adapter_names=["default"])
    merged = model.merge_and_unload(adapter_names=["three"])
    got = merged(**batch()).logits
    assert got.shape == (5, 3)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert merged.config.id2label == names and merged.config.num_labels == merged.num_labels == 3
    assert merged(**batch(), labels=torch.tensor([2, 1, 0, 1, 2])).loss > 0
    assert torch.equal(
        merged.bert.encoder.layer[2].attention.self.query.weight,
        base.bert.encoder.layer[2].attention.self.query.weight,
    )
    # A further adapter finds a plain model.
    again = get_peft_model(merged, lpt(task_type="SEQ_CLS")).eval()
    assert again(**batch()).logits.shape == (5, 3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The sum is made in fp32 and rounded once."""
    base = tiny("bert", "SEQ_CLS").to(dtype)
    model = alone(base)
    want = model(**batch()).logits
    late = find_backbone(model)[1].late_prompt
    update = late.updates("default")[3]["output.dense"]
    weight = base.bert.encoder.layer[3].output.dense.weight
    expected = (weight.float() + update.delta()).to(dtype)
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.equal(merged.bert.encoder.layer[3].output.dense.weight, expected)
    spread = float(want.abs().max())
    torch.testing.assert_close(merged(**batch()).logits, want, atol=0.05 * spread, rtol=0)


def test_refusals_leave_the_model():
    settings = {"generator": "none", "lora_r": 2, "insertion_layer": 2, **ALL}
    quantised = get_peft_model(coded()[0], lpt(task_type="SEQ_CLS", **settings)).eval()
    stir(quantised)
    call = batch()
    want = result(quantised, call)
    with pytest.raises(ValueError, match="got a Codes in Linear.*quantised") as error:
        quantised.merge_and_unload()
    assert len(str(error.value)) <= 300
    assert torch.equal(result(quantised, call), want)
    prompted = alone(tiny("bert", "SEQ_CLS"), generator="npg")
    before = weights_of(prompted)
    for verb in ("merge_and_unload", "merge_adapter", "unmerge_adapter"):
        with pytest.raises(ValueError, match=r"cannot be merged.*generator='none', can"):
            getattr(prompted, verb)()
    model = alone(tiny("bert", "SEQ_CLS"))
    for verb in ("merge_adapter", "unmerge_adapter"):  # (in place: there is no way back)
        with pytest.raises(ValueError, match=r"cannot be merged.*merge_and_unload"):
            getattr(model, verb)()
    assert unchanged(prompted, before)
    # Where the one that runs has a prompt, that another has none does not count.
    model.add_adapter("prompt", lpt(task_type="SEQ_CLS"))
    model.set_adapter("prompt")
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(bad):
    """Refused with safe_merge, and nothing has been changed; merged without it, as PEFT's."""
    model = alone(tiny("gpt2", "SEQ_CLS"))
    updates = find_backbone(model)[1].late_prompt.updates("default")
    with torch.no_grad():
        updates[3]["mlp.c_proj"].lora_A.weight[0, 0] = bad
    before = weights_of(model)
    with pytest.raises(ValueError, match="NaN or infinite numbers.*lower learning rate"):
        model.merge_and_unload(safe_merge=True)
    assert unchanged(model, before) and isinstance(model, PeftModel)
    merged = model.merge_and_unload()
    assert not merged.transformer.h[3].mlp.c_proj.weight.isfinite().all()
    assert merged.transformer.h[2].mlp.c_proj.weight.isfinite().all()
