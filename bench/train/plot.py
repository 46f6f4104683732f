"""python -m bench train-plot: a picture of accuracy over training time, from the results of
`python -m bench train-accuracy` and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer

from ..paths import RESULTS

COLOURS = {
    "cached_packed": "#d62728",
    "late_lora": "#ff7f0e",
    "lpt_lora": "#e377c2",
    "recipe": "#1f77b4",
    "lora": "#2ca02c",
    "prompt_tuning": "#9467bd",
    "full": "#333333",
    "head": "#9aa5b1",
}
NAMES = {
    "cached_packed": "late prompt, cache, packed",
    "late_lora": "late LoRA alone, the same",
    "lpt_lora": "late prompt and late LoRA, the same",
    "recipe": "late prompt, authors' recipe",
    "lora": "LoRA",
    "prompt_tuning": "prompt tuning",
    "full": "full fine-tuning",
    "head": "head alone",
}


def read(path: str) -> dict[str, dict[tuple[str, int], dict]]:
    """Task -> (method, seed) -> its newest line.

    Raises:
        ValueError: no such file, or a line that is no result of `train-accuracy`.
    """
    if not Path(path).exists():
        raise ValueError(f"There is no {path}; `python -m bench train-accuracy` makes it.")
    found: dict[str, dict[tuple[str, int], dict]] = {}
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            found.setdefault(line["task"], {})[line["method"], line["seed"]] = line
            line["curve"][0][1]
        except (ValueError, KeyError, TypeError, IndexError):
            raise ValueError(f"Line {number} of {path} is no result of train-accuracy.") from None
    if not found:
        raise ValueError(f"{path} is empty; `python -m bench train-accuracy` fills it.")
    return found


def draw(path: str, out: str) -> Path:
    """Draws the picture of a results file; returns its path."""
    found = read(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(
        1, len(found), figsize=(5.6 * len(found), 4.4), layout="constrained", squeeze=False
    )
    for axes, (task, runs) in zip(all_axes[0], found.items(), strict=True):
        _draw_task(axes, task, runs)
    handles = {}
    for axes in all_axes[0]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=3 * len(found),
        frameon=False,
        fontsize=8,
    )
    lines = [line for runs in found.values() for line in runs.values()]
    about = sorted({f"{line['machine']}, commit {line['commit']}" for line in lines})
    figure.suptitle("\n".join(about), fontsize=8)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)
    return Path(out)


def _draw_task(axes, task: str, runs: dict[tuple[str, int], dict]) -> None:
    from matplotlib import ticker

    lowest = 1.0
    for name in COLOURS:
        for (method, _), line in runs.items():
            if method != name:
                continue
            seconds, accuracy = zip(*line["curve"], strict=True)
            lowest = min(lowest, max(accuracy))
            axes.plot(seconds, [100 * a for a in accuracy], color=COLOURS[name], label=NAMES[name])
            if line["reached_s"] is not None:
                at = 100 * dict(line["curve"])[line["reached_s"]]
                axes.plot([line["reached_s"]], [at], "o", color=COLOURS[name], markersize=6)
    lines = list(runs.values())
    for target in sorted({line["target"] for line in lines if line["target"] is not None}):
        axes.axhline(100 * target, color="black", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylim(bottom=max(0.0, 100 * lowest - 15), top=101)
    axes.set_xlabel("seconds of training, cache or features included (logarithmic)")
    splits = sorted({f"{line['eval_examples']} of {line['split']}" for line in lines})
    axes.set_ylabel(f"accuracy in % ({', '.join(splits)})")
    rows = sorted({f"{line['train_examples']:,}" for line in lines})
    axes.set_title(f"{task}: {', '.join(rows)} training texts; dashed: target", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def main(
    path: str = typer.Option(
        str(RESULTS / "time_to_accuracy.jsonl"), "--file", help="Results of train-accuracy."
    ),
    out: str = typer.Option(str(RESULTS / "time_to_accuracy.png"), "--out"),
) -> None:
    """Draw accuracy over training time from a results file."""
    try:
        typer.echo(draw(path, out))
    except ValueError as error:
        typer.echo(f"{error}", err=True)
        raise typer.Exit(1) from None
