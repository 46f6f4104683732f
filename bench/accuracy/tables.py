"""Markdown of a contest's results; a table that is not full says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev

BASE = "lora"  # whose seconds the others' are divided by


def _table(lines: Sequence[Sequence[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: Sequence[float], wanted: int) -> str:
    """Mean and standard deviation of percentages, and how many there are where some lack."""
    some = f" ({len(values)} of {wanted})" if len(values) < wanted else ""
    if not values:
        return f"-{some}"
    around = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{around}{some}"


class Finals:
    """The tested trainings of each method, by task and seed.

    Args:
        rows: lines of a results file.
        tasks, seeds: of a full table.

    Attributes:
        left_out: how many lines are of other tasks, seeds, or settings than a method's last ones.
    """

    def __init__(self, rows: Iterable[dict], tasks: Sequence[str], seeds: Sequence[int]):
        self.tasks, self.seeds = tasks, seeds
        self.cells: dict[str, dict[str, dict[int, dict]]] = {}
        self.left_out = 0
        rows = [row for row in rows if row["split"] == "test"]
        last = {row["method"]: row["settings"] for row in rows}
        for row in rows:
            usual = row["task"] in tasks and row["seed"] in seeds
            # A method with the settings that it had before is another one.
            if not usual or row["settings"] != last[row["method"]]:
                self.left_out += 1
            else:
                by_task = self.cells.setdefault(row["method"], {})
                by_task.setdefault(row["task"], {})[row["seed"]] = row

    def of(self, method: str, task: str) -> list[dict]:
        """Lines of a method and a task, in the order of the seeds."""
        found = self.cells[method].get(task, {})
        return [found[seed] for seed in self.seeds if seed in found]

    def means(self, method: str) -> list[float]:
        """Accuracy over all tasks, for each seed that has all of them."""
        found = self.cells[method]
        full = [s for s in self.seeds if all(s in found.get(task, {}) for task in self.tasks)]
        return [mean(found[task][seed]["accuracy"] for task in self.tasks) for seed in full]

    def cost(self, method: str, task: str, name: str = "cpu_seconds") -> float | None:
        """Mean over the seeds of a number; None without any."""
        found = self.of(method, task)
        return mean(row[name] for row in found) if found else None

    def ratio(self, method: str) -> float | None:
        """Seconds of the tasks that both have, beside those of BASE."""
        if BASE not in self.cells:
            return None
        pairs = [(self.cost(method, task), self.cost(BASE, task)) for task in self.tasks]
        both = [(own, base) for own, base in pairs if own is not None and base is not None]
        return sum(own for own, _ in both) / sum(base for _, base in both) if both else None


def accuracies(finals: Finals) -> str:
    """Test accuracy: a row a method, a column a task, and the mean over tasks."""
    wanted = len(finals.seeds)
    lines = [["method", *finals.tasks, "mean"]]
    for method in finals.cells:
        line = [
            _spread([row["accuracy"] for row in finals.of(method, task)], wanted)
            for task in finals.tasks
        ]
        lines.append([method, *line, _spread(finals.means(method), wanted)])
    return _table(lines)


def costs(finals: Finals) -> str:
    """Seconds of processor, their ratio to BASE's, trained parameters, peak memory."""
    heads = [f"{task} s" for task in finals.tasks]
    lines = [["method", *heads, "all s", f"/ {BASE}", "trained", "peak MiB"]]
    for method, by_task in finals.cells.items():
        seconds = [finals.cost(method, task) for task in finals.tasks]
        ratio = finals.ratio(method)
        rows = [row for found in by_task.values() for row in found.values()]
        trained = sorted({row["trainable_parameters"] for row in rows})
        lines.append(
            [
                method,
                *("-" if s is None else f"{s:.0f}" for s in seconds),
                "-" if None in seconds else f"{sum(seconds):.0f}",
                "-" if ratio is None else f"{ratio:.2f}",
                " - ".join(f"{n:,}" for n in trained[:: max(1, len(trained) - 1)]),
                f"{max(row['peak_mib'] for row in rows):.0f}",
            ]
        )
    return _table(lines)


def choices(rows: Iterable[dict], tasks: Sequence[str]) -> str:
    """Dev accuracy of each learning rate that was tried."""
    tried: dict[tuple[str, float], dict[str, float]] = {}
    for row in rows:
        if row["split"] == "dev":
            place = tried.setdefault((row["method"], row["learning_rate"]), {})
            place[row["task"]] = row["accuracy"]
    best: dict[tuple[str, str], float] = {}
    for (method, _), found in tried.items():
        for task, accuracy in found.items():
            best[method, task] = max(accuracy, best.get((method, task), 0.0))
    lines = [["method", "rate", *tasks]]
    for (method, rate), found in sorted(tried.items(), key=lambda item: item[0]):
        line = []
        for task in tasks:
            got = found.get(task)
            text = "-" if got is None else f"{100 * got:.1f}"
            line.append(f"**{text}**" if got is not None and got == best[method, task] else text)
        lines.append([method, f"{rate:.0e}", *line])
    return _table(lines)


def report(rows: Sequence[dict], tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """All tables, with what they mean: for each model, number of epochs and K of its own."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        texts = f"K = {row['few_shot']}" if row["few_shot"] else "all rows"
        title = f"# {row['model']}, {texts}, {row['epochs']} epochs"
        groups.setdefault(title, []).append(row)
    parts = [f"{title}\n\n{_section(mine, tasks, seeds)}" for title, mine in groups.items()]
    return "\n\n".join(parts) or "No results yet."


def _section(rows: Sequence[dict], tasks: Sequence[str], seeds: Sequence[int]) -> str:
    finals = Finals(rows, tasks, seeds)
    parts = [
        f"Test accuracy in %, mean ± standard deviation (n - 1) over seeds "
        f"{', '.join(map(str, seeds))}; a cell that lacks some says how many it has. The mean over "
        "tasks is over seeds that have all of them.",
        accuracies(finals),
    ]
    beside = {row.get("side_by_side", 1) for row in rows}
    if beside == {1}:
        parts += [
            "Training's seconds of processor, in one thread, with the build of a late method's "
            f"cache and without evaluation (mean over seeds); / {BASE}: over the tasks that both "
            "have. Peak: the most of any training.",
            costs(finals),
        ]
    else:
        parts += [f"{max(beside)} trainings ran side by side: their seconds do not compare."]
    if any(row["split"] == "dev" for row in rows):
        parts += ["Dev accuracy of the learning rates tried, the best bold.", choices(rows, tasks)]
    facts = [
        f"{title}: {', '.join(sorted({str(row[name]) for row in rows}))}."
        for title, name in (("Machine", "machine"), ("Commits", "commit"))
    ]
    if finals.left_out:
        facts.append(f"Left out: {finals.left_out} lines of other seeds, tasks or settings.")
    return "\n\n".join([*parts, " ".join(facts)])
