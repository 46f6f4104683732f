"""The stock Hugging Face Trainer on a model with a late prompt."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer

from lpt_fast import LPTConfig
from lpt_fast.backbone.families import find_backbone, get_layers
from tests.tiny import batch, tiny
from tests.train.cases import assert_same, collate, new_model, rows, trained, trainer_for


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["static", "npg", "appg", "mppg", "attention", "residual"])
def test_training_lowers_the_loss(tmp_path, generator):
    model = new_model(generator=generator)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = trained(model)
    trainer = trainer_for(model, tmp_path, num_train_epochs=25, learning_rate=1e-2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    for name, p in model.named_parameters():
        if not p.requires_grad:
            torch.testing.assert_close(p, frozen[name], atol=0, rtol=0)
    moved = [n for n, p in trained(model).items() if not torch.equal(p, before[n])]
    assert any("lpt_generator" in n for n in moved) and any("classifier" in n for n in moved)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_accuracy"] <= 1 and metrics["eval_loss"] > 0
    assert trainer.predict(rows(16, 1)).predictions.shape == (16, 2)


class Gradients(Trainer):
    """Keeps the gradients of the first optimiser step."""

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        parameters = dict(self.model.named_parameters())

        def keep(*_):
            if not hasattr(self, "grads"):
                self.grads = {
                    n: p.grad.clone() for n, p in parameters.items() if p.grad is not None
                }

        optimizer.register_step_pre_hook(keep)
        return optimizer


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_gradient_accumulation_equals_one_big_batch(tmp_path, family):
    grads = []
    for size, steps in ((16, 1), (4, 4)):
        model = new_model(family, prompt_dropout=0.0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = trainer_for(
            model,
            tmp_path,
            rows(16),
            Gradients,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
        )
        trainer.train()
        grads.append(trainer.grads)
        assert trainer.grads.keys() == trained(model).keys()
    assert_same(*grads, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_resume_equals_an_uninterrupted_run(tmp_path):
    settings = {"num_train_epochs": 3, "save_strategy": "epoch", "seed": 5}
    whole = new_model()
    trainer_for(whole, tmp_path / "whole", **settings).train()
    first = new_model()
    stopped = trainer_for(first, tmp_path / "parts", **settings)

    from transformers import TrainerCallback

    class StopAfterOne(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    stopped.add_callback(StopAfterOne())
    stopped.train()
    second = new_model()
    with torch.no_grad():
        for p in second.parameters():
            if p.requires_grad:
                p.add_(1.0)  # what is not restored would show
    trainer_for(second, tmp_path / "parts", **settings).train(resume_from_checkpoint=True)
    assert_same(trained(second), trained(whole), atol=0, rtol=0)


@pytest.mark.slow
def test_load_best_model_at_end(tmp_path):
    """The best epoch's weights come back, and what trained still trains."""
    model = new_model()
    trainer = trainer_for(
        model,
        tmp_path,
        num_train_epochs=4,
        learning_rate=5e-2,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    names = trained(model).keys()
    trainer.train()
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert abs(trainer.evaluate()["eval_loss"] - min(losses)) < 1e-6
    assert trained(model).keys() == names
    model.train()
    model(**collate(rows(4))).loss.backward()


@pytest.mark.slow
def test_label_smoothing(tmp_path):
    losses = []
    for smoothing in (0.0, 0.3):
        model = new_model(prompt_dropout=0.0)
        trainer = trainer_for(model, tmp_path, label_smoothing_factor=smoothing, max_steps=1)
        inputs = collate(rows(8))
        model.eval()
        with torch.no_grad():
            losses.append(float(trainer.compute_loss(model, dict(inputs))))
            logits = model(**inputs).logits
        expected = torch.nn.functional.cross_entropy(
            logits, inputs["labels"], label_smoothing=smoothing
        )
        assert abs(losses[-1] - float(expected)) < 1e-6
        trainer.train()
    assert losses[0] != losses[1]


def test_causal_lm_without_labels_in_training_warns():
    base = tiny("gpt2", "CAUSAL_LM")
    model = get_peft_model(base, LPTConfig(task_type="CAUSAL_LM", bottleneck_size=4)).train()
    with pytest.warns(UserWarning, match="answer included"):
        model(**batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch(), context_lengths=torch.ones(5, dtype=torch.long))
        model.eval()
        model(**batch())


# -- what the frozen layers do while the model trains ----------------------------------------------


@pytest.mark.parametrize(
    "family", ["bert", "mpnet", "deberta-v2", "modernbert", "gpt2", "llama", "opt"]
)
def test_no_graph_and_no_gradient_below_the_insertion(family):
    """Autograd saves no tensor of a layer at or below k, and keeps none of their parameters."""
    k = 2
    base = tiny(family, "SEQ_CLS")
    model = get_peft_model(
        base, LPTConfig(task_type="SEQ_CLS", insertion_layer=k, bottleneck_size=4)
    ).train()
    backbone, line = find_backbone(base)[1:]
    layers = get_layers(backbone, line)
    base.enable_input_require_grads()  # as gradient checkpointing asks for; it must not matter
    below = {p.data_ptr() for layer in layers[:k] for p in layer.parameters()}
    below |= {p.data_ptr() for p in base.get_input_embeddings().parameters()}
    above = {p.data_ptr() for layer in layers[k:] for p in layer.parameters()}
    saved, made_below = [], set()

    def watch(layer):
        layer.register_forward_hook(
            lambda m, a, out: made_below.add((out[0] if isinstance(out, tuple) else out).grad_fn)
        )

    for layer in layers[:k]:
        watch(layer)

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**collate(rows(6))).loss
    assert made_below == {None}
    assert not below & set(saved)
    assert above & set(saved)  # the check sees what is saved
    loss.backward()
    for p in backbone.parameters():
        assert p.grad is None or p.requires_grad


