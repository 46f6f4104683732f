"""What users of PEFT rely on, by the ideas of PEFT's own common tests."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from tiny import FAMILIES, batch, tiny
from transformers import AutoModel, AutoModelForSequenceClassification

from lpt_fast import LPTConfig

# Transformers 5.17 loads an adapter of any PEFT method without its head when PEFT's own classes are
# not used; 5.18 does it right.
LOADS_HEADS = "AuxiliaryTrainingWrapper" in inspect.getsource(transformers.integrations.peft)
needs_heads = pytest.mark.skipif(not LOADS_HEADS, reason="this transformers loads no heads")
KINDS = {
    "gpt2": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "deberta-v2": "TOKEN_CLS",
    "roberta": "QUESTION_ANS",
}


def lpt(**more) -> LPTConfig:
    return LPTConfig(**{"bottleneck_size": 6, "num_virtual_tokens": 3, **more})


def logits_of(out) -> torch.Tensor:
    return out.start_logits if hasattr(out, "start_logits") else out.logits


def stir(model, seed=3) -> None:
    """Stands in for training: moves everything trainable."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)


@pytest.fixture
def base_dir(tmp_path):
    """A saved base model for each kind."""

    def save(family="bert", kind="SEQ_CLS", **more):
        folder = tmp_path / f"base-{family}-{kind}"
        tiny(family, kind, **more).save_pretrained(folder)
        return str(folder)

    return save


@pytest.mark.parametrize(("family", "kind"), KINDS.items())
@pytest.mark.parametrize("generator", ["static", "npg", "mppg", "attention", "residual"])
def test_save_and_load(family, kind, generator, tmp_path):
    base = tiny(family, kind)
    model = get_peft_model(copy.deepcopy(base), lpt(task_type=kind, generator=generator)).eval()
    stir(model)
    inputs = batch()
    expected = logits_of(model(**inputs))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    # Nothing is lost, nothing of the frozen model is saved, and no key carries the adapter's name.
    assert len(saved) == len(trained)
    assert sum(t.numel() for t in saved.values()) == model.get_nb_trainable_parameters()[0]
    assert not any("default" in name for name in saved)
    assert any(".lpt_generator." in name for name in saved)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits_of(loaded(**inputs)), expected, atol=0, rtol=0)
    assert not any(p.requires_grad for p in loaded.parameters())
    renamed = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, adapter_name="other")
    torch.testing.assert_close(logits_of(renamed(**inputs)), expected, atol=0, rtol=0)


def test_parameter_names_in_files_are_fixed(tmp_path):
    shapes = {
        "static": {"prompt_embedding.weight": (3, 32)},
        "npg": {
            "proj_down.weight": (6, 32),
            "proj_down.bias": (6,),
            "proj_up.weight": (96, 6),
            "proj_up.bias": (96,),
        },
        "mppg": {
            "proj_down.weight": (6, 32),
            "proj_down.bias": (6,),
            "proj_up.weight": (32, 6),
            "proj_up.bias": (32,),
        },
    }
    shapes["appg"] = shapes["mppg"]
    for kind, expected in shapes.items():
        model = get_peft_model(tiny("bert", "MASKED_LM"), lpt(generator=kind))
        model.save_pretrained(tmp_path / kind)
        saved = load_file(tmp_path / kind / "adapter_model.safetensors")
        prefix = "base_model.model.bert.late_prompt.lpt_generator."
        assert {k.removeprefix(prefix): tuple(v.shape) for k, v in saved.items()} == expected


