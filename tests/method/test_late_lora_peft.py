"""Late LoRA with PEFT's verbs, farther than test_late_lora.py: all kinds of files, adapters side by
side, half precision, checkpointing, generation.
"""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lpt_fast.backbone.families import find_backbone
from lpt_fast.backbone.low_rank import LowRank
from tests.adapters import lpt, needs_own_adapters, stir
from tests.method.cases import text_batch
from tests.method.test_peft_loading import needs_heads
from tests.tiny import batch, tiny

ALONE = {"generator": "none"}
ALL = {"lora_target_modules": "all-linear"}
WAYS = pytest.mark.parametrize("prompt", [{}, ALONE], ids=["npg", "alone"])


def config_of(task="SEQ_CLS", **more):
    return lpt(task_type=task, **{"lora_r": 2, "insertion_layer": 2, **more})


def model_of(family="bert", kind="SEQ_CLS", base=None, seed=3, **config):
    base = tiny(family, kind) if base is None else copy.deepcopy(base)
    task = None if kind in ("base", "MASKED_LM") else kind
    model = get_peft_model(base, config_of(task, **config)).eval()
    stir(model, seed)
    return model


def late_of(model):
    return find_backbone(model)[1].late_prompt


@torch.no_grad()
def logits(model, **more):
    return model(**{**batch(), **more}).logits


def same(a, b):
    torch.testing.assert_close(a, b, atol=0, rtol=0)


# -- files -----------------------------------------------------------------------------------------

SHAPES = {
    "late_prompt.lpt_lora.2.attention.self.query.lora_A.weight": (2, 32),
    "late_prompt.lpt_lora.2.attention.self.query.lora_B.weight": (32, 2),
    "late_prompt.lpt_lora.3.output.dense.lora_A.weight": (2, 37),
    "late_prompt.lpt_lora.3.output.dense.lora_B.weight": (32, 2),
}


@WAYS
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_save_and_load(family, prompt, tmp_path):
    base = tiny(family, "SEQ_CLS")
    model = model_of(family, base=base, **prompt, **ALL)
    call = text_batch(family)
    with torch.no_grad():
        expected = model(**call).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == sum(p.requires_grad for p in model.parameters())
    assert sum(t.numel() for t in saved.values()) == model.get_nb_trainable_parameters()[0]
    assert not any("default" in name for name in saved)
    assert any(".lpt_generator." in name for name in saved) == (not prompt)
    if family == "bert":
        prefix = "base_model.model.bert."
        shapes = {n.removeprefix(prefix): tuple(t.shape) for n, t in saved.items()}
        assert SHAPES.items() <= shapes.items()
        assert sum("lpt_lora" in name for name in saved) == 2 * 2 * 6
    for how in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **how)
        with torch.no_grad():
            same(loaded(**call).logits, expected)
        assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    again = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert again == {n for n, p in model.named_parameters() if p.requires_grad}
    loaded.save_pretrained(tmp_path / "again")
    twice = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert twice.keys() == saved.keys() and all(torch.equal(saved[n], twice[n]) for n in saved)


def test_the_configuration_in_the_file(tmp_path):
    model = model_of(lora_alpha=5, lora_dropout=0.25, lora_target_modules=("value", "query"))
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    own = {name: content[name] for name in content if name.startswith("lora_")}
    assert own == {
        "lora_r": 2,
        "lora_alpha": 5,
        "lora_dropout": 0.25,
        "lora_target_modules": ["query", "value"],
    }
    loaded = PeftModel.from_pretrained(tiny("bert", "SEQ_CLS"), tmp_path)
    update = next(m for m in loaded.modules() if isinstance(m, LowRank))
    assert update.scaling == 2.5 and update.lora_dropout.p == 0.25
    card = (tmp_path / "README.md").read_text()
    assert "| late LoRA | rank 2 on query, value |" in card


def test_a_file_without_the_updates_is_told_of(tmp_path):
    """As PEFT does of any adapter."""
    model = model_of()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = {n: t for n, t in load_file(path).items() if "lpt_lora" not in n}
    save_file(weights, path)
    with pytest.warns(UserWarning, match="missing adapter keys.*lpt_lora"):
        PeftModel.from_pretrained(tiny("bert", "SEQ_CLS"), tmp_path)


