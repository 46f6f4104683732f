"""python -m bench accuracy-sweep: dev accuracies of settings of the method, for its defaults.

A stage is a list of settings that differ from a base in a few values (STAGES). Each runs by
`lpt-fast train`'s own code on a random sample of the training rows and is measured on the dev
rows, never on the test rows. Runs share an activation cache. A line for each run goes to the
results file; one that is there is not run again.
"""

from __future__ import annotations

import json
import tempfile
import time
from itertools import product
from pathlib import Path

import typer

from ..paths import RESULTS
from .main import TASKS

# What all runs begin with: names of lpt_fast.cli.arguments.TrainArguments.
BASE = {
    "insertion_layer": 3,
    "generator": "npg",
    "num_virtual_tokens": 5,
    "bottleneck_size": 128,
    "learning_rate": 1e-3,
    "num_train_epochs": 4,
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
}
OF_PROMPT = ("insertion_layer", "generator", "num_virtual_tokens", "bottleneck_size")
NO_PROMPT = {"generator": "none", "lora_r": 8}
ALL = {"lora_target_modules": "all-linear"}


def grid(**values) -> list[dict]:
    """Every combination of the values."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def _with(base: dict, settings: list[dict]) -> list[dict]:
    return [{**base, **one} for one in settings]


STAGES: dict[str, list[dict]] = {
    # The prompt alone: generator, rows and rate.
    "prompt": [
        *grid(generator=["npg"], num_virtual_tokens=[5]),  # the paper's
        *grid(
            generator=["npg", "mppg", "attention"],
            num_virtual_tokens=[10],
            learning_rate=[1e-3, 3e-3],
        ),
    ],
    # Late LoRA alone: targets and rate.
    "lora": [
        *_with(NO_PROMPT, grid(learning_rate=[1e-3, 2e-3, 4e-3])),
        *_with({**NO_PROMPT, **ALL}, grid(learning_rate=[5e-4, 1e-3, 2e-3, 4e-3])),
    ],
    # Every linear layer, at the rates that were best: for other insertion layers.
    "depth": _with({**NO_PROMPT, **ALL}, grid(learning_rate=[2e-3, 4e-3])),
    "rank": [
        *_with({**NO_PROMPT, **ALL, "learning_rate": 4e-3}, grid(lora_r=[4, 16, 32])),
        *_with({**NO_PROMPT, **ALL}, grid(learning_rate=[8e-3])),
    ],
    # Rates of their own: of the head (and the prompt), of late LoRA.
    "rates": [
        *_with(
            {**NO_PROMPT, **ALL},
            grid(learning_rate=[1e-3, 4e-3], lora_learning_rate=[2e-3, 4e-3, 8e-3]),
        ),
    ],
    "both": [
        *_with(
            {**ALL, "lora_r": 8, "lora_learning_rate": 4e-3, "generator": "npg"},
            grid(learning_rate=[1e-3, 4e-3]),
        ),
        *_with(
            {**ALL, "lora_r": 8, "lora_learning_rate": 4e-3, "num_virtual_tokens": 10},
            grid(generator=["mppg"], learning_rate=[1e-3, 4e-3]),
        ),
    ],
    "schedule": [
        *_with({**NO_PROMPT, **ALL, "learning_rate": 4e-3}, grid(weight_decay=[0.0, 0.1])),
        *_with({**NO_PROMPT, **ALL, "learning_rate": 4e-3}, grid(lr_scheduler_type=["cosine"])),
        *_with({**NO_PROMPT, **ALL, "learning_rate": 4e-3}, grid(lora_dropout=[0.1])),
    ],
    # LoRA in all layers beside it, from the text.
    "peer": [
        {"method": "lora", "insertion_layer": None, "group_by_length": True, "learning_rate": rate}
        for rate in (1e-3, 2e-3, 4e-3)
    ],
}


def same(row: dict, wanted: dict) -> bool:
    """Whether a line of the results is of this run."""
    return all(row.get(name) == value for name, value in wanted.items())


def main(
    data: str = typer.Option(
        ..., "--data", help="Folder with a folder of train/dev/test .tsv for each task."
    ),
    model: str = typer.Option(None, "--model", help="Default: the demo's encoder (MiniLM)."),
    tasks: str = typer.Option(",".join(TASKS), "--tasks"),
    stages: str = typer.Option(",".join(STAGES), "--stages", help=f"Of {', '.join(STAGES)}."),
    seeds: str = typer.Option("1", "--seeds"),
    insertion_layers: str = typer.Option("3", "--insertion_layers"),
    max_train_samples: int = typer.Option(2000, "--max_train_samples"),
    max_eval_samples: int = typer.Option(1000, "--max_eval_samples"),
    cache: str = typer.Option(None, "--cache", help="Folder of caches. Default: a temporary one."),
    out: str = typer.Option(str(RESULTS / "accuracy_sweep.jsonl"), "--out"),
) -> None:
    """Append a line for each run that the file does not hold yet."""
    from lpt_fast.cli.arguments import TrainArguments
    from lpt_fast.cli.demo import demo_model
    from lpt_fast.cli.main import _quiet
    from lpt_fast.cli.train import train

    from ..machine import describe

    _quiet()
    done = []
    if Path(out).exists():
        done = [json.loads(line) for line in Path(out).read_text().splitlines()]
    runs = product(
        seeds.split(","), stages.split(","), insertion_layers.split(","), tasks.split(",")
    )
    with tempfile.TemporaryDirectory() as folder:
        caches = cache or str(Path(folder, "cache"))
        for seed, stage, k, task in runs:
            for settings in STAGES[stage]:
                settings = {**BASE, "insertion_layer": int(k), **settings}
                if "method" in settings:  # which has no prompt
                    settings = {n: v for n, v in settings.items() if n not in OF_PROMPT}
                wanted = {
                    "task": task,
                    "model": model or "all-MiniLM-L6-v2",
                    "seed": int(seed),
                    "train_examples": max_train_samples,
                    "settings": settings,
                }
                if any(same(row, wanted) for row in done):
                    continue
                start = time.process_time()
                result = train(
                    TrainArguments(
                        model=model or demo_model(),
                        task=task,
                        train_file=f"{data}/{task}/train.tsv",
                        test_file=f"{data}/{task}/dev.tsv",
                        max_train_samples=max_train_samples,
                        max_eval_samples=max_eval_samples,
                        activation_cache=None if "method" in settings else caches,
                        seed=int(seed),
                        save_strategy="no",
                        logging_steps=10**9,
                        output_dir=str(Path(folder, "out")),
                        **settings,
                    )
                )
                row = {
                    **wanted,
                    "stage": stage,
                    "split": "dev",
                    "accuracy": round(result["test"]["accuracy"], 4),
                    "loss": round(result["test"]["loss"], 4),
                    "cpu_seconds": round(time.process_time() - start, 1),
                    "trainable_parameters": result["trainable_parameters"],
                    **describe(),
                }
                done.append(row)
                with open(out, "a", encoding="utf-8") as f:
                    f.write(json.dumps(row) + "\n")
                shown = {n: v for n, v in settings.items() if BASE.get(n) != v}
                typer.echo(f"{task:6} {100 * row['accuracy']:5.1f} %  {shown}")


def report(
    path: str = typer.Option(str(RESULTS / "accuracy_sweep.jsonl"), "--file", help="Its results."),
) -> None:
    """Print the dev accuracies as a Markdown table, a row a setting and a column a task."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    cells: dict[tuple[str, str, str], dict[str, list[dict]]] = {}
    for row in rows:
        k = str(row["settings"].get("insertion_layer") or "-")
        place = cells.setdefault((row["model"], k, _shown(row["settings"])), {})
        place.setdefault(row["task"], []).append(row)
    lines = [["encoder", "k", "setting", *tasks], ["---"] * (3 + len(tasks))]
    for key, found in cells.items():
        line = list(key)
        for task in tasks:
            own = found.get(task, [])
            line.append(", ".join(f"{100 * row['accuracy']:.1f}" for row in own) or "-")
        lines.append(line)
    typer.echo("\n".join("| " + " | ".join(line) + " |" for line in lines))


def _shown(settings: dict) -> str:
    """What differs from BASE; the insertion layer has a column of its own."""
    own = {n: v for n, v in settings.items() if BASE.get(n) != v and n != "insertion_layer"}
    return ", ".join(f"{name}={value}" for name, value in own.items()) or "base"