def test_continue_training(tmp_path):
    base = tiny("bert", "SEQ_CLS")
    model = get_peft_model(copy.deepcopy(base), lpt(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    again(**batch(), labels=torch.tensor([0, 1, 0, 1, 1])).loss.backward()
    for name, p in again.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert not p.requires_grad or p.grad.abs().sum() > 0 or "proj" in name, name


def test_several_adapters(tmp_path):
    base = tiny("bert", "SEQ_CLS")
    inputs = batch()
    model = get_peft_model(copy.deepcopy(base), lpt(task_type="SEQ_CLS", insertion_layer=1)).eval()
    stir(model, 1)
    first = model(**inputs).logits
    model.add_adapter(
        "second",
        lpt(task_type="SEQ_CLS", insertion_layer=3, generator="appg", num_virtual_tokens=7),
    )
    assert all("second" not in n for n, p in model.named_parameters() if p.requires_grad)
    torch.testing.assert_close(model(**inputs).logits, first, atol=0, rtol=0)
    model.set_adapter("second")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all("second" in n for n in names)
    stir(model, 2)
    second = model(**inputs).logits
    assert not torch.allclose(first, second)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    torch.testing.assert_close(loaded(**inputs).logits, first, atol=0, rtol=0)
    loaded.set_adapter("second")
    loaded.eval()
    torch.testing.assert_close(loaded(**inputs).logits, second, atol=0, rtol=0)
    model.delete_adapter("second")
    model.eval()
    assert not any("second" in n for n, _ in model.named_parameters())
    model.set_adapter("default")
    torch.testing.assert_close(model(**inputs).logits, first, atol=0, rtol=0)
    with pytest.raises(ValueError, match="second"):
        model.set_adapter("second")
    with pytest.raises(ValueError, match="one adapter at a time"):
        model.base_model.set_adapter(["default", "second"])


@torch.no_grad()  # sdpa takes another way when weights want gradients, and "exactly" means exactly
@pytest.mark.parametrize("family", FAMILIES)
def test_disable_and_unload_give_the_base_model(family):
    base = tiny(family)
    inputs = batch("left")
    expected = base(**inputs).last_hidden_state
    names = list(base.state_dict())
    model = get_peft_model(copy.deepcopy(base), lpt()).eval()
    changed = model(**inputs).last_hidden_state
    assert not torch.allclose(changed, expected, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected, atol=0, rtol=0)
    torch.testing.assert_close(model(**inputs).last_hidden_state, changed, atol=0, rtol=0)
    unloaded = model.unload()
    assert type(unloaded) is type(base)
    assert list(unloaded.state_dict()) == names
    assert "forward" not in vars(unloaded)
    torch.testing.assert_close(unloaded(**inputs).last_hidden_state, expected, atol=0, rtol=0)
    again = get_peft_model(unloaded, lpt()).eval()
    assert not torch.allclose(again(**inputs).last_hidden_state, expected, atol=1e-3)


def test_unload_gives_the_untrained_head_back():
    base = tiny("bert", "SEQ_CLS")
    inputs = batch()
    model = get_peft_model(copy.deepcopy(base), lpt(task_type="SEQ_CLS")).eval()
    stir(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits, atol=0, rtol=0)
    torch.testing.assert_close(
        model.unload()(**inputs).logits, base(**inputs).logits, atol=0, rtol=0
    )


HEADS = {
    ("bert", "SEQ_CLS"): {"bert.pooler", "classifier"},
    ("roberta", "SEQ_CLS"): {"classifier"},
    ("electra", "SEQ_CLS"): {"classifier"},
    ("deberta", "SEQ_CLS"): {"pooler", "classifier"},
    ("deberta-v2", "SEQ_CLS"): {"pooler", "classifier"},
    ("modernbert", "SEQ_CLS"): {"head", "classifier"},
    ("modernbert", "TOKEN_CLS"): {"head", "classifier"},
    ("gpt2", "SEQ_CLS"): {"score"},
    ("opt", "SEQ_CLS"): {"score"},
    ("llama", "SEQ_CLS"): {"score"},
    ("t5", "SEQ_CLS"): {"classification_head"},
    ("bert", "TOKEN_CLS"): {"classifier"},
    ("bert", "QUESTION_ANS"): {"qa_outputs"},
    ("bert", "MASKED_LM"): set(),
    ("gpt2", "CAUSAL_LM"): set(),
    ("t5", "SEQ_2_SEQ_LM"): set(),
    ("t5", "base"): set(),
    ("bert", "base"): set(),
    ("opt", "base"): set(),
}


@pytest.mark.parametrize(("family", "kind"), HEADS)
def test_the_whole_head_trains(family, kind):
    """Everything with weights after the last layer, a pooler inside the backbone included;
    nothing else.
    """
    task = kind if kind not in ("base", "MASKED_LM") else None
    model = get_peft_model(tiny(family, kind), lpt(task_type=task))
    wrappers = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if type(module).__name__ == "ModulesToSaveWrapper"
    }
    assert wrappers == HEADS[family, kind]
    for name, p in model.named_parameters():
        assert p.requires_grad == (".lpt_generator." in name or ".modules_to_save." in name), name


def test_head_can_be_left_out():
    model = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS", train_head=False))
    trained = {
        n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad and "lpt_" not in n
    }
    assert trained == {"classifier"}  # PEFT's own rule


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merge_is_refused(call):
    model = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="cannot be merged"):
        getattr(model, call)()


