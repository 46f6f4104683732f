"""ManyTrainer: each adapter becomes what LPTTrainer makes of it alone."""

from __future__ import annotations

import pytest
import torch

from lpt_fast import ActivationCache, LPTConfig, ManyTrainer
from lpt_fast.method import one_pass
from tests.tiny import LAYERS
from tests.train.cases import K, Seen, accuracy, arguments, cached, collate, model_of, rows, trained

ALL = {"lora_r": 2, "lora_target_modules": "all-linear"}
CONFIGS = {
    "npg": {},
    "mppg": {"generator": "mppg", "num_virtual_tokens": 5},
    "both": {**ALL, "generator": "appg"},
    "alone": {**ALL, "generator": "none"},
}
RATES = {
    "npg": {"learning_rate": 5e-3},
    "mppg": {"learning_rate": 2e-2},
    "both": {"learning_rate": 1e-2, "lora_learning_rate": 3e-2},
    "alone": {},
}


def with_names(model, name: str) -> dict:
    """An adapter's weights, by the names that the only one has."""
    found = {}
    for key, p in model.named_parameters():
        parts = key.split(".")
        if name in parts and {"late_prompt", "modules_to_save"} & set(parts):
            found[".".join("default" if part == name else part for part in parts)] = p
    return found


def several(family="bert", names=tuple(CONFIGS), k=K, kind="SEQ_CLS"):
    """Models with one adapter each, and one with all of them that starts as they do."""
    singles = {
        name: model_of(family, kind, seed=i, insertion_layer=k, **CONFIGS[name])
        for i, name in enumerate(names)
    }
    model = model_of(family, kind, insertion_layer=k)
    for name in names:
        config = singles[name].peft_config["default"].to_dict()
        for key in ("peft_type", "target_modules", "num_labels", "id2label"):
            config.pop(key, None)
        model.add_adapter(name, LPTConfig(**{**config, "modules_to_save": None}))
        own, wanted = with_names(model, name), dict(singles[name].named_parameters())
        assert len(own) > 2
        with torch.no_grad():
            for key, p in own.items():
                p.copy_(wanted[key])
    model.delete_adapter("default")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return singles, model


def many(model, folder, cache=None, names=tuple(CONFIGS), **settings):
    more = {n: settings.pop(n) for n in list(settings) if n in ("eval_dataset", "callbacks")}
    more |= {n: settings.pop(n) for n in ("compute_metrics", "compute_dtype") if n in settings}
    if cache is not None:
        cache = ActivationCache.open(cache, model, store="fp32", insertion_layer=K)
    return ManyTrainer(
        model,
        arguments(folder, **settings),
        adapters={name: RATES[name] for name in names},
        activation_cache=cache,
        train_dataset=rows(),
        data_collator=collate,
        **more,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "llama"])
