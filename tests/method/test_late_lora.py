"""Late LoRA as a PEFT method: PEFT's own LoRA of the same layers is the oracle."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from lpt_fast import LPTConfig
from lpt_fast.backbone.families import find_backbone
from lpt_fast.backbone.low_rank import LowRank
from tests.adapters import lpt, stir
from tests.method.cases import assert_equal_runs, run, text_batch
from tests.method.test_exporting import OTHERS, exported
from tests.tiny import FAMILIES, LAYERS, batch, tiny

ALL = {"lora_target_modules": "all-linear"}
K = 2


def late_of(model):
    return find_backbone(model)[1].late_prompt


def adapted(base, task="SEQ_CLS", **config):
    """A copy with late LoRA that was moved as by training."""
    torch.manual_seed(7)
    settings = {"insertion_layer": K, "prompt_dropout": 0.0, "lora_r": 2, "lora_alpha": 3}
    model = get_peft_model(copy.deepcopy(base), lpt(task_type=task, **settings | config)).eval()
    stir(model)
    return model


def alone(base, task="SEQ_CLS", **config):
    return adapted(base, task, generator="none", **config)


def peft_lora(base, model, dropout=0.0):
    """PEFT's LoRA of the very layers that `model` updates, with its weights."""
    name, _, family = find_backbone(base)
    late = late_of(model)
    prefix = ".".join(part for part in (name, family.layers) if part)
    wanted = [f"{prefix}.{layer}.{inner}" for layer, inner in late.lpt_lora["default"].names]
    other = copy.deepcopy(base)
    settings = {"r": 2, "lora_alpha": 3, "lora_dropout": dropout, "target_modules": wanted}
    # (PEFT tells transposed weights from others by the class.)
    other = get_peft_model(other, LoraConfig(**settings)).eval()
    with torch.no_grad():
        for full in wanted:
            inner = full.removeprefix(f"{prefix}.")
            update = late.lpt_lora["default"].get_submodule(inner)
            theirs = other.get_submodule(f"base_model.model.{full}")
            theirs.lora_A["default"].weight.copy_(update.lora_A.weight)
            theirs.lora_B["default"].weight.copy_(update.lora_B.weight)
            assert theirs.scaling["default"] == update.scaling == 1.5
        for name, p in model.named_parameters():  # the head, which PEFT's does not train here
            if ".modules_to_save." in name:
                plain = name.replace(".modules_to_save.default", "")
                other.get_parameter(plain).copy_(p)
    return other, wanted, prefix


ONE = {"lora_target_modules": r".*\.(query|q|q_proj|query_proj|in_proj|Wqkv|qkv_proj|c_attn)"}
CASES = [
    *((family, "SEQ_CLS", targets) for family in FAMILIES for targets in (ONE, ALL)),
    *((family, "TOKEN_CLS", ALL) for family in ("bert", "mpnet", "deberta-v2", "gpt2")),
    *((family, "CAUSAL_LM", {}) for family in ("gpt2", "opt", "llama", "gemma2", "phi3")),
    *((family, "MASKED_LM", ALL) for family in ("roberta", "modernbert")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head", "targets"), CASES)
def test_it_is_peft_lora_of_the_upper_layers(family, head, targets):
    base = tiny(family, head)
    model = alone(base, None if head == "MASKED_LM" else head, **targets)
    late_of(model).upper = "padded"
    other, wanted, prefix = peft_lora(base, model)
    inputs = text_batch(family)
    mask = inputs["attention_mask"]
    at = None if head == "SEQ_CLS" else mask.bool()
    shape = (len(mask),) if head == "SEQ_CLS" else mask.shape
    labels = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(3))
    labels = labels if head == "SEQ_CLS" else labels.masked_fill(mask == 0, -100)
    got = run(model, at, **inputs, labels=labels)
    for p in other.parameters():
        p.requires_grad_(True)
    want = run(other, at, **inputs, labels=labels)
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-5)
    moved, largest = 0, max(grad.norm() for grad in want[2].values())
    for full in wanted:
        inner = full.removeprefix(f"{prefix}.")
        for part in ("lora_A", "lora_B"):
            ending = f".default.{inner}.{part}.weight"
            (mine,) = (grad for name, grad in got[2].items() if name.endswith(ending))
            theirs = want[2][f"base_model.model.{full}.{part}.default.weight"]
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7 * largest, full
            moved += bool(theirs.norm() > 0)
    assert moved > len(wanted)  # (the last layer's queries may be of no consequence)
    assert all(int(f.removeprefix(f"{prefix}.").split(".")[0]) >= K for f in wanted)