def test_print_trainable_parameters(capsys):
    model = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS"))
    model.print_trainable_parameters()
    npg = 6 * 32 + 6 + 96 * 6 + 96
    pooler_and_classifier = 32 * 32 + 32 + 2 * 32 + 2
    assert f"trainable params: {npg + pooler_and_classifier:,} ||" in capsys.readouterr().out


def test_mixed_adapter_batches_are_refused():
    model = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS")).eval()
    with pytest.raises(ValueError, match="`adapter_names`.*set_adapter"):
        model(**batch(), adapter_names=["default", "__base__", "default", "default", "default"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "family", ["bert", "deberta-v2", "modernbert", "gpt2", "opt", "llama", "t5"]
)
def test_gradient_checkpointing(family, reentrant):
    """The same gradients; and it does recompute, although the frozen layers are in eval mode."""
    grads, calls = [], []
    for checkpointing in (False, True):
        base = tiny(family)
        if checkpointing:
            base.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        torch.manual_seed(5)
        model = get_peft_model(base, lpt(insertion_layer=2, prompt_dropout=0.0)).train()
        seen = []
        layer = next(m for m in base.modules() if hasattr(m, "late_prompt"))
        top = layer.late_prompt.family.layers
        layer.get_submodule(top)[3].register_forward_hook(lambda *a, seen=seen: seen.append(1))
        model(**batch()).last_hidden_state.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        inner = [
            m for m in layer.get_submodule(top)[3].modules() if isinstance(m, torch.nn.Dropout)
        ]
        assert not any(m.training for m in inner)
        calls.append(base)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "kind"), [("bert", "SEQ_CLS"), ("llama", "SEQ_CLS"), ("gpt2", "CAUSAL_LM")]
)
def test_half_precision_base_with_fp32_adapter(family, kind, dtype):
    model = get_peft_model(tiny(family, kind).to(dtype), lpt(task_type=kind))
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else dtype), name
    labels = torch.tensor([0, 1, 0, 1, 1]) if kind == "SEQ_CLS" else batch()["input_ids"].clone()
    if kind == "CAUSAL_LM":
        labels[:, 0] = -100
    loss = model(**batch(), labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.isfinite(p.grad).all(), name


def test_autocast_adapter_dtype_off():
    base = tiny("bert", "SEQ_CLS").to(torch.bfloat16)
    model = get_peft_model(base, lpt(task_type="SEQ_CLS"), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(**batch(), labels=torch.tensor([0, 1, 0, 1, 1])).loss.backward()


def test_low_cpu_mem_usage(tmp_path):
    base = tiny("bert", "SEQ_CLS")
    model = get_peft_model(copy.deepcopy(base), lpt(task_type="SEQ_CLS")).eval()
    stir(model)
    model.save_pretrained(tmp_path)
    expected = model(**batch()).logits
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    torch.testing.assert_close(loaded(**batch()).logits, expected, atol=0, rtol=0)
    on_meta = get_peft_model(copy.deepcopy(base), lpt(task_type="SEQ_CLS"), low_cpu_mem_usage=True)
    assert any(p.is_meta for p in on_meta.parameters())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "deberta", "opt"])
def test_inputs_embeds(family):
    model = get_peft_model(tiny(family), lpt()).eval()
    inputs = batch()
    expected = model(**inputs).last_hidden_state
    embeds = model.get_base_model().get_input_embeddings()(inputs.pop("input_ids"))
    got = model(inputs_embeds=embeds, **inputs).last_hidden_state
    torch.testing.assert_close(got, expected)


