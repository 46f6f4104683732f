"""python -m bench loop: where the seconds of a whole `LPTTrainer.train()` go, from a cache.

A step's own work is the model's forward, backward and the optimiser, as the Trainer calls them;
everything else that it does between the first step and the last is the loop around them. One epoch
before fills the cache and warms up; then two are clocked.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import typer
from transformers import TrainerCallback

from ..paths import RESULTS

AT_MOST = 1.05  # seconds of a training over those of its steps' own work
EPOCHS = 2


class Clock(TrainerCallback):
    """Seconds from the first step to the end."""

    seconds = 0.0

    def on_train_begin(self, *args, **kwargs):
        self.seconds = -time.perf_counter()

    def on_train_end(self, *args, **kwargs):
        self.seconds += time.perf_counter()


class Parts:
    """Clocks functions of objects; `own` is the work of a step, the others are around it."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    def clock(self, owner, name: str, part: str) -> None:
        run: Callable = getattr(owner, name)

        def clocked(*args, **kwargs):
            start = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        setattr(owner, name, clocked)


def _trainer(source, task: str, k: int, dtype: str, folder: str, epochs: int, model=None):
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification, TrainingArguments

    from lpt_fast import LPTConfig, LPTTrainer

    examples, labels = source.labelled(task)
    names = sorted(set(labels))
    rows = [{**e, "labels": names.index(label)} for e, label in zip(examples, labels, strict=True)]
    if model is None:
        base = AutoModelForSequenceClassification.from_pretrained(
            source.model_name, num_labels=len(names)
        )
        how = {"generator": "npg", "num_virtual_tokens": 5, "insertion_layer": k}
        model = get_peft_model(base, LPTConfig(task_type="SEQ_CLS", **how))
    settings = {"per_device_train_batch_size": 32, "learning_rate": 1e-3, "save_strategy": "no"}
    settings |= {"num_train_epochs": epochs, "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(f"{folder}/out", use_cpu=True, logging_steps=500, **settings)
    return LPTTrainer(
        model,
        args,
        train_dataset=rows,
        processing_class=source.tokenizer,
        activation_cache=f"{folder}/cache",
        compute_dtype=dtype,
    )


def main(
    data: str = typer.Option(
        ..., "--data", help="Folder with a folder of train/dev/test .tsv for each task."
    ),
    task: str = typer.Option("subj", "--task"),
    model: str = typer.Option(None, "--model", help="Default: the demo's encoder (MiniLM)."),
    k: int = typer.Option(4, "--k", help="Insertion layer."),
    dtypes: str = typer.Option("float32,bfloat16", "--compute_dtype"),
    out: str = typer.Option(
        str(RESULTS / "loop.jsonl"), "--out", help="JSON lines are appended to it."
    ),
) -> None:
    """Milliseconds of a training's step and what of them is around the model."""
    from ..data import Figure, Recorder, Source, quiet, temporary

    quiet()
    source = Source(Path(data), model)
    for dtype in dtypes.split(","):
        record = Recorder(out, {"task": task, "k": k, "compute_dtype": dtype})
        with temporary() as folder:
            warm = _trainer(source, task, k, dtype, folder, 1)
            warm.train()
            trainer = _trainer(source, task, k, dtype, folder, EPOCHS, warm.model)
            clock, parts = Clock(), Parts()
            trainer.add_callback(clock)
            trainer.create_optimizer()
            parts.clock(trainer, "compute_loss", "own")
            parts.clock(trainer.accelerator, "backward", "own")
            parts.clock(trainer.optimizer, "step", "own")
            parts.clock(trainer, "get_batch_samples", "batch")
            parts.clock(trainer.model, "zero_grad", "zeroing gradients")
            parts.clock(trainer, "_clip_grad_norm", "norm of gradients")
            parts.clock(trainer, "floating_point_ops", "counting operations")
            trainer.train()
        steps = trainer.state.global_step
        own = parts.seconds.pop("own")
        rest = clock.seconds - own - sum(parts.seconds.values())
        record(Figure("loop", f"{dtype}: a step", 1e3 * clock.seconds / steps, "ms"))
        record(Figure("loop", f"{dtype}: its own work", 1e3 * own / steps, "ms"))
        for name, seconds in sorted(parts.seconds.items(), key=lambda item: -item[1]):
            record(Figure("loop", f"{dtype}: {name}", 1e3 * seconds / steps, "ms"))
        record(Figure("loop", f"{dtype}: the rest", 1e3 * rest / steps, "ms"))
        ratio = clock.seconds / own
        record(Figure("loop", f"{dtype}: training over its own work", ratio, "x", AT_MOST))
