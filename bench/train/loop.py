"""python -m bench loop: where the seconds of a whole `LPTTrainer.train()` go, from a cache.

A step's own work is the model's forward, backward and the optimiser, as the Trainer calls them;
everything else that it does between the first step and the last is the loop around them. One epoch
before fills the cache and warms up; then two are clocked. (On a GPU a step's own work is what the
host does for it.)
"""

from __future__ import annotations

import cProfile
import pstats
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer
from transformers import TrainerCallback

from ..paths import RESULTS
from .targets import LOOP_AT_MOST

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


@dataclass
class Setting:
    """What is trained, how, and where.

    Attributes:
        source: texts and encoder.
        task, k: of which; insertion layer.
        dtype: float32 or bfloat16, of the packed layers.
        device: cpu or cuda.
        late_lora: low-rank updates alone in place of a prompt.
        folder: for what is written.
    """

    source: object
    task: str
    k: int
    dtype: str
    device: str
    late_lora: bool
    folder: str


def _trainer(setting: Setting, epochs: int, model=None):
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification, TrainingArguments

    from lpt_fast import LPTConfig, LPTTrainer

    source, folder = setting.source, setting.folder
    examples, labels = source.labelled(setting.task)
    names = sorted(set(labels))
    rows = [{**e, "labels": names.index(label)} for e, label in zip(examples, labels, strict=True)]
    if model is None:
        base = AutoModelForSequenceClassification.from_pretrained(
            source.model_name, num_labels=len(names)
        )
        how = {"generator": "npg", "num_virtual_tokens": 5}
        if setting.late_lora:
            how = {"generator": "none", "lora_r": 8}
        config = LPTConfig(task_type="SEQ_CLS", insertion_layer=setting.k, **how)
        model = get_peft_model(base, config)
    settings = {"per_device_train_batch_size": 32, "learning_rate": 1e-3, "save_strategy": "no"}
    settings |= {"num_train_epochs": epochs, "report_to": "none", "disable_tqdm": True}
    on_cpu = setting.device == "cpu"
    settings |= {"use_cpu": on_cpu, "bf16": not on_cpu and setting.dtype == "bfloat16"}
    args = TrainingArguments(f"{folder}/out", logging_steps=500, **settings)
    return LPTTrainer(
        model,
        args,
        train_dataset=rows,
        processing_class=source.tokenizer,
        activation_cache=f"{folder}/cache",
        compute_dtype=setting.dtype if on_cpu else None,
    )


def main(
    data: str = typer.Option(
        ..., "--data", help="Folder with a folder of train/dev/test .tsv for each task."
    ),
    task: str = typer.Option("subj", "--task"),
    model: str = typer.Option(None, "--model", help="Default: the demo's encoder (MiniLM)."),
    k: int = typer.Option(4, "--k", help="Insertion layer."),
    dtypes: str = typer.Option("float32,bfloat16", "--compute_dtype"),
    device: str = typer.Option("cpu", "--device", help="cpu or cuda."),
    late_lora: bool = typer.Option(False, "--late_lora", help="Late LoRA in place of a prompt."),
    profile: str = typer.Option(None, "--profile", help="File for a profile of one more training."),
    out: str = typer.Option(
        str(RESULTS / "loop.jsonl"), "--out", help="JSON lines are appended to it."
    ),
) -> None:
    """Milliseconds of a training's step and what of them is around the model."""
    from ..data import Figure, Recorder, Source, quiet, temporary

    quiet()
    source = Source(Path(data), model)
    for dtype in dtypes.split(","):
        common = {"task": task, "k": k, "compute_dtype": dtype, "late_lora": late_lora}
        record = Recorder(out, common)
        with temporary() as folder:
            setting = Setting(source, task, k, dtype, device, late_lora, folder)
            warm = _trainer(setting, 1)
            warm.train()
            trainer = _trainer(setting, EPOCHS, warm.model)
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
            if profile:
                _profile(_trainer(setting, EPOCHS, warm.model), f"{profile}.{dtype}")
        steps = trainer.state.global_step
        own = parts.seconds.pop("own")
        rest = clock.seconds - own - sum(parts.seconds.values())
        record(Figure("loop", f"{dtype}: a step", 1e3 * clock.seconds / steps, "ms"))
        record(Figure("loop", f"{dtype}: its own work", 1e3 * own / steps, "ms"))
        for name, seconds in sorted(parts.seconds.items(), key=lambda item: -item[1]):
            record(Figure("loop", f"{dtype}: {name}", 1e3 * seconds / steps, "ms"))
        record(Figure("loop", f"{dtype}: the rest", 1e3 * rest / steps, "ms"))
        ratio = clock.seconds / own
        record(Figure("loop", f"{dtype}: training over its own work", ratio, "x", LOOP_AT_MOST))


def _profile(trainer, path: str) -> None:
    """A training by Python's profiler: functions by their own time, and by all of it."""
    seen = cProfile.Profile()
    seen.runcall(trainer.train)
    with open(path, "w", encoding="utf-8") as file:
        for key in ("tottime", "cumtime"):
            pstats.Stats(seen, stream=file).sort_stats(key).print_stats(70)