@WAYS
def test_auto_class(prompt, tmp_path):
    names = {0: "a", 1: "b", 2: "c"}
    tiny("bert", "SEQ_CLS").save_pretrained(tmp_path / "base")
    base = type(tiny("bert", "SEQ_CLS")).from_pretrained(
        tmp_path / "base", id2label=names, ignore_mismatched_sizes=True
    )
    model = model_of(base=base, **prompt)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    same(logits(loaded), logits(model))
    assert loaded.config.id2label == names


@pytest.mark.slow
@needs_heads
@needs_own_adapters
@WAYS
def test_transformers_own_adapter_methods(prompt, tmp_path):
    base = tiny("bert", "SEQ_CLS")
    trained = model_of(base=base, **prompt)
    trained.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    model.load_adapter(str(tmp_path), adapter_name="mine")
    model.eval()
    same(logits(model), logits(trained))
    model.disable_adapters()
    torch.testing.assert_close(logits(model), logits(base))
    model.enable_adapters()
    same(logits(model.eval()), logits(trained))
    fresh = copy.deepcopy(base)
    fresh.add_adapter(lpt(lora_r=2, **prompt), "new")
    names = {n for n, p in fresh.named_parameters() if p.requires_grad and "lpt_lora" in n}
    assert len(names) == 2 * 2 * 6 and all(".lpt_lora.new." in n for n in names)


# -- the config object -----------------------------------------------------------------------------


def test_a_refused_config_stays_as_it_was():
    config = config_of(insertion_layer=None, lora_target_modules=["nonsense"])
    base = tiny("bert", "SEQ_CLS")
    with pytest.raises(ValueError, match="`lora_target_modules` got 'nonsense'"):
        get_peft_model(base, config)
    assert config.insertion_layer is None and config.num_labels is None
    assert not hasattr(base.bert, "late_prompt") and "forward" not in vars(base.bert)


def test_changes_afterwards_change_no_model():
    config, models = config_of(), []
    for r, names in ((2, ["query"]), (4, ["key", "value"])):
        config.lora_r, config.lora_target_modules = r, names
        models.append(get_peft_model(tiny("bert", "SEQ_CLS"), config))
    shapes = [
        {(n.split(".")[-3], p.shape[0]) for n, p in m.named_parameters() if ".lora_A." in n}
        for m in models
    ]
    assert shapes == [{("query", 2)}, {("key", 4), ("value", 4)}]
    assert late_of(models[0]).active_config.lora_r == 2


# -- several adapters ------------------------------------------------------------------------------

OTHERS = {
    "plain": {"lora_r": None, "insertion_layer": 1},
    "alone": {**ALONE, "insertion_layer": 3, **ALL},
    "wide": {"lora_r": 5, "lora_target_modules": ["key"], "insertion_layer": 1},
    "static": {"generator": "static", "lora_dropout": 0.5},
}


def several(base):
    """A model with four adapters beside the first, and what each gives."""
    model, outs = model_of(base=base), {}
    outs["default"] = logits(model)
    for seed, (name, more) in enumerate(OTHERS.items()):
        model.add_adapter(name, config_of(**more))
        model.set_adapter(name)
        model.eval()
        stir(model, seed)
        outs[name] = logits(model)
    return model, outs


def test_several_adapters(tmp_path):
    base = tiny("bert", "SEQ_CLS")
    model, outs = several(base)
    names = list(outs)
    for a, b in pairwise(names):
        assert not torch.allclose(outs[a], outs[b], atol=1e-3)
    for name in reversed(names):
        model.set_adapter(name)
        same(logits(model.eval()), outs[name])
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trains and all(f".{name}." in n for n in trains)
        assert any(".lpt_lora." in n for n in trains) == (name != "plain")
        assert any(".lpt_generator." in n for n in trains) == (name != "alone")
        model.zero_grad()
        model(**batch(), labels=torch.tensor([0, 1, 0, 1, 1])).loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == trains
    with model.disable_adapter():
        same(logits(model), logits(base))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for name in OTHERS:
        loaded.load_adapter(tmp_path / name, name)
    for name, want in outs.items():
        loaded.set_adapter(name)
        same(logits(loaded.eval()), want)
    for name in ("default", "wide"):
        model.delete_adapter(name)
        assert not any(f".{name}." in n for n, _ in model.named_parameters())
    for name in ("plain", "alone", "static"):
        model.set_adapter(name)
        same(logits(model.eval()), outs[name])
    status = model.get_model_status()
    assert status.requires_grad == {"plain": False, "alone": False, "static": True}
    model.set_adapter("plain")
    unloaded = model.unload()
    same(logits(unloaded), logits(base))
    assert list(unloaded.state_dict()) == list(base.state_dict())


