"""python -m bench plot: PNGs from a results file and nothing else.

For each machine, shape, dtype and family of operators two pictures: each provider's share of the
copy bandwidth measured beside it, and its milliseconds (median, whiskers from the 20th to the 80th
percentile).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..paths import RESULTS
from .records import PROVIDERS, latest, read

# Of operators that a picture shows together; the first pattern that fits counts.
FAMILIES = {
    "insertion": r"copy|insert_(npg|appg|mppg|static)\.",
    "layouts": r"insert_|gather_",
    "blocks": r"",
}
COLOURS = {"eager": "#9aa5b1", "compile": "#e0a030", "varlen": "#59a14f", "triton": "#1f77b4"}


def _title(group: tuple, rows: list[dict]) -> str:
    machine, shape, dtype, graph = group
    sizes = next(row["sizes"] for row in rows)
    commits = sorted({row["commit"] for row in rows})
    how = "CUDA graphs" if graph else "launched one by one" if rows[0]["device"] == "cuda" else ""
    what = f"{sizes['T']:,} tokens in {sizes['B']:,} examples, D = {sizes['D']}, m = {sizes['m']}"
    first = f"{shape} ({what}), {dtype}"
    return f"{first}\n{machine}{', ' + how if how else ''}, commit {', '.join(commits)}"


def _bars(figure, axes, found: dict, ops: list[str], value, label) -> None:
    """Horizontal bars, a group for each operator and in it one for each provider."""
    providers = [p for p in PROVIDERS if any(q == p for _, q in found)]
    thick = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        for place, op in enumerate(ops):
            row = found.get((op, provider))
            if row is None:
                continue
            y = place + (i - (len(providers) - 1) / 2) * thick
            if "ms" not in row:
                axes.annotate(
                    row["status"],
                    (0, y),
                    xycoords=("axes fraction", "data"),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
                continue
            length, whiskers = value(row)
            axes.barh(y, length, thick * 0.92, color=COLOURS[provider], xerr=whiskers, capsize=2)
            end = length + (whiskers[1][0] if whiskers else 0)
            axes.annotate(
                label(row),
                (end, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        axes.barh([0], [0], color=COLOURS[provider], label=provider)
    axes.set_yticks(range(len(ops)), ops)
    axes.set_ylim(len(ops) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(providers), frameon=False)


def _family(op: str) -> str:
    return next(name for name, pattern in FAMILIES.items() if re.match(pattern, op))


def _figure_size(found: dict) -> tuple[float, float]:
    ops = {op for op, _ in found}
    return 9, 1.6 + 0.2 * len(found) + 0.12 * len(ops)


def _ops(found: dict) -> list[str]:
    return list(dict.fromkeys(op for op, _ in found))


def _timed(found: dict) -> list[dict]:
    return [row for row in found.values() if "ms" in row]


def _draw_share(figure, axes, found: dict) -> None:
    _bars(
        figure,
        axes,
        found,
        _ops(found),
        lambda row: (100 * row["share"], None),
        lambda row: f"{100 * row['share']:.1f} %",
    )
    axes.axvline(100, color="black", linewidth=0.8, zorder=0.5)
    axes.set_xlim(0, max(110, 1.1 * max(100 * row["share"] for row in _timed(found))))
    copies = sorted(row["copy_gbps"] for row in _timed(found))
    copy = copies[len(copies) // 2]
    axes.set_xlabel(f"% of the bandwidth of a plain copy (100 % = {copy:,.1f} GB/s)")


def _draw_ms(figure, axes, found: dict) -> None:
    def value(row):
        low, middle, high = (row["ms"][name] for name in ("p20", "p50", "p80"))
        return middle, [[middle - low], [high - middle]]

    _bars(figure, axes, found, _ops(found), value, lambda row: f"{row['ms']['p50']:.3g}")
    from matplotlib import ticker

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    low = min(row["ms"]["p20"] for row in _timed(found))
    high = max(row["ms"]["p80"] for row in _timed(found))
    axes.set_xlim(low / 2, high * 1.6)
    axes.set_xlabel("ms a call: median, whiskers p20 to p80 (logarithmic)")


def draw(path: str, out: str) -> list[Path]:
    """Draws the pictures of a results file into the folder `out`; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    Path(out).mkdir(parents=True, exist_ok=True)
    made = []
    for group, newest in latest(read(path)).items():
        machine, shape, dtype, graph = group
        on_gpu = any(row["device"] == "cuda" for row in newest.values())
        how = " no graph" if on_gpu and not graph else ""
        for family in FAMILIES:
            of_family = {key: row for key, row in newest.items() if _family(key[0]) == family}
            if not _timed(of_family):
                continue
            words = f"{machine} {shape} {dtype}{how} {family}".lower()
            stem = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
            for what in ("share", "ms"):
                figure, axes = plt.subplots(figsize=_figure_size(of_family), layout="constrained")
                (_draw_share if what == "share" else _draw_ms)(figure, axes, of_family)
                figure.suptitle(_title(group, list(of_family.values())), fontsize=9)
                made.append(Path(out, f"{stem}-{what}.png"))
                figure.savefig(made[-1], dpi=130)
                plt.close(figure)
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench plot", description=draw.__doc__)
    parser.add_argument("--file", default=str(RESULTS / "kernels.jsonl"))
    parser.add_argument("--out", default=str(RESULTS), help="folder for the pictures")
    options = parser.parse_args(arguments)
    try:
        made = draw(options.file, options.out)
    except ValueError as error:
        print(error)
        return 1
    for path in made:
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