def test_it_begins_as_peft_does():
    """Nothing is added at first; A has PEFT's distribution, and its bounds."""
    base = tiny("bert", "SEQ_CLS")
    torch.manual_seed(0)
    model = get_peft_model(
        copy.deepcopy(base), LPTConfig(insertion_layer=2, generator="none", lora_r=4, **ALL)
    ).eval()
    with torch.no_grad():
        want = base(**batch()).logits
        torch.testing.assert_close(model(**batch()).logits, want, atol=1e-6, rtol=1e-6)
    for update in model.modules():
        if isinstance(update, LowRank):
            assert not update.lora_B.weight.any() and update.scaling == 2.0
            a = update.lora_A.weight
            bound = 1 / a.shape[1] ** 0.5  # of kaiming_uniform_(a=sqrt(5))
            assert 0.9 * bound < a.abs().max() <= bound and abs(a.mean()) < 0.1 * bound


def test_files(tmp_path):
    """Names on disk as a user of LoRA looks for them; loaded to the bit, on the meta device too."""
    base = tiny("bert", "SEQ_CLS")
    model = adapted(base, **ALL)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    layers = "base_model.model.bert.late_prompt.lpt_lora"
    assert f"{layers}.3.attention.self.query.lora_A.weight" in names
    assert f"{layers}.2.output.dense.lora_B.weight" in names
    assert not any(f"{layers}.1." in name or "default" in name for name in names)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_r"] == 2 and config["lora_target_modules"] == "all-linear"
    late_of(model).upper = "padded"
    with torch.no_grad():
        want = model(**batch()).logits
        for lean in (False, True):
            loaded = PeftModel.from_pretrained(
                copy.deepcopy(base), tmp_path, low_cpu_mem_usage=lean
            ).eval()
            late_of(loaded).upper = "padded"
            assert torch.equal(loaded(**batch()).logits, want)
            assert not any(p.requires_grad for p in loaded.parameters())
    assert "rank 2 on all-linear" in (tmp_path / "README.md").read_text()


