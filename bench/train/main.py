"""python -m bench train: what a training step costs with a late prompt, with and without the cache,
beside the authors' recipe, LoRA, prompt tuning, full fine-tuning and a head alone.

All read the same batches, in turns; who does not first pass the gate (gate.py) gets no
figure, and the program ends with an error that says why.
"""

from __future__ import annotations

from pathlib import Path

import typer

from ..paths import RESULTS

LAYERS = {"minilm": "3,4", "roberta-base": "9", "roberta-large": "12,18"}


def main(
    data: str = typer.Option(
        None,
        "--data",
        help="Folder with a folder of .tsv for each task; left out: random ids, real lengths.",
    ),
    task: str = typer.Option("subj", "--task"),
    batch_size: int = typer.Option(32, "--batch_size"),
    batch_tokens: int = typer.Option(
        None,
        "--batch_tokens",
        help="Instead of --batch_size, real tokens of a batch; then also the share of the "
        "machine's measured matmul rate.",
    ),
    layers: str = typer.Option(
        None, "--layers", help="k, or several with commas; default: those that have targets."
    ),
    encoder: str = typer.Option("minilm", "--encoder", help="minilm, roberta-base, roberta-large."),
    model: str = typer.Option(
        None, "--model", help="Name or folder of weights, in place of the encoder's."
    ),
    dtype: str = typer.Option("fp32", "--dtype", help="fp32 or bf16 (autocast)."),
    store: str = typer.Option("bf16", "--store", help="Of the caches that are timed."),
    device: str = typer.Option(None, "--device", help="cpu or cuda; default: cuda if there."),
    contestants: str = typer.Option(
        None, "--contestants", help="Names with commas, such as recipe,cached_packed; default: all."
    ),
    steps: int = typer.Option(None, "--steps", help="Timed steps of each; default 30."),
    rows: int = typer.Option(None, "--rows", help="Texts of the task; default: all."),
    build_rows: int = typer.Option(
        2000, "--build_rows", help="Texts of a timed build, at least; more are scaled."
    ),
    memory: bool = typer.Option(True, "--memory/--no-memory", help="Peak memory of each."),
    profile: bool = typer.Option(
        False, "--profile", help="Instead, torch.profiler's table of a cached_packed step."
    ),
    threads: int = typer.Option(None, "--threads", help="Of torch; default: as torch chooses."),
    seed: int = typer.Option(0, "--seed", help="Of weights and batches."),
    quick: bool = typer.Option(False, "--quick", help="Tiny sizes: does it all run?"),
    out: str = typer.Option(
        str(RESULTS / "train.jsonl"), "--out", help="JSON lines are appended to it."
    ),
) -> None:
    """Time, memory and throughput of a training step for each method."""
    import torch

    from ..data import quiet

    need_peft()
    from ..data import Recorder, ends_where_wrong
    from .contestants import called
    from .run import Bench, Settings

    quiet()
    if threads:
        torch.set_num_threads(threads)
    on_gpu = torch.cuda.is_available()
    device = device or ("cuda" if on_gpu else "cpu")
    try:
        settings = Settings(
            data=None if data is None else Path(data),
            task=task,
            batch_size=4 if quick and batch_size == 32 else batch_size,
            batch_tokens=batch_tokens,
            layers=_numbers(layers or _default_layers(encoder, quick)),
            encoder=encoder,
            model=model,
            dtype=dtype,
            store=store,
            device=device,
            contestants=None
            if contestants is None
            else tuple(called(name, dtype, device) for name in contestants.split(",")),
            steps=steps or (3 if quick else 30),
            warmup=1 if quick else 3,
            rows=rows or (64 if quick else None),
            build_rows=min(build_rows, 16) if quick else build_rows,
            memory=memory,
            quick=quick,
            seed=seed,
        )
        bench = Bench(settings)
    except ValueError as error:
        typer.echo(f"{error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(bench.describe())
    record = Recorder(None if profile else out, bench.common())
    with ends_where_wrong("train"):
        for figure in bench.profiled() if profile else bench.figures():
            record(figure)


def _default_layers(encoder: str, quick: bool) -> str:
    return "2" if quick and encoder != "minilm" else LAYERS.get(encoder, "1")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"`--layers` must be numbers with commas between, got {text!r}.") from None


def need_peft() -> None:
    """Says in one sentence what is missing, before anything that imports it."""
    import importlib.util

    if importlib.util.find_spec("peft") is None:
        typer.echo(
            "This benchmark needs peft, which is not installed here; pip install peft.", err=True
        )
        raise typer.Exit(2)