@pytest.mark.parametrize("from_cache", [True, False], ids=["cache", "text"])
def test_equals_single_trainings(tmp_path, family, from_cache, monkeypatch):
    """Three epochs: weights, curves, metrics. Gradients are clipped, each adapter's by itself."""
    singles, model = several(family)
    how = {"max_grad_norm": 0.3, "seed": 5}
    evaluation = {"eval_dataset": rows(9, seed=2), "compute_metrics": accuracy}
    curve = Seen()
    trainer = many(
        *(model, tmp_path / "many", tmp_path / "cache" if from_cache else None),
        **(how | evaluation | {"callbacks": [curve]}),
    )
    trainer.train()
    got = trainer.evaluate()
    assert trainer.state.global_step == 12
    losses, total = [0.0] * 12, 0.0
    for name, single in singles.items():
        seen, rates = Seen(), RATES[name]
        alone = cached(
            *(single, tmp_path / name, tmp_path / "cache"),
            **(how | evaluation | {"callbacks": [seen]}),
            learning_rate=rates.get("learning_rate", 5e-3),
        )
        alone.lora_learning_rate = rates.get("lora_learning_rate")
        alone.train()
        expected = alone.evaluate()
        wanted, own = dict(single.named_parameters()), with_names(model, name)
        for key, p in own.items():
            assert (p - wanted[key]).norm() <= 2e-4 * wanted[key].norm() + 1e-6, (name, key)
        assert got[f"eval_{name}_accuracy"] == expected["eval_accuracy"]
        losses = [a + b for a, b in zip(losses, seen.losses, strict=True)]
        total += expected["eval_loss"]
    means = [got[f"eval_{name}_accuracy"] for name in singles]
    assert got["eval_accuracy"] == pytest.approx(sum(means) / 4)
    # (The log rounds to four digits.)
    assert curve.losses == pytest.approx(losses, abs=5e-4)
    assert got["eval_loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
def test_one_pass_and_projections_held(tmp_path, monkeypatch):
    """Text rows are projected once in a training, whatever the number of adapters."""
    _, model = several()
    made, run = [], one_pass.run_stages

    def stages(backbone, family, found, **how):
        made.append([(len(s.shares), s.held is not None) for s in found])
        return run(backbone, family, found, **how)

    monkeypatch.setattr(one_pass, "run_stages", stages)
    monkeypatch.setattr(one_pass, "project_first", None)  # which would be called in each step
    trainer = many(model, tmp_path, tmp_path / "cache", num_train_epochs=1)
    trainer.train()
    assert made == [[(4, True)]] * 4


@pytest.mark.slow
def test_a_dropped_adapter_stays_as_it_is(tmp_path):
    singles, model = several(names=("npg", "mppg"))
    trainer = many(model, tmp_path / "a", tmp_path / "cache", ("npg", "mppg"), seed=5)

    class Drop(Seen):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                trainer.drop("mppg")
                self.kept = {n: p.detach().clone() for n, p in with_names(model, "mppg").items()}

    drop = Drop()
    trainer.add_callback(drop)
    trainer.train()
    for name, p in with_names(model, "mppg").items():
        assert torch.equal(p, drop.kept[name])
    alone = cached(singles["npg"], tmp_path / "b", tmp_path / "cache", seed=5)
    alone.train()
    wanted = dict(singles["npg"].named_parameters())
    for name, p in with_names(model, "npg").items():
        torch.testing.assert_close(p, wanted[name], atol=1e-5, rtol=1e-3)
    _, model = several(names=("npg",))
    trainer = many(model, tmp_path / "c", tmp_path / "cache", ("npg",))
    trainer.add_callback(Last(trainer))
    trainer.train()
    assert trainer.state.global_step == 2


class Last(Seen):
    def __init__(self, trainer):
        super().__init__()
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.trainer.drop("npg")


@pytest.mark.slow
def test_in_bf16(tmp_path):
    singles, model = several()
    how = {"compute_dtype": "bfloat16", "seed": 5}
    many(model, tmp_path / "a", tmp_path / "cache", **how).train()
    for name, single in singles.items():
        alone = cached(
            *(single, tmp_path / name, tmp_path / "cache"),
            learning_rate=RATES[name].get("learning_rate", 5e-3),
            seed=5,
        )
        alone.compute_dtype = torch.bfloat16
        alone.lora_learning_rate = RATES[name].get("lora_learning_rate")
        alone.train()
        wanted = dict(single.named_parameters())
        for key, p in with_names(model, name).items():
            assert (p - wanted[key]).norm() <= 0.1 * wanted[key].norm() + 0.05, (name, key)


@pytest.mark.slow
def test_cloze(tmp_path):
    """Language models, one token read of each text."""
    data = [
        {**row, "labels": [-100] * (len(row["input_ids"]) - 1) + [7 + row["labels"]]}
        for row in rows()
    ]
    _, model = several("bert", ("npg", "mppg"), kind="MASKED_LM")
    trainer = ManyTrainer(
        model,
        arguments(tmp_path, label_names=["labels"]),
        adapters={"npg": {}, "mppg": {}},
        train_dataset=data,
        data_collator=padded,
        activation_cache=tmp_path / "cache",
    )
    before = {n: p.clone() for n, p in trained(model).items()}
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > trainer.state.log_history[-2]["loss"]
    assert all(not torch.equal(p, before[n]) for n, p in trained(model).items())


def padded(examples):
    width = max(len(e["input_ids"]) for e in examples)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([e[name] + [x] * (width - len(e[name])) for e in examples])
        for name, x in fill.items()
    }


def test_what_is_refused(tmp_path):
    _, model = several(names=("npg", "both"))
    how = {"train_dataset": rows(), "data_collator": collate}

    def said(adapters, message, settings=None, **more):
        with pytest.raises(ValueError, match=message):
            ManyTrainer(
                *(model, arguments(tmp_path, **(settings or {}))), adapters=adapters, **how, **more
            )

    said({}, "`adapters` is empty")
    said({"nobody": {}}, "names 'nobody', expected adapters of the model: 'npg', 'both'")
    said({"npg": {"learning_rate": 0}}, "has learning_rate=0 for 'npg', expected a number above 0")
    said({"npg": {"rate": 1}}, "has rate=1 for 'npg'")
    said({"npg": {"lora_learning_rate": 1e-3}}, "'npg', which has no late LoRA")
    said({"npg": {}}, "got `save_strategy`", {"save_strategy": "epoch"})
    said({"npg": {}}, "got `label_smoothing_factor` 0.1", {"label_smoothing_factor": 0.1})
    said({"npg": {}}, "got `compute_loss_func`", compute_loss_func=lambda *a, **k: None)
    model.add_adapter(
        "low", LPTConfig(task_type="SEQ_CLS", insertion_layer=LAYERS - 3, generator="static")
    )
    said({"npg": {}, "low": {}}, "have the insertion layers {'npg': 2, 'low': 1}, expected one")
