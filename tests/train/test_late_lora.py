"""Late LoRA in training: from the cache as from the text, resumed, at a rate of its own."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Trainer

from lpt_fast import ActivationCache, LPTTrainer
from lpt_fast.train.trainer import find_late_prompt
from lpt_fast.train.training_record import ADAPTER, FILE
from tests.train.cases import (
    K,
    Stop,
    arguments,
    assert_same,
    cached,
    collate,
    model_of,
    rows,
    stock,
    trained,
)
from tests.train.test_training_record import model_with, train

ALL = {"lora_r": 2, "lora_target_modules": "all-linear"}
ALONE = {**ALL, "generator": "none"}
BOTH = pytest.mark.parametrize("config", [ALL, ALONE], ids=["npg", "alone"])


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("family", ["bert", "mpnet", "qwen3"])
def test_cached_and_packed_is_the_stock_trainer(tmp_path, family, config):
    """A whole training, projections held, against Trainer on the text by the model's own code."""
    plain = model_of(family, **config)
    find_late_prompt(plain).upper = "padded"
    a = stock(plain, tmp_path / "a", remove_unused_columns=False)
    assert type(a) is Trainer
    a.train()
    model = model_of(family, **config)
    b = cached(model, tmp_path / "b", tmp_path / "cache", hold_projections=True)
    b.train()
    assert a.state.global_step == b.state.global_step == 12
    assert_same(trained(model), trained(plain), atol=2e-5, rtol=2e-4)
    moved = [n for n, p in model.named_parameters() if "lora_B" in n and p.abs().max() > 1e-3]
    assert len(moved) == sum("lora_B" in n for n, _ in model.named_parameters()) > 0


@BOTH
@pytest.mark.parametrize("rate", [None, 2e-2])
def test_resumed_in_mid_epoch(tmp_path, config, rate):
    """Not a bit differs from a training that was not stopped."""
    settings = {"save_strategy": "steps", "save_steps": 3, "seed": 5}

    def trainer(model, folder, *callbacks):
        cache = ActivationCache.open(tmp_path / "cache", model, store="fp32")
        return LPTTrainer(
            model,
            arguments(folder, **settings),
            collate,
            rows(),
            callbacks=list(callbacks),
            activation_cache=cache,
            lora_learning_rate=rate,
        )

    whole, first, second = (model_of(**{"dropout": 0.2, **config}) for _ in range(3))
    trainer(whole, tmp_path / "whole").train()
    trainer(first, tmp_path / "parts", Stop(3)).train()
    trainer(second, tmp_path / "parts").train(resume_from_checkpoint=True)
    assert_same(trained(second), trained(whole), atol=0, rtol=0)
    with pytest.raises(AssertionError):
        assert_same(trained(first), trained(whole), atol=0, rtol=0)


def test_a_rate_of_its_own(tmp_path):
    """Exactly the updates have it, with the decay and the schedule of all."""
    model = model_of(**ALL)
    how = {"weight_decay": 0.1, "learning_rate": 1e-3, "warmup_steps": 2}
    trainer = LPTTrainer(
        model, arguments(tmp_path, **how), collate, rows(), lora_learning_rate=4e-3
    )
    trainer.create_optimizer_and_scheduler(10)
    names = {id(p): n for n, p in model.named_parameters()}
    seen = set()
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            name = names[id(p)]
            seen.add(name)
            assert group["initial_lr"] == (4e-3 if ".lpt_lora." in name else 1e-3), name
            assert group["weight_decay"] == (0.0 if name.endswith("bias") else 0.1), name
    assert seen == {n for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    rates = {group["lr"] for group in trainer.optimizer.param_groups if group["params"]}
    assert rates == {1e-3, 4e-3}  # at the peak, after the warm-up
    # What moves is what they say.
    plain = model_of(**ALL)
    LPTTrainer(plain, arguments(tmp_path), collate, rows()).train()
    faster = model_of(**ALL)
    LPTTrainer(faster, arguments(tmp_path), collate, rows(), lora_learning_rate=1e-9).train()
    for name, p in faster.named_parameters():
        if "lora_B" in name:
            assert p.abs().max() < 1e-6 < plain.get_parameter(name).abs().max()


@pytest.mark.parametrize(
    ("config", "rate", "message"),
    [
        (ALL, 0, r"`lora_learning_rate` must be a number above 0 or None, got 0"),
        (ALL, "x", r"`lora_learning_rate` must be .* got 'x'"),
        (ALL, float("nan"), r"got nan"),
        ({}, 1e-3, r"no late LoRA, expected one that has \(LPTConfig\(lora_r=8\)\)"),
    ],
)
def test_wrong_rates(tmp_path, config, rate, message):
    with pytest.raises(ValueError, match=message):
        LPTTrainer(
            model_of(**config), arguments(tmp_path), collate, rows(), lora_learning_rate=rate
        )


def test_an_optimizer_of_ones_own(tmp_path):
    model = model_of(**ALL)
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="an optimiser of your own"):
        LPTTrainer(
            model,
            arguments(tmp_path),
            collate,
            rows(),
            optimizers=(own, None),
            lora_learning_rate=1e-3,
        )


def test_one_cache_serves_all(tmp_path):
    """Nothing is computed again for an adapter with late LoRA, or other targets, or none."""
    first = model_of()
    cached(first, tmp_path / "a", tmp_path / "cache").train()
    before = sorted(path.name for path in (tmp_path / "cache").rglob("*"))
    for config in (ALL, ALONE, {"lora_r": 4}):
        model = model_of(**config)
        ran = []
        layer = find_late_prompt(model).backbone.encoder.layer[K - 1]
        layer.register_forward_hook(lambda *a, ran=ran: ran.append(1))
        opened = ActivationCache.open(tmp_path / "cache", model, store="fp32", canary=False)
        cached(model, tmp_path / "b", opened).train()
        assert not ran
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*")) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**ALL, "lora_r": 4}, r"other lora_r: 2 there, 4 here"),
        (
            {"lora_r": 2, "lora_target_modules": ["query"]},
            r"other lora_target_modules: 'all-linear' there, \['query'\] here",
        ),
        ({**ALL, "lora_alpha": 9}, r"other lora_alpha: 4 there, 9 here"),
        ({}, r"other lora_r: 2 there, None here"),
        (ALONE, r"other generator: 'npg' there, 'none' here"),
    ],
)
def test_others_are_refused_by_name(tmp_path, config, message):
    train(model_with(**ALL), tmp_path)
    with pytest.raises(ValueError, match=message):
        train(model_with(**config), tmp_path, str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("record", [True, False])
def test_checkpoints_of_before(tmp_path, record):
    """They name no late LoRA, so they have none: the same goes on, one with updates is refused."""
    train(model_with(), tmp_path)
    folder = tmp_path / "checkpoint-2"
    for name in (FILE, ADAPTER):
        content = json.loads((folder / name).read_text())
        old = {n: v for n, v in content.items() if not n.startswith("lora_")}
        (folder / name).write_text(json.dumps(old))
    if not record:
        (folder / FILE).unlink()
    with pytest.raises(ValueError, match="other lora_r: None there, 2 here"):
        train(model_with(**ALL), tmp_path, str(folder))
    train(model_with(), tmp_path, str(folder))
