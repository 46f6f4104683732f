"""Test accuracy and cost of training methods on whole tasks, three seeds each.

Every method trains three epochs on all training rows in batches of 32 through `lpt-fast train`'s
own code and is tested on the whole test set with the model of the last step. Who has several
learning rates (contest.METHODS) chooses first, for each task: three epochs on 1,500 training rows
with one seed for each rate, and the best accuracy on dev rows wins; the test set has no part in it.

The seconds that are compared are `cpu_seconds`, the processor's, of the training with the build of
a late method's cache, in one thread each: wall seconds (`seconds`) mean little where two trainings
run side by side on two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import typer

from ..paths import RESULTS
from . import tables
from .contest import METHODS, TASKS, Contest, Results, chosen, numbers

FILE = RESULTS / "accuracy_whole.jsonl"
EPOCHS = 3
# Of the choice of learning rates.
CHOICE_SEED, CHOICE_ROWS, CHOICE_DEV_ROWS = 1, 1500, 872


def _finals(
    contest: Contest, methods: list[str], tasks: list[str], seeds: list[int], common: dict
) -> Iterator[Callable[[], dict]]:
    """Trainings in their order: all with one seed before the next seed, so that a file that is
    partly filled is filled evenly.
    """
    choice = {"seed": CHOICE_SEED}
    choice |= {"max_train_samples": CHOICE_ROWS, "max_eval_samples": CHOICE_DEV_ROWS}
    for seed in seeds:
        for name in methods:
            for task in tasks:
                yield partial(contest.final, name, task, seed, choice, common)


def main(
    data: str = typer.Option(
        ..., "--data", help="Folder with a folder of train/dev/test .tsv for each task."
    ),
    model: str = typer.Option(
        None, "--model", help="Default: the demo's encoder (MiniLM, 6 layers)."
    ),
    tasks: str = typer.Option(",".join(TASKS), "--tasks"),
    methods: str = typer.Option("head,lora,full", "--methods", help=f"Of {', '.join(METHODS)}."),
    seeds: str = typer.Option("1,2,3", "--seeds"),
    num_train_epochs: int = typer.Option(EPOCHS, "--num_train_epochs"),
    bf16: bool = typer.Option(False, "--bf16", help="bf16 autocast."),
    jobs: int = typer.Option(1, "--jobs", help="Trainings side by side, on a GPU."),
    out: str = typer.Option(str(FILE), "--out"),
) -> None:
    """Append a line for each training that the file does not hold yet: choices, then results."""
    contest = Contest(data, Results(out), model, jobs, {"bf16": True} if bf16 else {})
    common = {"epochs": num_train_epochs, "model": model or "all-MiniLM-L6-v2"}
    contest.all(
        _finals(
            contest,
            chosen(methods, METHODS, "--methods"),
            chosen(tasks, TASKS, "--tasks"),
            numbers(seeds),
            common,
        )
    )


def report(
    path: str = typer.Option(str(FILE), "--file", help="Results to show."),
    tasks: str = typer.Option(",".join(TASKS), "--tasks"),
    seeds: str = typer.Option("1,2,3", "--seeds", help="That a full table has."),
) -> None:
    """Print accuracies, costs and chosen learning rates as Markdown."""
    typer.echo(tables.report(Results(path).rows(), chosen(tasks, TASKS, "--tasks"), numbers(seeds)))