def test_auto_classes_know_the_labels(base_dir, tmp_path):
    """Six labels, although the base model is built with two before the adapter is looked at."""
    names = {i: w for i, w in enumerate("abcdef")}
    base = base_dir("bert", "SEQ_CLS")
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=6, id2label=names, ignore_mismatched_sizes=True
    )
    model = get_peft_model(model, lpt(task_type="SEQ_CLS")).eval()
    stir(model)
    expected = model(**batch()).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(**batch()).logits, expected)
    assert loaded.config.id2label == names and loaded.config.label2id["f"] == 5
    assert loaded(**batch(), labels=torch.tensor([5, 4, 3, 2, 1])).loss > 0
    with loaded.disable_adapter():
        assert loaded(**batch()).logits.shape == (5, 2)
        assert loaded.config.num_labels == 2
    assert loaded.config.num_labels == 6
    if not LOADS_HEADS:
        return
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(**batch()).logits, expected)
    assert plain.config.id2label == names


def test_adapters_with_different_labels():
    model = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS"))
    model.add_adapter("three", lpt(task_type="SEQ_CLS", id2label={0: "x", 1: "y", 2: "z"}))
    model.add_adapter("plain", lpt(task_type="SEQ_CLS"))
    model.set_adapter("three")
    assert model(**batch(), labels=torch.tensor([2, 1, 0, 1, 2])).logits.shape == (5, 3)
    assert model.config.id2label[2] == "z"
    model.set_adapter("plain")
    assert model(**batch(), labels=torch.tensor([0, 1, 0, 1, 1])).logits.shape == (5, 2)
    assert model.peft_config["plain"].num_labels == 2


def test_auto_model_for_other_tasks(base_dir, tmp_path):
    model = get_peft_model(
        AutoModel.from_pretrained(base_dir("bert", "base")), lpt(task_type="FEATURE_EXTRACTION")
    ).eval()
    expected = model(**batch()).last_hidden_state
    model.save_pretrained(tmp_path / "fe")
    loaded = AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "fe")
    torch.testing.assert_close(loaded(**batch()).last_hidden_state, expected)
    bare = AutoModel.from_pretrained(tmp_path / "fe").eval()
    torch.testing.assert_close(bare(**batch()).last_hidden_state, expected)

    base = base_dir("gpt2", "CAUSAL_LM")
    model = AutoPeftModelForCausalLM  # loads below
    lm = get_peft_model(tiny("gpt2", "CAUSAL_LM"), lpt(task_type="CAUSAL_LM")).eval()
    lm.peft_config["default"].base_model_name_or_path = base
    lm.save_pretrained(tmp_path / "lm")
    torch.testing.assert_close(
        model.from_pretrained(tmp_path / "lm")(**batch()).logits, lm(**batch()).logits
    )


@needs_heads
def test_transformers_own_adapter_methods(tmp_path):
    """model.add_adapter / load_adapter / set_adapter / disable_adapters, without a PeftModel."""
    base = tiny("bert", "SEQ_CLS")
    trained = get_peft_model(copy.deepcopy(base), lpt(task_type="SEQ_CLS")).eval()
    stir(trained)
    trained.save_pretrained(tmp_path)
    expected = trained(**batch()).logits
    model = copy.deepcopy(base)
    model.load_adapter(str(tmp_path), adapter_name="mine")
    model.eval()
    torch.testing.assert_close(model(**batch()).logits, expected)
    model.disable_adapters()
    torch.testing.assert_close(model(**batch()).logits, base(**batch()).logits)
    model.enable_adapters()
    model.eval()
    torch.testing.assert_close(model(**batch()).logits, expected)
    fresh = copy.deepcopy(base)
    fresh.add_adapter(lpt(), "new")
    assert {n.split(".")[1] for n, p in fresh.named_parameters() if p.requires_grad} >= {
        "late_prompt"
    }


def test_adapter_on_a_model_of_another_size(tmp_path):
    model = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS", insertion_layer=3))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny("bert", "SEQ_CLS", hidden_size=16), tmp_path)
    with pytest.raises(ValueError, match="`insertion_layer` must be between 1 and 1 .* got 3"):
        PeftModel.from_pretrained(tiny("bert", "SEQ_CLS", num_hidden_layers=2), tmp_path)


