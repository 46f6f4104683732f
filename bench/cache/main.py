"""python -m bench cache: what the activation cache costs and gives, beside its targets.

Every part checks first that what it measures is right; where it is not, it gives no figure and the
program ends with an error.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import typer

from ..paths import RESULTS

# Part -> module and function in it.
PARTS = {
    "size": ("parts", "size"),
    "build": ("speed", "build"),
    "read": ("speed", "read"),
    "step": ("speed", "step"),
    "memory": ("memory", "memory"),
    "canary": ("parts", "canary_part"),
}


def part_of(name: str) -> Callable:
    """The function of a part, Source and Sizes -> figures; its libraries are loaded now."""
    module, function = PARTS[name]
    return getattr(import_module(f".{module}", __package__), function)


def main(
    data: str = typer.Option(
        ..., "--data", help="Folder with a folder of train/dev/test .tsv for each task."
    ),
    parts: str = typer.Option(",".join(PARTS), "--parts", help=f"Of {', '.join(PARTS)}."),
    model: str = typer.Option(
        None, "--model", help="Default: the demo's encoder (MiniLM, 6 layers)."
    ),
    threads: int = typer.Option(None, "--threads", help="Of torch; default: as torch chooses."),
    quick: bool = typer.Option(False, "--quick", help="Tiny sizes: does it all run?"),
    out: str = typer.Option(
        str(RESULTS / "cache.jsonl"), "--out", help="JSON lines are appended to it."
    ),
) -> None:
    """Size, speed and memory of the activation cache, and how exact its rows are."""
    chosen = parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        raise typer.BadParameter(f"--parts must be of {', '.join(PARTS)}, got {unknown[0]!r}.")
    import torch

    from ..data import QUICK, Recorder, Sizes, Source, WrongResult, quiet

    quiet()
    if threads:
        torch.set_num_threads(threads)
    source, record = Source(Path(data), model), Recorder(out)
    sizes = QUICK if quick else Sizes()
    wrong = 0
    for name in chosen:
        try:
            for figure in part_of(name)(source, sizes):
                record(figure)
        except WrongResult as error:
            wrong += 1
            typer.echo(f"{name:9} WRONG, no figure: {error}", err=True)
    if wrong:
        raise typer.Exit(1)
