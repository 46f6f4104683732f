"""Test accuracy of Late Prompt Tuning beside other methods, on real tasks, by `lpt-fast train`'s
own code.

All methods train for the same epochs on the same rows with the same batches; each has the learning
rate of `lpt_fast.cli.train.LEARNING_RATES`. No checkpoint is chosen: the model of the last step is
tested.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import typer

from ..paths import RESULTS

TASKS = ("trec", "subj", "sst2", "mr", "mpqa")
_LPT = {"method": "lpt", "num_virtual_tokens": 5}
# Name in the results -> settings of lpt_fast.cli.arguments.TrainArguments.
METHODS = {
    # (Five prompt rows, as when these results were made.)
    "lpt-npg": {**_LPT, "generator": "npg"},
    "lpt-appg": {**_LPT, "generator": "appg"},
    "lpt-mppg": {**_LPT, "generator": "mppg"},
    "lpt-static": {**_LPT, "generator": "static"},
    "lpt-attention": {**_LPT, "generator": "attention"},
    "lpt-residual": {**_LPT, "generator": "residual"},
    "lpt-npg-upper-dropout": {**_LPT, "generator": "npg", "upper_dropout": True},
    "head": {"method": "head"},
    "lora": {"method": "lora"},
    "prompt_tuning": {"method": "prompt_tuning"},
    "full": {"method": "full"},
}
DEFAULT = "lpt-npg,lpt-appg,lpt-mppg,head,lora,prompt_tuning,full"


def _key(row: dict) -> tuple:
    names = ("task", "method", "seed", "k", "epochs", "learning_rate", "train_examples", "split")
    return tuple(row[name] for name in names)


def main(
    data: str = typer.Option(
        ..., "--data", help="Folder with a folder of train/dev/test .tsv for each task."
    ),
    model: str = typer.Option(
        None, "--model", help="Default: the demo's encoder (MiniLM, 6 layers)."
    ),
    tasks: str = typer.Option(",".join(TASKS), "--tasks"),
    methods: str = typer.Option(DEFAULT, "--methods", help=f"Of {', '.join(METHODS)}."),
    insertion_layer: int = typer.Option(3, "--insertion_layer"),
    num_train_epochs: int = typer.Option(5, "--num_train_epochs"),
    learning_rate: float = typer.Option(None, "--learning_rate"),
    max_train_samples: int = typer.Option(None, "--max_train_samples"),
    max_eval_samples: int = typer.Option(None, "--max_eval_samples"),
    seed: int = typer.Option(42, "--seed"),
    split: str = typer.Option(
        "test", "--split", help="'dev' for choosing settings, 'test' for results."
    ),
    out: str = typer.Option(str(RESULTS / "accuracy.jsonl"), "--out"),
) -> None:
    """Append a line for each task and method that the file does not hold yet."""
    from lpt_fast.cli.arguments import TrainArguments
    from lpt_fast.cli.demo import demo_model
    from lpt_fast.cli.main import _quiet
    from lpt_fast.cli.train import LEARNING_RATES, train

    from ..machine import describe

    _quiet()
    done = set()
    if Path(out).exists():
        done = {_key(json.loads(line)) for line in Path(out).read_text().splitlines()}
    for task in tasks.split(","):
        for name in methods.split(","):
            settings = METHODS[name]
            rate = learning_rate or LEARNING_RATES[settings["method"]]
            is_lpt = settings["method"] == "lpt"
            rows = Path(data, task, "train.tsv").read_text(encoding="utf-8").count("\n") - 1
            row = {
                "task": task,
                "method": name,
                "seed": seed,
                "k": insertion_layer if is_lpt else None,
                "epochs": num_train_epochs,
                "learning_rate": rate,
                "train_examples": min(rows, max_train_samples or rows),
                "split": split,
            }
            if _key(row) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                args = TrainArguments(
                    model=model or demo_model(),
                    task=task,
                    train_file=f"{data}/{task}/train.tsv",
                    test_file=f"{data}/{task}/{split}.tsv",
                    insertion_layer=insertion_layer if is_lpt else None,
                    num_train_epochs=num_train_epochs,
                    learning_rate=rate,
                    max_train_samples=max_train_samples,
                    max_eval_samples=max_eval_samples,
                    seed=seed,
                    save_strategy="no",
                    logging_steps=10**9,
                    output_dir=folder,
                    **settings,
                )
                result = train(args)
            row |= {
                "accuracy": round(result["test"]["accuracy"], 4),
                "f1": round(result["test"]["f1"], 4),
                "test_examples": result["test"]["examples"],
                "seconds": result["train_seconds"],
                "trainable_parameters": result["trainable_parameters"],
                "model": "all-MiniLM-L6-v2" if model is None else model,
                **describe(),
            }
            with open(out, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            typer.echo(
                f"{task:6} {name:24} {100 * row['accuracy']:5.1f} %  {row['seconds']:6.0f} s"
            )


def table(
    path: str = typer.Option(str(RESULTS / "accuracy.jsonl"), "--file", help="Results to show."),
) -> None:
    """Print the test accuracies as a Markdown table, a row a method and a column a task."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"]
    cells: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        method = row["method"] + (f" (k = {row['k']})" if row["k"] else "")
        cells.setdefault((method, row["task"]), []).append(row)
    tasks = [task for task in TASKS if any(task == t for _, t in cells)]
    methods = list(dict.fromkeys(method for method, _ in cells))
    sizes = {t: sorted({r["train_examples"] for r in rows if r["task"] == t}) for t in tasks}
    heads = [f"{t} ({'/'.join(map(str, sizes[t]))})" for t in tasks]
    lines = [["method", "trained", *heads], ["---"] * (2 + len(tasks))]
    for method in methods:
        mine = [row for (m, _), found in cells.items() if m == method for row in found]
        trained = sorted({row["trainable_parameters"] for row in mine})
        line = [method, " - ".join(f"{n:,}" for n in trained[:: max(1, len(trained) - 1)])]
        for task in tasks:
            found = cells.get((method, task), [])
            line.append(", ".join(f"{100 * r['accuracy']:.1f}" for r in found) or "-")
        lines.append(line)
    typer.echo("\n".join("| " + " | ".join(line) + " |" for line in lines))
