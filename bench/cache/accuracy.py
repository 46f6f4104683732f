"""python -m bench cache-accuracy: does training from a cache end where training on the text ends?

The same runs (seed, order, dropout, learning rate) by the stock Trainer, with batches of text and
with batches from caches of each store; they are also tested from the cache.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import typer

from ..paths import RESULTS

STORES = ("text", "fp32", "bf16", "int8c", "fp8")
LEARNING_RATE, BATCH = 1e-3, 32
KEY = ("task", "k", "store", "seed", "epochs", "train_examples", "test_examples")


def _datasets(source, task: str, train_rows: int | None, test_rows: int | None):
    """Tokenised texts with labels, and the number of classes."""
    parts = [source.labelled(task, "train", train_rows), source.labelled(task, "test", test_rows)]
    names = sorted({label for _, labels in parts for label in labels})
    for examples, labels in parts:
        for example, label in zip(examples, labels, strict=True):
            example["labels"] = names.index(label)
    return parts[0][0], parts[1][0], len(names)


def _numbered(rows, examples: list[dict]) -> list[dict]:
    """What stands for texts in a data set whose batches come from a cache."""
    return [
        {"row": int(row), "labels": example["labels"]}
        for row, example in zip(rows, examples, strict=True)
    ]


def collator_of(cache):
    """Batches of a cache by the numbers of their rows."""
    import torch

    def collate(examples: list[dict]) -> dict:
        return {
            "cached_hidden": cache.read([example["row"] for example in examples]),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }

    return collate


def run(source, train, test, classes: int, layer: int, seed: int, epochs: int, cache=None) -> dict:
    """One training; accuracy, loss and predictions on the test split.

    Args:
        source: of the model.
        train, test: tokenised examples with labels.
        classes: their number.
        layer, seed, epochs: of the training.
        cache: where batches come from; None: from the texts.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from lpt_fast.cli.data import Collator

    from ..data import temporary

    model = source.adapted(layer, classes, seed)
    collator = Collator(source.tokenizer)
    if cache is not None:
        train = _numbered(cache.rows(train), train)
        test = _numbered(cache.rows(test), test)
        collator = collator_of(cache)
    with temporary() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                learning_rate=LEARNING_RATE,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=BATCH,
                num_train_epochs=epochs,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=10**9,
                remove_unused_columns=False,
                label_names=["labels"],
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            data_collator=collator,
            train_dataset=train,
        )
        trainer.remove_callback(PrinterCallback)
        done = trainer.train()
        found = trainer.predict(test)
    predictions = found.predictions
    predictions = (predictions[0] if isinstance(predictions, tuple) else predictions).argmax(-1)
    return {
        "accuracy": float((predictions == found.label_ids).mean()),
        "test_loss": float(found.metrics["test_loss"]),
        "train_loss": float(done.training_loss),
        "predictions": predictions.tolist(),
        "seconds": round(done.metrics["train_runtime"], 1),
    }


def fill(source, folder: str, store: str, layer: int, examples: list[dict]):
    """A cache of all texts. Its rows do not depend on the head or the prompt."""
    from lpt_fast.cache import ActivationCache

    model = source.adapted(layer)
    cache = ActivationCache.open(folder, model, store=store)
    cache.ensure(model, examples)
    return cache


def main(
    data: str = typer.Option(..., "--data", help="Folder with a folder of .tsv for each task."),
    tasks: str = typer.Option("trec,subj", "--tasks"),
    stores: str = typer.Option(",".join(STORES), "--stores"),
    insertion_layers: str = typer.Option("4", "--insertion_layers"),
    seeds: str = typer.Option("1,2,3", "--seeds"),
    num_train_epochs: int = typer.Option(5, "--num_train_epochs"),
    max_train_samples: int = typer.Option(1500, "--max_train_samples"),
    max_eval_samples: int = typer.Option(1000, "--max_eval_samples"),
    model: str = typer.Option(None, "--model", help="Default: the demo's encoder (MiniLM)."),
    out: str = typer.Option(
        str(RESULTS / "cache_accuracy.jsonl"), "--out", help="JSON lines are appended to it."
    ),
) -> None:
    """Test accuracy of training from caches and on texts; what is in the file is not run again."""
    from ..data import Source, quiet, temporary
    from ..machine import describe

    quiet()
    source = Source(Path(data), model)
    path = Path(out)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = {tuple(row[name] for name in KEY): row for row in map(json.loads, lines)}
    for task in tasks.split(","):
        train, test, classes = _datasets(source, task, max_train_samples, max_eval_samples)
        for layer in map(int, insertion_layers.split(",")):
            for store in stores.split(","):
                with temporary() as folder:
                    cache = None
                    for seed in map(int, seeds.split(",")):
                        row = {"part": "accuracy", "task": task, "k": layer, "store": store}
                        row |= {"seed": seed, "epochs": num_train_epochs}
                        row |= {"train_examples": len(train), "test_examples": len(test)}
                        key = tuple(row[name] for name in KEY)
                        if key in done:
                            continue
                        if cache is None and store != "text":
                            cache = fill(source, folder, store, layer, train + test)
                        row |= run(
                            source, train, test, classes, layer, seed, num_train_epochs, cache
                        )
                        row |= {"learning_rate": LEARNING_RATE, **describe()}
                        done[key] = row
                        with open(path, "a", encoding="utf-8") as f:
                            f.write(json.dumps(row) + "\n")
                        typer.echo(
                            f"{task:5} k = {layer} {store:6} seed {seed}: "
                            f"{100 * row['accuracy']:5.1f} %  loss {row['test_loss']:.4f}  "
                            f"{row['seconds']:5.0f} s"
                        )
    typer.echo(table(list(done.values())))


def table(rows: list[dict]) -> str:
    """Markdown: mean and spread over seeds, and on how many test texts a run predicts otherwise
    than the run on the text with the same seed.
    """
    cells: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        place = (row["task"], row["k"], row["train_examples"], row["test_examples"])
        cells.setdefault((*place, row["store"]), {})[row["seed"]] = row
    lines = [
        "| task | k | rows | from | accuracy, mean (each seed) | spread | test loss "
        "| other predictions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, k, train, test, store), found in cells.items():
        values = [100 * row["accuracy"] for _, row in sorted(found.items())]
        losses = statistics.mean(row["test_loss"] for row in found.values())
        other = [
            statistics.mean(
                a != b for a, b in zip(row["predictions"], like["predictions"], strict=True)
            )
            for seed, row in found.items()
            if (like := cells.get((task, k, train, test, "text"), {}).get(seed))
        ]
        each = ", ".join(f"{value:.1f}" for value in values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        differs = f"{100 * statistics.mean(other):.2f} %" if other else "-"
        lines.append(
            f"| {task} | {k} | {train}/{test} | {store} | {statistics.mean(values):.2f} ({each}) "
            f"| {spread:.2f} | {losses:.4f} | {differs} |"
        )
    return "\n".join(lines)