def test_deepcopy_is_independent():
    model = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS")).eval()
    before = model(**batch()).logits
    twin = copy.deepcopy(model)
    stir(twin)
    torch.testing.assert_close(model(**batch()).logits, before, atol=0, rtol=0)
    assert not torch.allclose(twin(**batch()).logits, before)
    del model
    assert twin(**batch()).logits.shape == (5, 2)


def test_fold_residual_to_static(tmp_path):
    base = tiny("bert", "SEQ_CLS")
    model = get_peft_model(
        copy.deepcopy(base), lpt(task_type="SEQ_CLS", generator="residual")
    ).eval()
    stir(model)
    expected = model(**batch()).logits
    model.base_model.fold_adapter()
    torch.testing.assert_close(model(**batch()).logits, expected)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert [n.split("lpt_generator.")[1] for n in saved if "lpt_" in n] == [
        "prompt_embedding.weight"
    ]
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(**batch()).logits, expected)
    with pytest.raises(ValueError, match="Only a 'residual' generator folds.*'static'"):
        model.base_model.fold_adapter()


def test_init_from_vocab():
    base = tiny("bert", "SEQ_CLS")
    torch.manual_seed(0)
    model = get_peft_model(
        base, lpt(generator="static", init_from_vocab=True, num_virtual_tokens=9)
    )
    prompt = (
        model.get_base_model().bert.late_prompt.lpt_generator["default"].prompt_embedding.weight
    )
    # States after a layer norm have a mean of 0 and a variance of 1 in each row; random numbers do
    # not.
    torch.testing.assert_close(prompt.mean(1), torch.zeros(9), atol=1e-5, rtol=0)
    torch.testing.assert_close(prompt.var(1, unbiased=False), torch.ones(9), atol=1e-4, rtol=0)


def test_wrapping_twice_warns_and_hooks_do_not_pile_up():
    base = tiny("bert", "SEQ_CLS")
    for _ in range(3):
        model = get_peft_model(base, lpt(task_type="SEQ_CLS"))
        base = model.unload()
        assert len(base._forward_pre_hooks) == 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        get_peft_model(get_peft_model(base, lpt()).get_base_model(), lpt())
    assert any("second time" in str(w.message) for w in seen)


def test_an_example_without_tokens_is_refused():
    model = get_peft_model(tiny("bert"), lpt()).eval()
    inputs = batch()
    inputs["attention_mask"][3] = 0
    with pytest.raises(ValueError, match="no attended token"):
        model(**inputs)


def test_masks_and_packing_that_cannot_work_are_refused():
    model = get_peft_model(tiny("llama"), lpt()).eval()
    ids = batch("none")["input_ids"]
    with pytest.raises(ValueError, match=r"2-D attention_mask \[B, S\].*got 4-D"):
        model(input_ids=ids, attention_mask=torch.ones(5, 1, 9, 9))
    with pytest.raises(ValueError, match="packed into one row"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]))


def test_one_config_object_for_several_models_and_adapters():
    config = lpt(task_type="SEQ_CLS", generator="residual")
    first = get_peft_model(tiny("bert", "SEQ_CLS"), config)
    second = get_peft_model(tiny("roberta", "SEQ_CLS", num_labels=6, num_hidden_layers=6), config)
    assert second(**batch()).logits.shape == (5, 6)
    assert second.peft_config["default"].insertion_layer == 3
    assert first.peft_config["default"].insertion_layer == 2
    first.add_adapter("b", config)
    first.base_model.fold_adapter("default")
    assert first.peft_config["b"].generator == "residual"


def test_folding_keeps_a_frozen_adapter_frozen():
    model = get_peft_model(tiny("bert"), lpt(generator="residual"))
    model.add_adapter("b", lpt(generator="residual"))
    model.base_model.fold_adapter("b")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".b." in n)


