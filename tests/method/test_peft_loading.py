"""Adapters loaded by PEFT's and Transformers' automatic classes and methods."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForSequenceClassification,
    get_peft_model,
)
from transformers import AutoModel, AutoModelForSequenceClassification

from tests.adapters import lpt, needs_own_adapters, stir
from tests.tiny import batch, tiny

# Transformers 5.17 loads an adapter of any PEFT method without its head when PEFT's own classes are
# not used; 5.18 does it right.
LOADS_HEADS = "AuxiliaryTrainingWrapper" in inspect.getsource(transformers.integrations.peft)
needs_heads = pytest.mark.skipif(not LOADS_HEADS, reason="this transformers loads no heads")


@pytest.fixture
def base_dir(tmp_path):
    """A saved base model for each kind."""

    def save(family="bert", kind="SEQ_CLS", **more):
        folder = tmp_path / f"base-{family}-{kind}"
        tiny(family, kind, **more).save_pretrained(folder)
        return str(folder)

    return save


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


@pytest.mark.slow
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


@pytest.mark.slow
@needs_heads
@needs_own_adapters
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
