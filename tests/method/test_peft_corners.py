"""Corners that a review found: shared configs, label spaces, threads, users' own classes."""

from __future__ import annotations

import threading

import pytest
import torch
from peft import (
    get_peft_model,
)

from tests.adapters import lpt
from tests.tiny import batch, tiny


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


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mpnet", "relative_attention_bias"),
        ("deberta", "rel_embeddings"),
        ("deberta-v2", "encoder.rel_embeddings"),
        ("deberta-v2", "encoder.LayerNorm"),
    ],
)
def test_nothing_that_layers_on_both_sides_share_can_be_trained(family, name):
    with pytest.raises(ValueError, match=f"`modules_to_save` names '{name}'.*nothing trains"):
        get_peft_model(tiny(family, "SEQ_CLS"), lpt(modules_to_save=[name]))


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


@pytest.mark.parametrize("name", ["update", "keys", "pop"])
def test_names_that_no_module_can_have(name):
    """Adapters are kept in a ModuleDict, whose own KeyError says nothing of names."""
    model = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=f"The adapter name '{name}' is that of a method"):
        model.add_adapter(name, lpt(task_type="SEQ_CLS"))
    assert list(model.peft_config) == ["default"]
