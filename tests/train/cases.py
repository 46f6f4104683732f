"""What the tests of LPTTrainer share: models without dropout, Trainers alike but for the cache."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from lpt_fast import ActivationCache, LPTConfig, LPTTrainer
from tests.tiny import PAD, VOCAB, tiny

K = 2


def model_of(family="bert", kind="SEQ_CLS", seed=3, dropout=0.0, **config):
    """A tiny model with a late prompt, k = 2, m = 3."""
    base = tiny(family, kind)
    torch.manual_seed(seed)
    settings = {
        "task_type": None if kind == "MASKED_LM" else kind,
        "insertion_layer": K,
        "generator": "npg",
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


def on_text(model, folder, train=None, **settings) -> LPTTrainer:
    """LPTTrainer on the text. (Its groups of like length follow from the seed, the plain Trainer's
    from the random state of the process.)
    """
    more = {n: settings.pop(n) for n in list(settings) if n in MORE}
    more = {"data_collator": collate, "train_dataset": train or rows(), **more}
    return LPTTrainer(model, arguments(folder, **settings), **more)


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


def rows(n=32, seed=0):
    """Texts whose label is whether their second token is small; unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        length = 4 + i % 5
        ids = torch.randint(3, 99, (length,), generator=generator)
        label = int(ids[1] < 50)
        out.append({"input_ids": ids.tolist(), "attention_mask": [1] * length, "labels": label})
    return out


def collate(examples):
    width = max(len(e["input_ids"]) for e in examples)
    pad = lambda name: torch.tensor([e[name] + [0] * (width - len(e[name])) for e in examples])  # noqa: E731
    labels = torch.tensor([e["labels"] for e in examples])
    return {
        "input_ids": pad("input_ids"),
        "attention_mask": pad("attention_mask"),
        "labels": labels,
    }


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def new_model(family="bert", **config):
    base = tiny(family, "SEQ_CLS")
    torch.manual_seed(3)
    settings = {"generator": "npg", "bottleneck_size": 8, "num_virtual_tokens": 3}
    settings |= {"task_type": "SEQ_CLS", **config}
    return get_peft_model(base, LPTConfig(**settings))


def trainer_for(model, folder, train=None, cls=Trainer, **settings):
    settings = {
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "max_grad_norm": 0.0,
        **settings,
    }
    return cls(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=train or rows(),
        eval_dataset=rows(16, seed=1),
        data_collator=collate,
        compute_metrics=accuracy,
    )


def trained(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(a: dict, b: dict, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


CLOSE = {"atol": 1e-6, "rtol": 1e-4}


def with_labels(kind: str, n=16, seed=0) -> list[dict]:
    """Texts of unequal lengths with labels for a task: one a token, one in all, or places."""
    own = torch.Generator().manual_seed(seed + 100)
    out = []
    for row in rows(n, seed):
        size = len(row["input_ids"])
        at = int(torch.randint(1, size, (1,), generator=own))
        word = int(torch.randint(3, VOCAB, (1,), generator=own))
        labels = {
            "token": torch.randint(0, 2, (size,), generator=own).tolist(),
            "one": [word if i == at else -100 for i in range(size)],
            "answer": [-100] * 2 + row["input_ids"][2:],
        }
        if kind == "places":
            del row["labels"]
            out.append({**row, "start_positions": at, "end_positions": min(at + 1, size - 1)})
        else:
            out.append({**row, "labels": labels[kind]})
    return out


def both(tmp_path, family, kind, data, collator, **settings):
    """The same training on the text and from a cache: the models, and the Trainers."""
    models = [model_of(family, kind) for _ in range(2)]
    more = {"data_collator": collator, "eval_dataset": data[:7], "per_device_eval_batch_size": 4}
    more |= settings
    plain = stock(
        models[0], tmp_path / "a", data, **{n: v for n, v in more.items() if n != "readout_only"}
    )
    fast = cached(models[1], tmp_path / "b", tmp_path / "cache", data, **more)
    plain.train()
    fast.train()
    return models, plain, fast
