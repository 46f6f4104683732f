"""python -m bench step-plot: a picture of what a training step takes, from the committed results of
`python -m bench train` (CPU) and of bench/first_light.sh (GPU) and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer

from ..paths import RESULTS
from .plot import COLOURS

NAMES = {"lora": "PEFT LoRA", "recipe": "late prompt,\nauthors' recipe", "ours": "lpt-fast"}
PANELS = (
    ("MiniLM, k = 4 of 6\n32 sentences, 2 CPU cores", "minilm", 4, None),
    ("RoBERTa-base-sized, k = 9 of 12\n32 sentences, 2 CPU cores", "roberta-base", 9, None),
    ("RoBERTa-large-sized, k = 18 of 24\n32 sentences, one H200", "roberta-large", 18, "b32"),
    ("RoBERTa-large-sized, k = 18 of 24\n256 sentences, one H200", "roberta-large", 18, "b256"),
)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def milliseconds(root: Path, encoder: str, k: int, size: str | None) -> dict[str, float]:
    """Contestant of NAMES -> milliseconds of a step, the newest figures in order.

    Args:
        root: folder of results.
        encoder, k: which model.
        size: of the batches of a GPU's results; None: the CPU's.
    """
    found: dict[str, float] = {}
    if size is None:
        # (Each as it runs where nobody says anything: ours in bf16, the others in fp32.)
        ours = {f"recipe, k = {k}": "recipe", f"ours_bf16, k = {k}": "ours", "lora": "lora"}
        for line in _lines(root / "train.jsonl"):
            whole = line["part"] == "step" and line["batch_tokens"] is None
            if whole and line["encoder"] == encoder and line["name"] in ours:
                found[ours[line["name"]]] = line["value"]
    else:
        ours = {"recipe": "recipe", "cached_graphs": "ours", "lora": "lora"}
        for line in _lines(root / "gpu" / "train.jsonl"):
            timed = line.get("size") == size and line["k"] == k and "ms" in line
            if timed and line["who"] in ours:
                found[ours[line["who"]]] = line["ms"]
    return {name: found[name] for name in NAMES}


def draw(root: Path, out: Path) -> Path:
    """Draws the picture; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 3.2))
    colours = [COLOURS["lora"], COLOURS["recipe"], COLOURS["cached_packed"]]
    for panel, (title, *which) in zip(axes, PANELS, strict=True):
        times = milliseconds(root, *which)
        bars = panel.bar(list(NAMES.values()), list(times.values()), color=colours)
        labels = [
            (f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms")
            + ("" if name == "ours" else f"\n{ms / times['ours']:.1f}x")
            for name, ms in times.items()
        ]
        panel.bar_label(bars, labels, fontsize=8)
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.margins(y=0.25)
        panel.set_yticks([])
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    figure.suptitle(
        "A training step, and how many times as long as lpt-fast's it takes (on CPUs: lpt-fast in "
        "bf16, the others in fp32, as they run by default)",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(out, dpi=100)
    plt.close(figure)
    return out


def main(
    root: str = typer.Option(str(RESULTS), "--results", help="Folder of results."),
    out: str = typer.Option(str(RESULTS / "steps.png"), "--out"),
) -> None:
    """Draw what a training step takes."""
    print(draw(Path(root), Path(out)))
