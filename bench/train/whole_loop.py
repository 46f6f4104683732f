"""The contestant `lptrainer` of `python -m bench train`: steps of a whole training by LPTTrainer,
each with its batch and its loop.

The others take their turns within the training, in a callback, so that all are timed in turns in
one thread. All but the first of its steps come after one of its own and find warm caches, so it is
compared with steps in a row of who computes as it does. (Memory that a training frees and keeps,
train/kept_memory.py, is then kept for all.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from lpt_fast import LPTTrainer

from .contestants import LPTRAINER
from .data import Texts
from .models import Rows, Zoo

TURN = 8  # steps of a turn: as many batches as LPTTrainer makes in a row


@dataclass
class WholeLoop:
    """An LPTTrainer with layers in bf16, as `ours_bf16` has them.

    Attributes:
        zoo, texts: model and texts.
        k: insertion layer.
        rows: of the cache.
        folder: of the training's output.
        seconds: a step, of each timed turn.
    """

    zoo: Zoo
    texts: Texts
    k: int
    rows: Rows
    folder: str
    seconds: list[float] = field(default_factory=list)
    name: str = LPTRAINER

    def __post_init__(self):
        self.model = self.zoo.adapt(self.zoo.base(), "ours_bf16", self.k)

    @property
    def label(self) -> str:
        return f"{self.name}, k = {self.k}"

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def run(self, size: int, turns: int, warmup: int, between: Callable[[int], None]) -> None:
        """Trains so many turns, and lets the others have theirs.

        Args:
            size: texts of a batch.
            turns: how many, those that warm up among them, which are not timed.
            between: called after each turn with its number.
        """
        clock = _Turns(self.seconds, warmup, between)
        settings = {"per_device_train_batch_size": size, "max_steps": TURN * turns}
        self._trainer(self.rows.computed, settings, [clock]).train()

    def gradients(self, batch: np.ndarray) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of one step of a training on some texts: by plain gradient descent
        with a rate of one, what the weights lose is their gradient.

        Args:
            batch: numbers of the texts.
        """
        before = {n: p.detach().clone() for n, p in _trained(self.model)}
        settings = {"per_device_train_batch_size": len(batch), "max_steps": 1}
        settings |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
        settings |= {"logging_steps": 1}
        trainer = self._trainer(batch, settings, [])
        trainer.train()
        loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
        return float(loss), {n: (before[n] - p.detach()).double() for n, p in _trained(self.model)}

    def _trainer(self, chosen: np.ndarray, settings: dict, callbacks: list):
        labels = self.texts.labels.tolist()
        numbers = chosen.tolist()
        rows = [
            {**example, "labels": labels[i]}
            for i, example in zip(numbers, self.texts.take(numbers), strict=True)
        ]
        how = {"save_strategy": "no", "logging_steps": 500, "report_to": "none"}
        how |= {"dataloader_drop_last": True}
        how |= {"disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-3, **settings}
        trainer = LPTTrainer(
            self.model,
            TrainingArguments(self.folder, **how),
            train_dataset=rows,
            data_collator=self._collator(),
            activation_cache=self.rows.cache,
            compute_dtype="bfloat16",
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _collator(self):
        """Trainer's own where there is a tokenizer; ids that were drawn at random have none."""
        if self.texts.tokenizer is not None:
            return DataCollatorWithPadding(self.texts.tokenizer)

        def pad(examples: list[dict]) -> dict[str, Tensor]:
            labels = torch.tensor([e["labels"] for e in examples])
            batch = replace(self.texts, examples=examples, labels=labels)
            return batch.collate(range(len(examples)), torch.device("cpu"))

        return pad


def _trained(model: nn.Module):
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


class _Turns(TrainerCallback):
    """Clocks turns of TURN steps; the time between them is the others'."""

    def __init__(self, seconds: list[float], warmup: int, between: Callable[[int], None]):
        self.seconds, self.warmup, self.between = seconds, warmup, between
        self.start = 0.0

    def on_train_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % TURN:
            return
        took = (time.perf_counter() - self.start) / TURN
        turn = state.global_step // TURN - 1
        if turn >= self.warmup:
            self.seconds.append(took)
        self.between(turn)
        self.start = time.perf_counter()
