"""What the tests of LPTTrainer share: models without dropout, Trainers alike but for the cache."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from lpt_fast import ActivationCache, LPTConfig, LPTTrainer
from tests.tiny import PAD, tiny
from tests.train.test_trainer import collate, rows

K = 2


def model_of(family="bert", kind="SEQ_CLS", seed=3, dropout=0.0, **config):
    """A tiny model with a late prompt, k = 2, m = 3."""
    base = tiny(family, kind)
    torch.manual_seed(seed)
    settings = {
        "task_type": None if kind == "MASKED_LM" else kind,
        "insertion_layer": K,
        "bottleneck_size": 8,
        "num_virtual_tokens": 3,
        "prompt_dropout": dropout,
    }
    model = get_peft_model(base, LPTConfig(**settings | config))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and dropout == 0:
            module.p = 0.0
    return model


def arguments(folder, **settings) -> TrainingArguments:
    """Trainer's own, remove_unused_columns and label_names among them, but quiet and quick."""
    settings = {
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "num_train_epochs": 3,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        **settings,
    }
    return TrainingArguments(output_dir=str(folder), **settings)


def stock(model, folder, train=None, **settings) -> Trainer:
    """The plain Trainer on the text."""
    more = {n: settings.pop(n) for n in list(settings) if n in MORE}
    more = {"data_collator": collate, "train_dataset": train or rows(), **more}
    return Trainer(model, arguments(folder, **settings), **more)


def cached(model, folder, cache, train=None, **settings) -> LPTTrainer:
    """The same with a cache: a folder, which is opened with an exact store, or an open one."""
    more = {n: settings.pop(n) for n in list(settings) if n in MORE}
    more = {"data_collator": collate, "train_dataset": train or rows(), **more}
    if not isinstance(cache, ActivationCache):
        cache = ActivationCache.open(cache, model, store="fp32")
    return LPTTrainer(model, arguments(folder, **settings), activation_cache=cache, **more)


MORE = (
    "train_dataset",
    "eval_dataset",
    "data_collator",
    "compute_metrics",
    "callbacks",
    "processing_class",
    "compute_loss_func",
    "preprocess_logits_for_metrics",
    "upper",
    "readout_only",
    "hold_projections",
)


class Stop(TrainerCallback):
    """Ends the training after a step, which is saved where that is asked for."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Seen(TrainerCallback):
    """Collects the learning curve."""

    def __init__(self):
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []


def padded_labels(side="right", multiple=1):
    """A collator for labels one a token: pads all on one side, labels with -100."""

    def collator(examples):
        width = max(len(e["input_ids"]) for e in examples)
        width = -(-width // multiple) * multiple

        def pad(name, fill):
            lines = []
            for e in examples:
                values = list(e.get(name, [1] * len(e["input_ids"])))
                gap = [fill] * (width - len(values))
                lines.append(values + gap if side == "right" else gap + values)
            return torch.tensor(lines)

        return {
            "input_ids": pad("input_ids", PAD),
            "attention_mask": pad("attention_mask", 0),
            "labels": pad("labels", -100),
        }

    return collator
