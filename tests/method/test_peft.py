"""What users of PEFT rely on, by the ideas of PEFT's own common tests."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from lpt_fast.backbone.families import find_backbone, get_layers
from tests.adapters import lpt, stir
from tests.tiny import FAMILIES, batch, tiny

KINDS = {
    "gpt2": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "deberta-v2": "TOKEN_CLS",
    "roberta": "QUESTION_ANS",
}


def logits_of(out) -> torch.Tensor:
    return out.start_logits if hasattr(out, "start_logits") else out.logits


@pytest.mark.slow
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
    with pytest.raises(ValueError, match=r"one adapter for all texts, got .* \(adapter_names\)"):
        model.base_model.set_adapter(["default", "second"])


@pytest.mark.slow
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
    ("mpnet", "SEQ_CLS"): {"classifier"},
    ("mpnet", "QUESTION_ANS"): {"qa_outputs"},
    ("mpnet", "MASKED_LM"): set(),
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


@pytest.mark.slow
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
            settings = {"use_reentrant": reentrant}
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        torch.manual_seed(5)
        model = get_peft_model(base, lpt(insertion_layer=2, prompt_dropout=0.0)).train()
        backbone, line = find_backbone(base)[1:]
        runs = {}
        for k in (1, 3):  # below and above the insertion
            layer = get_layers(backbone, line)[k]
            part = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear | Conv1D))
            runs[k] = []
            part.register_forward_hook(lambda *a, seen=runs[k]: seen.append(1))
            assert not any(m.training for m in layer.modules() if isinstance(m, torch.nn.Dropout))
        model(**batch()).last_hidden_state.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        calls.append([len(runs[1]), len(runs[3])])
    (below, above), recomputed = calls
    assert below > 0 and above > 0 and recomputed == [below, 2 * above]
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


def test_masks_and_packing_that_cannot_work_are_refused():
    model = get_peft_model(tiny("llama"), lpt()).eval()
    ids = batch("none")["input_ids"]
    with pytest.raises(ValueError, match=r"2-D attention_mask \[B, S\].*got 4-D"):
        model(input_ids=ids, attention_mask=torch.ones(5, 1, 9, 9))
    with pytest.raises(ValueError, match="packed into one row"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]))