def test_adapters_of_before(tmp_path):
    """A configuration without the new fields loads, and is what it was."""
    base = tiny("bert", "SEQ_CLS")
    model = get_peft_model(copy.deepcopy(base), lpt(task_type="SEQ_CLS")).eval()
    stir(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    old = {n: v for n, v in json.loads(path.read_text()).items() if not n.startswith("lora_")}
    path.write_text(json.dumps(old))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert loaded.peft_config["default"].lora_r is None and not late_of(loaded).lpt_lora
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_several_adapters():
    """Other layers, other targets, without LoRA and without a prompt, in one model."""
    base = tiny("bert", "SEQ_CLS")
    model = adapted(base, **ALL)
    others = {
        "deep": {"insertion_layer": 3, "lora_r": 4, "lora_target_modules": ["value"]},
        "plain": {"insertion_layer": 1},
        "alone": {"insertion_layer": 1, "generator": "none", "lora_r": 2},
    }
    for name, config in others.items():
        model.add_adapter(name, lpt(task_type="SEQ_CLS", prompt_dropout=0.0, **config))
        model.set_adapter(name)
        stir(model, seed=len(name))
    found, count = {}, {}
    for name in ("default", *others):
        model.set_adapter(name)
        trains = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all(f".{name}." in n for n in trains) and trains
        count[name] = sum(".lpt_lora." in n for n in trains)
        found[name] = model(**batch()).logits
        late_of(model).upper = "padded"
        torch.testing.assert_close(model(**batch()).logits, found[name], atol=1e-5, rtol=1e-5)
        late_of(model).upper = None
    assert count == {"default": 24, "deep": 2, "plain": 0, "alone": 36}
    assert len({round(float(x.sum()), 4) for x in found.values()}) == 4
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).logits, base(**batch()).logits)
    copied = copy.deepcopy(model)
    model.delete_adapter("deep")
    assert set(late_of(model).lpt_lora) == {"default", "alone"}
    model.set_adapter("default")
    assert torch.equal(model(**batch()).logits, found["default"])
    copied.set_adapter("deep")
    assert torch.equal(copied(**batch()).logits, found["deep"])
    plain = model.unload()
    torch.testing.assert_close(plain(**batch()).logits, base(**batch()).logits)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_merged_is_a_plain_model(family, tmp_path):
    """With its head and the names of its labels; transformers alone opens it."""
    base = tiny(family, "SEQ_CLS")
    model = alone(base, id2label={0: "bad", 1: "good"}, **ALL)
    inputs = text_batch(family)
    with torch.no_grad():
        want = model(**inputs).logits
        merged = model.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(**inputs).logits, want, atol=1e-5, rtol=1e-5)
        assert type(merged) is type(base) and not any("lora" in n for n in merged.state_dict())
        assert merged.config.id2label == {0: "bad", 1: "good"}
        merged.save_pretrained(tmp_path)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(**inputs).logits, want, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_merged():
    base = tiny("bert", "SEQ_CLS")
    with pytest.raises(ValueError, match="cannot be merged"):
        adapted(base).merge_and_unload()
    broken = alone(base, **ALL)
    with torch.no_grad():
        broken.get_parameter(
            "base_model.model.bert.late_prompt.lpt_lora.default.3.output.dense.lora_B.weight"
        )[0] = float("nan")
    before = {n: p.clone() for n, p in broken.named_parameters()}
    with pytest.raises(ValueError, match=r"NaN or infinite.*diverged"):
        broken.merge_and_unload(safe_merge=True)
    for name, p in broken.named_parameters():  # nothing was changed
        assert torch.equal(p.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    with pytest.raises(ValueError, match="active adapter alone"):
        alone(base).merge_and_unload(adapter_names=["default", "other"])
    shrunk = torch.ao.quantization.quantize_dynamic(base, {nn.Linear}, torch.qint8)
    with pytest.raises(ValueError, match="`lora_target_modules`"):
        alone(shrunk)  # whose linear layers are no nn.Linear any more


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_are_fp32(dtype):
    base = tiny("bert", "SEQ_CLS").to(dtype)
    model = adapted(base, **ALL)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    loss = model(**batch(), labels=torch.tensor([0, 1, 1, 0, 1])).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize(("family", "generator"), [("llama", "npg"), ("gpt2", "none")])
def test_generate_with_and_without_a_kv_cache(family, generator):
    model = adapted(tiny(family, "CAUSAL_LM"), "CAUSAL_LM", generator=generator, **ALL)
    inputs = batch("left")
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(**inputs, **how, use_cache=True)
    assert torch.equal(model.generate(**inputs, **how, use_cache=False), with_cache)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs, **how), with_cache)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_gradient_checkpointing(family):
    grads = []
    for checkpointing in (False, True):
        base = tiny(family, "SEQ_CLS")
        if checkpointing:
            base.gradient_checkpointing_enable()
        model = adapted(base, **ALL).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        grads.append(run(model, **batch(), labels=torch.tensor([0, 1, 1, 0, 1])))
    assert_equal_runs(grads[1], grads[0])


