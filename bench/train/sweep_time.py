"""python -m bench sweep-time: seconds of a sweep of 24 trials, beside 24 runs of `lpt-fast train`
and 24 LoRA trainings of the same epochs, both extrapolated from three.

All are whole: reading, tokenising, loading the model, filling the cache, evaluating on dev after
each epoch; of the sweep also its pictures and the best setting trained once more. A process is
started once for all. The sweep has to have run 24 trials, and the best to predict, or there is no
figure.
"""

from __future__ import annotations

import statistics
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import typer

from ..paths import RESULTS

SPACE = {
    "insertion_layer": [2, 3, 4],
    "generator": ["npg", "mppg"],
    "learning_rate": [1e-3, 3e-3],
    "seed": [1, 2],
}
TRIALS = 24
TARGET = 6.0  # times as fast as LoRA


def main(
    data: str = typer.Option(
        ..., "--data", help="Folder with a folder of train/dev/test .tsv for each task."
    ),
    task: str = typer.Option("trec", "--task"),
    model: str = typer.Option(None, "--model", help="Default: the demo's encoder (MiniLM)."),
    num_train_epochs: float = typer.Option(2.0, "--num_train_epochs"),
    max_train_samples: int = typer.Option(None, "--max_train_samples"),
    out: str = typer.Option(
        str(RESULTS / "many.jsonl"), "--out", help="JSON lines are appended to it."
    ),
) -> None:
    """Seconds of a sweep, and of as many trainings one by one."""
    from ..data import Figure, Recorder, Source, ends_where_wrong, quiet, require, temporary

    quiet()
    source, folder = Source(Path(data), model), Path(data) / task
    common = {
        "model": source.model_name,
        "train_file": str(folder / "train.tsv"),
        "validation_file": str(folder / "dev.tsv"),
        "num_train_epochs": num_train_epochs,
        "max_train_samples": max_train_samples,
        "use_cpu": True,
    }
    facts = {"task": task, "epochs": num_train_epochs, "rows": max_train_samples or "all"}
    record = Recorder(out, facts)
    with temporary() as place, ends_where_wrong("sweep"):
        lora, late = [], []
        for i in range(3):
            lora.append(_training(common, Path(place) / f"lora{i}", method="lora", seed=i))
            one = {"insertion_layer": SPACE["insertion_layer"][i], "seed": i}
            one |= {"generator": SPACE["generator"][i % 2], "learning_rate": 3e-3}
            one["activation_cache"] = str(Path(place) / "cache")
            late.append(_training(common, Path(place) / f"late{i}", **one))
            if i == 1:
                sweep, found = _sweep(common, Path(place) / "sweep")
        require(len(_lines(found.folder / "results.csv")) == TRIALS + 1, "trials are missing")
        from lpt_fast.cli.inference import Classifier

        said = Classifier(str(found.folder / "best"), use_cpu=True).predict({"text": ["who ?"]})
        require(len(list(said)) == 1, "the best adapter does not predict")
    for name, seconds in (("LoRA", lora), ("lpt-fast train", late)):
        whole = TRIALS * statistics.mean(seconds)
        details = {"of_three": " ".join(f"{s:.1f}" for s in seconds)}
        record(Figure("sweep", f"{TRIALS} x {name}, extrapolated", whole, "s", details=details))
    accuracy = {"best": found.best["accuracy"]}
    record(Figure("sweep", f"a sweep of {TRIALS} trials", sweep, "s", details=accuracy))
    ratio = TRIALS * statistics.mean(lora) / sweep
    record(Figure("sweep", "LoRA trainings over the sweep", ratio, "x", TARGET, True))
    record(
        Figure(
            "sweep", "lpt-fast train over the sweep", TRIALS * statistics.mean(late) / sweep, "x"
        )
    )


def _training(common: dict, folder: Path, **more) -> float:
    from lpt_fast.cli.arguments import TrainArguments
    from lpt_fast.cli.train import train

    args = TrainArguments(**common, output_dir=str(folder), save_strategy="no", **more)
    start = time.perf_counter()
    with redirect_stdout(StringIO()):  # Trainer's log
        train(args)
    return time.perf_counter() - start


def _sweep(common: dict, folder: Path):
    from lpt_fast import Sweep

    start = time.perf_counter()
    with redirect_stdout(StringIO()):
        found = Sweep(space=SPACE, trials=TRIALS, output_dir=str(folder), **common).run()
    return time.perf_counter() - start, found


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