def test_an_adapter_that_is_added_does_not_train():
    model = model_of(**ALONE)
    before = logits(model)
    model.add_adapter("second", config_of(**ALL))
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".second." in n)
    same(logits(model), before)


@pytest.mark.parametrize("name", ["3", "query", "lora_A", "weight"])
def test_names_that_parameters_have_are_refused(name):
    """PEFT would leave the layers of that name out of the other adapters' files."""
    model = model_of()
    with pytest.raises(ValueError, match=f"name {name!r}.*choose another") as error:
        model.add_adapter(name, config_of(lora_r=None))
    assert len(str(error.value)) <= 300 and name not in model.peft_config
    model.add_adapter("4", config_of())
    first = get_peft_model(tiny("bert", "SEQ_CLS"), config_of(lora_r=None), adapter_name=name)
    with pytest.raises(ValueError, match=f"name {name!r}.*choose another"):
        first.add_adapter("second", config_of())
    # Alone in its model it does no harm.
    get_peft_model(tiny("bert", "SEQ_CLS"), config_of(), adapter_name=name)


def test_folding_keeps_late_lora(tmp_path):
    base = tiny("bert", "SEQ_CLS")
    model = model_of(base=base, generator="residual", prompt_dropout=0.0)
    expected = logits(model)
    model.base_model.fold_adapter()
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), expected
    )


# -- modes and dtypes ------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("family", "kind"), [("bert", "SEQ_CLS"), ("gpt2", "CAUSAL_LM"),
                                              ("t5", "SEQ_CLS")])  # fmt: skip
@pytest.mark.parametrize("upper", ["auto", "padded"])
def test_half_precision_base_with_fp32_masters(family, kind, dtype, prompt, upper):
    base = tiny(family, kind).to(dtype)
    model = get_peft_model(base, config_of(kind, upper=upper, **prompt, **ALL))
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else dtype), name
    inputs = text_batch(family)
    labels = torch.tensor([0, 1, 0, 1, 1])
    if kind == "CAUSAL_LM":
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, 0] = -100
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all(), name
            assert p.grad.any() or "lora_A" in name or "proj" in name, name


@WAYS
def test_autocast_adapter_dtype_off(prompt):
    base = tiny("bert", "SEQ_CLS").to(torch.bfloat16)
    model = get_peft_model(base, config_of(**prompt), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(**batch(), labels=torch.tensor([0, 1, 0, 1, 1])).loss.backward()
    on_meta = get_peft_model(tiny("bert", "SEQ_CLS"), config_of(**prompt), low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in on_meta.named_parameters() if "lpt_lora" in n)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama", "t5"])
def test_gradient_checkpointing(family, reentrant):
    """The same gradients, and the updated layers are computed twice. (Without a prompt nothing that
    goes into them has a gradient.)
    """
    grads, calls = [], []
    for checkpointing in (False, True):
        base = tiny(family)
        if checkpointing:
            settings = {"use_reentrant": reentrant}
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        model = model_of(family, "base", base=base, **ALONE, **ALL).train()
        seen = []
        for module in late_of(model).modules():
            if isinstance(module, LowRank):
                module.register_forward_pre_hook(lambda *a, seen=seen: seen.append(1))
        if not checkpointing:
            late_of(model).upper = "padded"
        inputs = batch()
        at = inputs["attention_mask"].bool()
        model(**inputs).last_hidden_state[at].square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        calls.append(len(seen))
    assert calls[1] == 2 * calls[0] > 0
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name


# -- generation ------------------------------------------------------------------------------------


@torch.no_grad()
@WAYS
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_generate(family, k, prompt):
    """Greedy, batched, left-padded: with a KV cache as without, and row by row."""
    model = model_of(family, "CAUSAL_LM", insertion_layer=k, **prompt, **ALL)
    inputs = batch("left")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    got = model.generate(**inputs, **settings)
    assert got.tolist() == model.generate(**inputs, **settings, use_cache=False).tolist()
    for i, n in enumerate(inputs["attention_mask"].sum(1).tolist()):
        one = model.generate(input_ids=inputs["input_ids"][i : i + 1, -n:], **settings)
        assert one[0].tolist() == got[i, -n - 8 :].tolist()
    with model.disable_adapter():
        assert model.generate(**inputs, **settings).tolist() != got.tolist()
