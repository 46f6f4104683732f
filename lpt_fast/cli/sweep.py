"""`lpt-fast sweep` and `lpt_fast.Sweep`: many trainings on one loaded model and one cache.

sweep_space.py says which settings there are, sweep_study.py who runs which, sweep_trials.py
trains them, sweep_output.py shows what was found.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .console import percent
from .outputs import check_folder, whole_file
from .settings import merge
from .sweep_arguments import SweepArguments
from .sweep_space import KINDS, Space

if TYPE_CHECKING:
    from .sweep_study import Finished, SweepStudy, SweepTrial
    from .sweep_trials import Shared

BEST = "best"
CHOSEN = "sweep.json"  # beside the best adapter: which it is
WAIT = 1.0  # seconds between two looks at what other processes have finished


@dataclass
class SweepResult:
    """What a sweep found.

    Attributes:
        table: a dict for each setting, the best first: its values, `accuracy` (mean over its
            seeds), `spread` (standard deviation, None of one), `seeds`, `pruned`, `seconds`,
            `parameters`.
        best: the first of them, with the `seed` that was best and its `accuracy`; empty where all
            trials were pruned. Its adapter is in `folder / "best"`.
        folder: of results.csv, the pictures, the study and the cache.
        lines: what the command says at its end.
    """

    table: list[dict[str, Any]]
    best: dict[str, Any]
    folder: Path
    lines: list[str]


class Sweep:
    """A search over the settings of late prompts, as `lpt-fast sweep` makes it.

    Example:
        space = {"insertion_layer": [2, 3], "learning_rate": (5e-4, 5e-3), "seed": [1, 2]}
        found = Sweep(model="roberta-large", train_file="train.tsv", validation_file="dev.tsv",
                      space=space, trials=24, output_dir="sweep").run()
        print(found.best, found.table)

    Args:
        space: name of a setting -> a list to choose from, a tuple (low, high) for a range, or one
            value.
        settings: the other flags of `lpt-fast sweep`, by name.

    Raises:
        ValueError: settings that are not known or do not go together.
    """

    def __init__(self, *, space: dict[str, Any] | None = None, **settings: Any):
        known = {*KINDS, "seed"}
        given = {**(space or {}), **{n: settings.pop(n) for n in known & set(settings)}}
        for name in given:
            if name not in known:
                raise ValueError(
                    f"`space` got {name!r}, expected of {', '.join(sorted(known))}; give it as an "
                    "argument of its own, or leave it out."
                )
        text = {name: _text_of(value) for name, value in given.items()}
        for name in settings:
            if name not in SweepArguments.__dataclass_fields__:
                raise ValueError(
                    f"Sweep got the setting {name!r}, expected one of `lpt-fast sweep --help`; "
                    "correct it, or leave it out."
                )
        self.arguments = merge(SweepArguments, None, {**settings, **text})

    def run(self) -> SweepResult:
        """Runs what is not done yet, and tells what was found.

        Raises:
            ValueError: data, a model or a study that cannot be used.
        """
        return sweep(self.arguments)


def _text_of(value: Any) -> str:
    """A part of a space as it is typed."""
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ValueError(
                f"A range got {len(value)} values, expected (low, high); give a list of choices."
            )
        return "..".join(map(_text_of, value))
    if isinstance(value, list):
        return ",".join(map(_text_of, value))
    return "none" if value is None else str(value)


def sweep(args: SweepArguments) -> SweepResult:
    """Runs a sweep, or what is left of it; the body of `lpt-fast sweep`.

    Raises:
        ValueError: Optuna is missing, a launcher started it, or data, a model or a study cannot be
            used.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ValueError(
            "A sweep needs Optuna, which is not installed; pip install lpt-fast[sweep]."
        )
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ValueError(
            f"A sweep got {processes} processes from a launcher, expected one: they share a study "
            "and not a training. Start the same command several times instead, each on its GPU."
        )
    from .sweep_study import SweepStudy
    from .sweep_trials import Shared

    folder = Path(args.output_dir)
    check_folder(folder, "--output_dir", "study.db", "results.csv")
    check_folder(args.activation_cache or folder / "cache", "--activation_cache")
    with _quiet():
        shared = Shared(args)
        grid = _is_grid(args, shared.space)
        prune = not grid if args.prune is None else args.prune
        folder.mkdir(parents=True, exist_ok=True)
        study = SweepStudy(
            folder=folder,
            space=shared.space,
            trials=args.trials,
            grid=grid,
            prune_after=max(1, int(args.num_train_epochs) // 3) if prune else None,
            epochs=args.num_train_epochs,
            facts=shared.facts(),
        )
        try:
            report = shared.fill()
            _run(args, study, shared)
            return _tell(args, study, shared.space, report.seconds)
        finally:
            study.close()


def _is_grid(args: SweepArguments, space: Space) -> bool:
    settings = space.settings()
    size = None if settings is None else len(settings) * len(space.seeds)
    fits = not space.ranges and size is not None and size <= args.trials
    if args.sampler == "grid" and not fits:
        if space.ranges:
            axis = space.ranges[0]
            raise ValueError(
                f"`--sampler grid` got the range `--{axis.name} {axis}`, expected lists; list the "
                "values, or take --sampler tpe."
            )
        raise ValueError(
            f"`--sampler grid` got {size or 'too many'} trainings, expected at most the "
            f"{args.trials} of --trials; raise it, or take --sampler tpe."
        )
    return fits if args.sampler is None else args.sampler == "grid"


def _run(args: SweepArguments, study: SweepStudy, shared: Shared) -> None:
    """Takes trials and trains them until all are done, by whomever."""
    before = len(study.finished())  # whose time is not this run's
    with tqdm(total=study.total, initial=before, desc="Trials", unit="trial") as bar, _frozen():
        while True:
            done = _show(bar, study)
            claimed = study.claim(args.group)
            if not claimed and len(done) >= study.total:
                return
            if not claimed:  # others run the rest, or die and leave it
                time.sleep(WAIT)
            for group in _alike(claimed):
                _run_group(group, claimed, study, shared, bar)


def _run_group(
    group: list[SweepTrial], claimed: list[SweepTrial], study: SweepStudy, shared: Shared, bar: tqdm
) -> None:
    from .sweep_trials import run_group

    try:
        for trial, outcome in run_group(group, shared, study.report):
            study.finish(
                trial, outcome.curve[-1], outcome.pruned, outcome.seconds, outcome.parameters
            )
            _show(bar, study)
    except BaseException:
        study.give_back(claimed)
        raise


def _alike(trials: list[SweepTrial]) -> list[list[SweepTrial]]:
    """Trials of one layer and seed together."""
    groups: dict[tuple[int, int], list[SweepTrial]] = {}
    for trial in trials:
        groups.setdefault((trial.layer, trial.seed), []).append(trial)
    return list(groups.values())


def _show(bar: tqdm, study: SweepStudy) -> list[Finished]:
    done = study.finished()
    best = max((trial.accuracy for trial in done if not trial.pruned), default=None)
    bar.n = len(done)
    bar.set_postfix_str("" if best is None else f"best {percent(best)}", refresh=True)
    return done


def _tell(args: SweepArguments, study: SweepStudy, space: Space, filled: float) -> SweepResult:
    """Writes what was found, and trains the best setting once more to keep it."""
    from .sweep_output import CSV, best_of, draw, rows_of, screen, write_csv
    from .sweep_study import locked

    folder = Path(args.output_dir)
    finished = study.finished()
    rows = rows_of(finished, space)
    with locked(folder / "best.lock"):  # of several processes one does it
        write_csv(finished, space, folder / CSV)
        picture = draw(rows, folder)
        winner = best_of(finished)
        best = {} if winner is None else _keep_best(args, winner, rows[0])
    lines = [
        screen(rows, space),
        "",
        f"{len(finished)} trainings on one cache, filled in {filled:.1f} s: {folder / CSV}.",
        picture,
    ]
    if best:
        lines.append(
            f"The best with its best seed ({best['seed']}) is in {folder / BEST}. Next: lpt-fast "
            f"predict --adapter {folder / BEST}"
        )
    return SweepResult(rows, best, folder, lines)


def _keep_best(args: SweepArguments, winner: Finished, row: dict[str, Any]) -> dict[str, Any]:
    """Trains the best trial again as `lpt-fast train` does, unless it lies there already."""
    from .train import train

    folder = Path(args.output_dir)
    best, made = folder / BEST, folder / f"{BEST}.part"
    chosen = {**row, "mean": row["accuracy"], "accuracy": winner.accuracy, "seed": winner.seed}
    said = {"setting": winner.setting, "seed": winner.seed, "trial": winner.number}
    try:
        if json.loads((best / CHOSEN).read_text(encoding="utf-8")) == said:
            return chosen
    except (OSError, ValueError):
        pass
    shutil.rmtree(made, ignore_errors=True)
    cache = args.activation_cache or str(folder / "cache")
    how = {"output_dir": str(made), "activation_cache": cache}
    with redirect_stdout(StringIO()):  # Trainer's log
        train(args.train_arguments(winner.setting, winner.seed, **how))
    with whole_file(made / CHOSEN) as out:
        json.dump(said, out, indent=2)
    shutil.rmtree(best, ignore_errors=True)
    made.rename(best)
    return chosen


@contextmanager
def _frozen() -> Iterator[None]:
    """Spares the collector what is there already: accelerate has it look through everything after
    each training, which takes longer than a small one.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of each model that is loaded."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
