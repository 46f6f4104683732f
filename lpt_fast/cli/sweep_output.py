"""What a sweep tells: a row for each setting, a file with a line for each trial, two pictures."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

from .console import percent, table
from .outputs import whole_file
from .sweep_space import Space, key_of
from .sweep_study import Finished

CSV = "results.csv"
BY_LAYER, BY_SECONDS = "accuracy_by_layer.png", "accuracy_by_seconds.png"


def rows_of(finished: list[Finished], space: Space) -> list[dict[str, Any]]:
    """One row for each setting, the best first: its values, mean accuracy and spread (standard
    deviation; None of one) over the seeds that ran to their end, how many these are, how many were
    pruned, mean seconds, trained parameters.

    Settings with all their seeds come before those that lack some, which tell less.
    """
    rows = []
    for trials in _ranked(finished):
        whole = [trial for trial in trials if not trial.pruned]
        found = [trial.accuracy for trial in whole]
        rows.append(
            {
                **{name: trials[0].setting.get(name) for name in space.axes},
                "accuracy": statistics.fmean(found) if found else None,
                "spread": statistics.stdev(found) if len(found) > 1 else None,
                "seeds": len(whole),
                "pruned": len(trials) - len(whole),
                "seconds": statistics.fmean(trial.seconds for trial in whole or trials),
                "parameters": trials[0].parameters,
            }
        )
    return rows


def best_of(finished: list[Finished]) -> Finished | None:
    """The best seed of the best setting; None where every trial was pruned."""
    first = next(iter(_ranked(finished)), [])
    whole = [trial for trial in first if not trial.pruned]
    return max(whole, key=lambda trial: trial.accuracy, default=None)


def _ranked(finished: list[Finished]) -> list[list[Finished]]:
    """The trials of each setting, the best setting first."""
    groups: dict[str, list[Finished]] = {}
    for trial in finished:
        groups.setdefault(key_of(trial.setting), []).append(trial)

    def rank(trials: list[Finished]) -> tuple[int, float]:
        found = [trial.accuracy for trial in trials if not trial.pruned]
        return len(found), statistics.fmean(found) if found else 0.0

    return sorted(groups.values(), key=rank, reverse=True)


def screen(rows: list[dict[str, Any]], space: Space) -> str:
    """The rows as a table."""
    names = [axis.name for axis in space.varying] or ["insertion_layer", "generator"]
    cells = [[*names, "accuracy", "± spread", "seeds", "pruned", "seconds"]]
    for row in rows:
        spread = row["spread"]
        cells.append(
            [
                *(_text(row[name]) for name in names),
                "" if row["accuracy"] is None else percent(row["accuracy"]),
                "" if spread is None else f"{100 * spread:.1f}",
                str(row["seeds"]),
                str(row["pruned"]),
                f"{row['seconds']:.1f}",
            ]
        )
    return table(cells)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_csv(finished: list[Finished], space: Space, path: Path) -> None:
    """A line for each trial, in the order of the study."""
    names = list(space.axes)
    with whole_file(path) as out:
        writer = csv.writer(out, lineterminator="\n")
        more = ("accuracy", "pruned", "epochs", "seconds", "parameters")
        writer.writerow(["trial", *names, "seed", *more])
        for t in finished:
            values = ["" if t.setting.get(n) is None else t.setting[n] for n in names]
            figures = (t.accuracy, int(t.pruned), len(t.curve), t.seconds, t.parameters)
            writer.writerow([t.number, *values, t.seed, *figures])


def draw(rows: list[dict[str, Any]], folder: Path) -> str:
    """Draws both pictures; returns the sentence that says so, or why not."""
    try:
        import matplotlib
    except ImportError:
        return "(Pictures need matplotlib: pip install lpt-fast[sweep].)"
    matplotlib.use("Agg")
    rows = [row for row in rows if row["accuracy"] is not None]
    _draw_layers(rows, folder / BY_LAYER)
    _draw_seconds(rows, folder / BY_SECONDS)
    return f"{folder / BY_LAYER} and {folder / BY_SECONDS} show accuracy by layer and by seconds."


def _draw_layers(rows: list[dict[str, Any]], path: Path) -> None:
    """A line for each generator through the best setting of each layer, as the paper draws it."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for generator in sorted({row["generator"] for row in rows}):
        best: dict[int, dict] = {}
        for row in rows:
            if row["generator"] == generator:
                layer = row["insertion_layer"]
                best[layer] = max(best.get(layer, row), row, key=lambda r: r["accuracy"])
        layers = sorted(best)
        axes.errorbar(
            layers,
            [100 * best[layer]["accuracy"] for layer in layers],
            [100 * (best[layer]["spread"] or 0) for layer in layers],
            label="no prompt" if generator == "none" else generator,
            marker="o",
            markersize=4,
            capsize=3,
        )
    axes.set_xlabel("insertion layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, axes, path)


def _draw_seconds(rows: list[dict[str, Any]], path: Path) -> None:
    """A point for each setting."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for generator in sorted({row["generator"] for row in rows}):
        own = [row for row in rows if row["generator"] == generator]
        seconds, accuracy = [r["seconds"] for r in own], [100 * r["accuracy"] for r in own]
        axes.scatter(seconds, accuracy, label=generator, s=18)
    axes.set_xlabel("seconds of training")
    axes.set_xlim(left=0)
    _finish(figure, axes, path)


def _finish(figure, axes, path: Path) -> None:
    from matplotlib import pyplot

    axes.set_ylabel("accuracy in % on validation data")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
