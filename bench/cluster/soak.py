"""Train, evaluate, resume, again and again in one process: what it holds must not grow.

python -m bench.cluster.soak --minutes 30 --out bench/results/soak.jsonl
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
import typer
from transformers import TrainingArguments

from lpt_fast import LPTTrainer
from lpt_fast.cache import ActivationCache
from lpt_fast.train.cursor import last_checkpoint

from .fault_worker import SHARD_BYTES, adapted, collate, examples

WARM = 0.2  # share of the cycles that are left out of the slope: allocators and imports settle
BLOCKS = 10  # of samples, whose means the slope goes through: memory moves in rare steps, so that
# single samples are far from independent
UNITS = {"rss_mb": "MB", "heap_mb": "MB in use", "files": "files", "threads": "threads"}


def _arguments(run: Path, epochs: int) -> TrainingArguments:
    return TrainingArguments(
        str(run),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def cycle(root: Path) -> float:
    """An epoch, an evaluation, and from its checkpoint another epoch and evaluation, by objects
    that are all made anew; the last loss.
    """
    run = root / "run"
    for epochs in (1, 2):
        model = adapted()
        with ActivationCache.open(root / "cache", model, store="fp32") as opened:
            opened.ensure(model, examples(), shard_bytes=SHARD_BYTES)
            trainer = LPTTrainer(
                model,
                _arguments(run, epochs),
                data_collator=collate,
                train_dataset=examples()[:320],
                eval_dataset=examples()[320:],
                activation_cache=opened,
            )
            trainer.log = lambda *_: None
            kept = last_checkpoint(run) if epochs == 2 else None
            trainer.train(resume_from_checkpoint=None if kept is None else str(kept))
            loss = trainer.evaluate()["eval_loss"]
    shutil.rmtree(run)
    return loss


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def heap_bytes() -> float:
    """Bytes that the C heap of the main thread has given out; nan where it cannot be asked. A
    leak shows here at once, in resident memory only when the heap has no free room left.
    """
    try:
        ask = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return math.nan
    ask.restype = _Mallinfo
    info = ask()
    return float(info.uordblks + info.hblkhd)


def sample() -> dict:
    """What this process holds now."""
    gc.collect()
    process = psutil.Process()
    return {
        "rss_mb": process.memory_info().rss / 2**20,
        "heap_mb": heap_bytes() / 2**20,
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "python_threads": threading.active_count(),
    }


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of a straight line through points, and its standard error (least squares)."""
    if len(x) < 3:
        return math.nan, math.nan
    dx = x - x.mean()
    rise = float((dx * y).sum() / (dx * dx).sum())
    rest = y - y.mean() - rise * dx
    return rise, float(np.sqrt((rest @ rest) / (len(x) - 2) / (dx @ dx)))


def blocks(values: np.ndarray) -> np.ndarray:
    """Means of BLOCKS parts one after another (all values, where they are fewer)."""
    parts = np.array_split(values, min(BLOCKS, len(values)))
    return np.array([part.mean() for part in parts])


def soak(minutes: float, cycles: int, tell: Callable[[dict], None]) -> tuple[list[dict], dict]:
    """Cycles for so long, and so many at least.

    Returns:
        A sample after each cycle, and growth per minute of each quantity with its standard error.
    """
    samples: list[dict] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lpt-soak") as place:
        while len(samples) < cycles or time.monotonic() - begun < 60 * minutes:
            loss = cycle(Path(place))
            if samples and loss != samples[0]["loss"]:
                raise RuntimeError(
                    f"Cycle {len(samples)} ended with the loss {loss}, expected "
                    f"{samples[0]['loss']} as in the first."
                )
            now = {"cycle": len(samples), "minutes": (time.monotonic() - begun) / 60, "loss": loss}
            samples.append({**now, **sample()})
            tell(samples[-1])
    kept = samples[int(WARM * len(samples)) :]
    x = np.array([one["minutes"] for one in kept])
    growth = {}
    for name in UNITS:
        y = np.array([one[name] for one in kept], float)
        rise, error = slope(blocks(x), blocks(y))
        growth[name] = {"per_minute": rise, "error": error, "first": y[0], "last": y[-1]}
    return samples, growth


def main(
    minutes: float = typer.Option(30.0, "--minutes"),
    cycles: int = typer.Option(10, "--cycles", help="At least so many."),
    out: str = typer.Option(None, "--out", help="JSON lines are appended to it."),
) -> None:
    """Repeated train, evaluate and resume: memory, files and threads, and how they grow."""
    from ..machine import describe

    torch.set_num_threads(1)
    machine = describe()

    def write(line: dict) -> None:
        if out is not None:
            with open(out, "a", encoding="utf-8") as f:
                f.write(json.dumps({**line, **machine}) + "\n")

    def tell(one: dict) -> None:
        write(one)
        if one["cycle"] % 20 == 0:
            typer.echo(
                f"cycle {one['cycle']:5}, {one['minutes']:5.1f} min: {one['rss_mb']:7.1f} MB, "
                f"{one['files']} files, {one['threads']} threads"
            )

    samples, growth = soak(minutes, cycles, tell)
    typer.echo(f"{len(samples)} cycles in {samples[-1]['minutes']:.1f} min, all to the same loss.")
    for name, found in growth.items():
        typer.echo(
            f"{UNITS[name]:9} {found['first']:.1f} -> {found['last']:.1f}, per minute "
            f"{found['per_minute']:+.4f} with a standard error of {found['error']:.4f}"
        )
    write({"summary": growth, "cycles": len(samples), "minutes": samples[-1]["minutes"]})


if __name__ == "__main__":
    typer.run(main)
