"""Late LoRA trains with other heads, without one, and with gradient checkpointing."""

from __future__ import annotations

import pytest
from transformers import Trainer

from lpt_fast import LPTTrainer
from lpt_fast.train.trainer import find_late_prompt
from tests.train.cases import (
    CLOSE,
    Stop,
    arguments,
    assert_same,
    cached,
    collate,
    model_of,
    on_text,
    padded_labels,
    rows,
    stock,
    trained,
    with_labels,
)

ALL = {"lora_r": 2, "lora_target_modules": "all-linear"}
ALONE = {**ALL, "generator": "none"}
BOTH = pytest.mark.parametrize("config", [ALL, ALONE], ids=["npg", "alone"])


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    ("family", "kind", "labels"),
    [("bert", "TOKEN_CLS", "token"), ("roberta", "MASKED_LM", "one"), ("gpt2", "CAUSAL_LM", "one"),
     ("deberta-v2", "TOKEN_CLS", "token")],
)  # fmt: skip
def test_from_the_cache_as_from_the_text(tmp_path, family, kind, labels, config):
    """Language models are read at one token, packed; DeBERTa runs padded."""
    data = with_labels(labels, 24)
    models = [model_of(family, kind, **config) for _ in range(2)]
    find_late_prompt(models[0]).upper = "padded"
    how = {"data_collator": padded_labels(), "weight_decay": 0.01}
    stock(models[0], tmp_path / "a", data, **how).train()
    cached(models[1], tmp_path / "b", tmp_path / "cache", data, **how).train()
    assert_same(trained(models[1]), trained(models[0]), atol=2e-5, rtol=2e-4)
    assert all(p.any() for n, p in models[1].named_parameters() if "lora_B" in n)


def test_nothing_else_trains(tmp_path):
    """All there is has the rate of its own, and its schedule; it is stopped and goes on."""
    data = with_labels("one", 24)

    def trainer(model, folder, *callbacks):
        made = arguments(folder, save_strategy="steps", save_steps=4, seed=5)
        more = {"callbacks": list(callbacks), "lora_learning_rate": 2e-2}
        return LPTTrainer(model, made, padded_labels(), data, **more)

    whole, first, second = (model_of("bert", "MASKED_LM", **ALONE) for _ in range(3))
    assert all("lora_" in name for name in trained(whole))
    trainer(whole, tmp_path / "whole").train()
    trainer(first, tmp_path / "parts", Stop(4)).train()
    last = trainer(second, tmp_path / "parts")
    last.train(resume_from_checkpoint=True)
    assert_same(trained(second), trained(whole), atol=0, rtol=0)
    rates = [entry["learning_rate"] for entry in last.state.log_history if "loss" in entry]
    assert len(rates) == 9
    # Both rates fall to zero along one line.
    for group in last.optimizer.param_groups:
        assert group["initial_lr"] == (2e-2 if group["params"] else 5e-3)
        assert group["lr"] == 0.0


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tmp_path, config, reentrant):
    """As Trainer switches it on. (Without a prompt, nothing that goes in has a gradient.)"""
    models = [model_of(**config) for _ in range(2)]
    on_text(models[0], tmp_path / "a", num_train_epochs=1).train()
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    on_text(
        models[1], tmp_path / "b", num_train_epochs=1, gradient_checkpointing=True, **settings
    ).train()
    assert_same(trained(models[1]), trained(models[0]), **CLOSE)
    assert all(p.any() for n, p in models[1].named_parameters() if "lora_B" in n)


def test_the_stock_trainer_keeps_the_rate_of_all(tmp_path):
    """Where none is given, LPTTrainer's groups are Trainer's."""
    groups = []
    for cls in (Trainer, LPTTrainer):
        model = model_of(**ALL)
        trainer = cls(model, arguments(tmp_path, weight_decay=0.1), collate, rows())
        names = {id(p): n for n, p in model.named_parameters()}
        made = trainer.create_optimizer().param_groups
        groups.append(
            [(g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in made]
        )
    assert groups[0] == groups[1]