def test_dropout_above_the_insertion():
    """`upper_dropout` keeps the frozen layers' own dropout; late LoRA runs with it."""
    model = adapted(tiny("bert", "SEQ_CLS", hidden_dropout_prob=0.3), upper_dropout=True).train()
    torch.manual_seed(0)
    first, second = (model(**batch()).logits for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("generator", ["npg", "none"])
def test_export(generator, strict):
    model = adapted(tiny("bert", "SEQ_CLS"), generator=generator, **ALL)
    program = exported(model, strict)
    with torch.no_grad():
        for inputs in OTHERS:
            want = model(**inputs).logits
            torch.testing.assert_close(program(**inputs), want, atol=1e-5, rtol=1e-5)


def test_one_config_for_two_models():
    """What a model fills in is not what the next one is given."""
    config = LPTConfig(task_type="SEQ_CLS", generator="none", lora_r=2)
    first = get_peft_model(tiny("bert", "SEQ_CLS"), config)
    assert (config.lora_target_modules, config.lora_alpha) == ("all-linear", 4)
    config.lora_r = 3
    second = get_peft_model(tiny("gpt2", "SEQ_CLS"), config)
    assert second.peft_config["default"].lora_alpha == 6  # of its own rank
    assert first.peft_config["default"].lora_alpha == 4


WRONG = [
    ({"lora_r": 0}, r"`lora_r`.*at least 1, or None.*got 0"),
    ({"lora_r": -1}, r"`lora_r`.*got -1"),
    ({"lora_r": True}, r"`lora_r`.*got True"),
    ({"lora_r": 2.5}, r"`lora_r`.*got 2\.5"),
    ({"lora_r": 2, "lora_alpha": 0}, r"`lora_alpha`.*above 0.*got 0"),
    ({"lora_r": 2, "lora_alpha": float("nan")}, r"`lora_alpha`.*got nan"),
    ({"lora_r": 2, "lora_alpha": "x"}, r"`lora_alpha`.*got 'x'"),
    ({"lora_r": 2, "lora_dropout": 1.0}, r"`lora_dropout`.*\[0, 1\).*got 1\.0"),
    ({"lora_r": 2, "lora_target_modules": []}, r"`lora_target_modules`.*got \[\]"),
    ({"lora_r": 2, "lora_target_modules": [3]}, r"`lora_target_modules`.*got \[3\]"),
    ({"lora_alpha": 4}, r"`lora_alpha` is 4 and `lora_r` None.*give a rank"),
    ({"lora_dropout": 0.1}, r"`lora_dropout` is 0\.1 and `lora_r` None"),
    ({"lora_target_modules": ["query"]}, r"`lora_target_modules` is .* and `lora_r` None"),
    ({"generator": "none"}, r"`generator` is 'none' and `lora_r` None.*give a rank"),
    ({"num_virtual_tokens": 0}, r"at least 1 \(generator='none' makes no prompt\), got 0"),
]
WRONG_TARGETS = [
    ("bert", ["nothing"], r"got 'nothing', expected linear layers above.*query.*all-linear"),
    ("bert", ["query", "attention"], r"got 'attention', expected linear layers"),
    ("bert", ["layer.1.attention.self.query"], r"at or below insertion_layer=2.*never change"),
    ("bert", r".*layer\.[01]\..*query", r"at or below insertion_layer=2.*a cache keeps"),
    ("bert", r".*nothing", r"got '\.\*nothing', expected linear layers"),
    ("bert", ["uery"], r"got 'uery', expected linear layers"),
    ("gpt2", ["q_proj"], r"got 'q_proj', expected linear layers.*c_attn"),
    ("electra", ["embeddings_project"], r"got 'embeddings_project', expected linear layers"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_values(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        LPTConfig(**wrong)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize(("family", "targets", "message"), WRONG_TARGETS)
def test_wrong_targets(family, targets, message):
    base = tiny(family, "SEQ_CLS")
    with pytest.raises(ValueError, match=message) as error:
        adapted(base, lora_target_modules=targets)
    assert len(str(error.value)) <= 300
    assert "late_prompt" not in dict(find_backbone(base)[1].named_children())


def test_names_and_expressions():
    """As PEFT takes them: endings of names, or an expression for whole names."""
    base = tiny("bert", "SEQ_CLS")
    chosen = {
        ("output.dense",): {"attention.output.dense", "output.dense"},
        (r".*self\.(query|key)",): {"attention.self.query", "attention.self.key"},
    }
    for (wanted,), names in chosen.items():
        targets = wanted if wanted.startswith(".") else [wanted]
        found = late_of(adapted(base, lora_target_modules=targets)).lpt_lora["default"].names
        assert found == [(i, n) for i in range(K, LAYERS) for n in sorted_as(base, names)]
    one = adapted(base, lora_target_modules=["layer.3.attention.self.value"])
    assert late_of(one).lpt_lora["default"].names == [(3, "attention.self.value")]


def sorted_as(base, names):
    layer = find_backbone(base)[1].encoder.layer[0]
    return [n for n, _ in layer.named_modules() if n in names]