@pytest.mark.parametrize("upper_dropout", [False, True])
@pytest.mark.parametrize(
    "family", ["bert", "roberta", "mpnet", "deberta", "modernbert", "gpt2", "opt", "t5"]
)
def test_modes_of_frozen_layers(family, upper_dropout):
    base = tiny(family)
    model = get_peft_model(
        base, LPTConfig(insertion_layer=2, upper_dropout=upper_dropout, bottleneck_size=4)
    )
    backbone, line = find_backbone(base)[1:]
    layers = get_layers(backbone, line)

    def check():
        for layer in layers[:2]:
            assert not any(m.training for m in layer.modules())
        for layer in layers[2:]:
            assert all(m.training == upper_dropout for m in layer.modules())
        assert not any(m.training for m in backbone.get_input_embeddings().modules())

    model.train()
    check()
    assert backbone.late_prompt.lpt_generator["default"].training
    for layer in layers:
        layer.train()  # somebody meddles
    model(**batch())
    check()
    model.eval()
    assert not any(m.training for m in model.modules())


def test_dropout_is_where_it_should_be():
    """In training the prompt is noisy, the frozen layers are not, unless asked."""
    outputs = {}
    for name, settings in {
        "none": {"prompt_dropout": 0.0},
        "prompt": {"prompt_dropout": 0.5},
        "upper": {"prompt_dropout": 0.0, "upper_dropout": True},
    }.items():
        base = tiny("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
        torch.manual_seed(1)
        model = get_peft_model(base, LPTConfig(bottleneck_size=8, **settings)).train()
        seen = []
        base.encoder.layer[1].register_forward_hook(lambda m, a, o, seen=seen: seen.append(o))
        inputs = batch()  # seeds the generator, so once
        runs = [model(**inputs).last_hidden_state for _ in range(2)]
        outputs[name] = torch.equal(*runs)
        torch.testing.assert_close(*seen, atol=0, rtol=0)
    assert outputs == {"none": True, "prompt": False, "upper": False}


@pytest.mark.slow
def test_copy_in_training_mode_survives(tmp_path):
    model = new_model().train()
    twin = copy.deepcopy(model)
    trainer_for(twin, tmp_path, max_steps=1).train()
    assert_same(trained(model), trained(new_model()), atol=0, rtol=0)
