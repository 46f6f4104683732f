"""Few-shot test accuracy of training methods: K examples in all, drawn as the paper draws them.

The same contest as `accuracy-whole` with the rows of `lpt-fast train --few_shot K`, five seeds
each (a seed draws its own rows), and so many epochs as K says (EPOCHS). Who has several learning
rates chooses with the first of the paper's seeds, for each task and K, on the dev rows that are
drawn beside its training rows; the test set, of which all rows are tested, has no part in it.

Classification with a head that is trained from random values, where the paper predicts a label word
at the mask: that needs the weights of a masked language model, and with random ones in their place
nothing would be shown. So these figures are not the paper's.

Seconds are compared as `accuracy-whole` compares them (`cpu_seconds`, one thread).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import typer

from lpt_fast.tasks import FEW_SHOT_SEEDS

from ..paths import RESULTS
from . import tables
from .contest import METHODS, TASKS, Contest, Results, chosen, numbers

FILE = RESULTS / "accuracy_few_shot.jsonl"
EPOCHS = {100: 20, 500: 10}  # K -> passes
SEEDS = ",".join(map(str, FEW_SHOT_SEEDS))
CHOICE_SEED = FEW_SHOT_SEEDS[0]  # whatever seeds a command names


def _finals(
    contest: Contest,
    methods: list[str],
    tasks: list[str],
    seeds: list[int],
    model: str,
    epochs: dict[int, int],
) -> Iterator[Callable[[], dict]]:
    """Trainings in their order, seed after seed."""
    choice = {"seed": CHOICE_SEED}
    for seed in seeds:
        for name in methods:
            for k, passes in epochs.items():
                common = {"epochs": passes, "model": model, "few_shot": k}
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
    seeds: str = typer.Option(SEEDS, "--seeds"),
    k: str = typer.Option(",".join(map(str, EPOCHS)), "--k", help="Examples in all."),
    num_train_epochs: int = typer.Option(
        None, "--num_train_epochs", help=f"Default: as K says, {EPOCHS}."
    ),
    bf16: bool = typer.Option(False, "--bf16", help="bf16 autocast."),
    jobs: int = typer.Option(1, "--jobs", help="Trainings side by side, on a GPU."),
    out: str = typer.Option(str(FILE), "--out"),
) -> None:
    """Append a line for each training that the file does not hold yet: choices, then results."""
    epochs = {}
    for number in numbers(k):
        if num_train_epochs is None and number not in EPOCHS:
            raise typer.BadParameter(f"K = {number} needs --num_train_epochs.")
        epochs[number] = num_train_epochs or EPOCHS[number]
    contest = Contest(data, Results(out), model, jobs, {"bf16": True} if bf16 else {})
    contest.all(
        _finals(
            contest,
            chosen(methods, METHODS, "--methods"),
            chosen(tasks, TASKS, "--tasks"),
            numbers(seeds),
            model or "all-MiniLM-L6-v2",
            epochs,
        )
    )


def report(
    path: str = typer.Option(str(FILE), "--file", help="Results to show."),
    tasks: str = typer.Option(",".join(TASKS), "--tasks"),
    seeds: str = typer.Option(SEEDS, "--seeds", help="That a full table has."),
) -> None:
    """Print accuracies, costs and chosen learning rates as Markdown, for each K."""
    typer.echo(tables.report(Results(path).rows(), chosen(tasks, TASKS, "--tasks"), numbers(seeds)))