def test_users_subclasses():
    """A language model is one by its base class, a head one whatever its class is called."""
    from transformers import BertModel, BertPreTrainedModel, LlamaForCausalLM
    from transformers.modeling_outputs import SequenceClassifierOutput

    class MyLM(LlamaForCausalLM):
        pass

    class RewardModel(BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = BertModel(config)
            self.reward_head = torch.nn.Linear(config.hidden_size, 1)

        def forward(self, input_ids, attention_mask=None, **kwargs):
            out = self.bert(input_ids, attention_mask=attention_mask)
            return SequenceClassifierOutput(logits=self.reward_head(out.pooler_output))

    model = get_peft_model(MyLM(tiny("llama").config).eval(), lpt(task_type="CAUSAL_LM"))
    assert model.peft_config["default"].modules_to_save is None
    inputs = batch("none")
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    with torch.no_grad():
        before = model(**inputs, labels=labels).logits
        inputs["input_ids"][:, 6] += 1
        after = model(**inputs, labels=labels).logits
    torch.testing.assert_close(before[:, :6], after[:, :6])
    reward = get_peft_model(RewardModel(tiny("bert").config), lpt(task_type="SEQ_CLS"))
    trained = {n.split(".")[2] for n, p in reward.named_parameters() if p.requires_grad}
    assert trained == {"bert", "reward_head"}


def test_a_plain_module_around_a_backbone():
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = tiny("bert")
            self.top = torch.nn.Linear(32, 3)

        def forward(self, **inputs):
            return self.top(self.encoder(**inputs).pooler_output)

    model = get_peft_model(Mine(), lpt())
    model(**batch()).sum().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("top" in n for n in trained) and any("lpt_generator" in n for n in trained)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["embeddings", "encoder.layer.0", "dense"])
def test_nothing_below_the_insertion_can_be_trained(name):
    with pytest.raises(ValueError, match=f"`modules_to_save` names '{name}'.*nothing trains"):
        get_peft_model(tiny("bert", "SEQ_CLS"), lpt(modules_to_save=[name]))


def test_problem_type_belongs_to_the_adapter():
    """A regression and a classification on one model, each with its own loss, in any order."""
    model = get_peft_model(tiny("bert", "SEQ_CLS", num_labels=3), lpt(task_type="SEQ_CLS"))
    model.add_adapter("grade", lpt(task_type="SEQ_CLS", num_labels=1))
    for _ in range(2):
        model.set_adapter("grade")
        out = model(**batch(), labels=torch.rand(5))
        assert out.logits.shape == (5, 1) and model.config.problem_type == "regression"
        model.set_adapter("default")
        labels = torch.tensor([0, 1, 2, 1, 0])
        out = model(**batch(), labels=labels)
        torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))


def test_modes_return_with_the_base_model():
    base = tiny("bert", hidden_dropout_prob=0.5)
    model = get_peft_model(base, lpt()).train()
    assert not base.encoder.layer[3].training
    with model.disable_adapter():
        assert all(layer.training for layer in base.encoder.layer)
    assert not base.encoder.layer[3].training
    unloaded = model.unload()
    assert all(m.training for m in unloaded.modules())


def test_threads_do_not_mix_contexts():
    import threading

    model = get_peft_model(tiny("gpt2", "CAUSAL_LM"), lpt(task_type="CAUSAL_LM")).eval()
    inputs = batch("none")
    contexts = [torch.full((5,), n) for n in (2, 7)]
    expected = [model(**inputs, context_lengths=c).logits for c in contexts]
    barrier = threading.Barrier(2)

    def meet(*_):
        barrier.wait()

    model.get_base_model().register_forward_pre_hook(meet)
    got = [None, None]

    def work(i):
        with torch.no_grad():
            got[i] = model(**inputs, context_lengths=contexts[i]).logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_failed_call_leaves_nothing_behind():
    model = get_peft_model(tiny("gpt2", "CAUSAL_LM"), lpt(task_type="CAUSAL_LM")).eval()
    inputs = batch("none")
    transformer = model.get_base_model().transformer
    expected = transformer(**inputs).last_hidden_state
    with pytest.raises(TypeError):
        model(**inputs, context_lengths=torch.full((5,), 2), no_such_argument=object(), input_ids=3)
    with pytest.raises(ValueError):
        model(context_lengths=torch.full((5,), 2))
    torch.testing.assert_close(transformer(**inputs).last_hidden_state, expected)


def test_status_reports():
    model = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS"))
    status = model.get_model_status()
    assert status.peft_types == {"default": "LPT"} and status.enabled is True
    assert status.active_adapters == ["default"] and status.requires_grad == {"default": True}
