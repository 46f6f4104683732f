"""python -m bench train-accuracy: seconds of training until a method is as good as it has to be.

The target is what a head alone reaches at its best plus 95 % of what full fine-tuning gains over
it. The clock runs while a method trains, and while it computes what it computes once (a cache of
the training texts, features for the head); it stands still while the model is evaluated. Methods
train one after another, so that what else the machine does meanwhile counts in the one that trains:
these seconds are noisier than the steps of `python -m bench train`. With one thread they are the
processor's, which depend less on that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from ..paths import RESULTS

# The first two say what the target is.
METHODS = (
    *("head", "full", "recipe", "lora", "prompt_tuning", "cached_packed"),
    *("lpt_lora", "late_lora"),
)
SHARE = 0.95
# A head's epochs cost next to nothing, so it gets so many times as many.
HEAD_TIMES = 5
# A method that has been at the target so often (not necessarily in a row) stops.
ENOUGH = 3


def target_accuracy(head: float, full: float) -> float | None:
    """The accuracy to reach; None where full fine-tuning gains nothing over a head.

    Args:
        head, full: best accuracies of the two.
    """
    return head + SHARE * (full - head) if full > head else None


def seconds_to(curve: list[tuple[float, float]], target: float | None) -> float | None:
    """When a curve of (seconds, accuracy) is first at the target; None: never."""
    if target is None:
        return None
    return next((seconds for seconds, accuracy in curve if accuracy >= target), None)


@dataclass(frozen=True)
class Limits:
    """When a training ends.

    Attributes:
        epochs: at the most (of a head, HEAD_TIMES as many).
        seconds: of its clock, at the most.
        eval_steps: steps between evaluations.
        batch_size: texts of a batch.
    """

    epochs: int
    seconds: float
    eval_steps: int
    batch_size: int = 32


def train_curve(
    step: Callable,
    evaluate: Callable[[], float],
    count: int,
    limits: Limits,
    *,
    seed: int,
    before: float = 0.0,
    target: float | None = None,
) -> dict:
    """Trains until a limit or well at the target.

    Args:
        step: trains on texts with the given numbers.
        evaluate: gives the accuracy.
        count: training texts.
        limits: of the training.
        seed: of the order of texts.
        before: seconds that the method took already.
        target: accuracy that ends it; None: only the limits do.

    Returns:
        curve: [(seconds, accuracy)]; steps; stopped: "target", "seconds" or "epochs".
    """
    from ..data import batches

    clock, steps, curve, stopped = before, 0, [], "epochs"
    now = seconds_of()

    def look() -> bool:
        curve.append((round(clock, 3), round(evaluate(), 5)))
        return target is not None and sum(a >= target for _, a in curve) >= ENOUGH

    for epoch in range(limits.epochs):
        for rows in batches(count, limits.batch_size, 1000 * seed + epoch):
            start = now()
            step(rows)
            clock += now() - start
            steps += 1
            late = clock > limits.seconds
            if steps % limits.eval_steps == 0 or late:
                if look():
                    stopped = "target"
                elif late:
                    stopped = "seconds"
                if stopped != "epochs":
                    return {"curve": curve, "steps": steps, "stopped": stopped}
    if steps % limits.eval_steps:
        look()
    return {"curve": curve, "steps": steps, "stopped": stopped}


def seconds_of() -> Callable[[], float]:
    """The clock: of the processor where one thread runs."""
    import torch

    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


class Task:
    """The texts of one task, and training on them by each method.

    Args:
        source: of texts and model.
        task: its name.
        split, eval_rows: what accuracy is measured on.
        train_rows: of the training texts; None: all.
        k: insertion layer.
        seed: of weights and order.
    """

    def __init__(self, source, task, split, eval_rows, train_rows, k, seed):
        import numpy as np

        from .data import real_texts
        from .models import Zoo

        self.train = real_texts(source, task, train_rows)
        self.test = real_texts(source, task, eval_rows, split)
        self.k, self.seed = k, seed
        self.zoo = Zoo(
            "minilm",
            source.model_name,
            self.train.classes,
            pad_id=self.train.pad_id,
            dropout=True,
            seed=seed,
        )
        self.everything = np.arange(len(self.train))

    def run(self, method: str, limits: Limits, target: float | None) -> dict:
        """One training; what `train_curve` gives, with seconds of what was computed once."""
        from ..data import temporary
        from .contestants import LATE
        from .rows import fill_cache, fill_features

        k = self.k if method in LATE else None
        with temporary() as folder:
            filled, now = None, seconds_of()
            start = now()
            if method == "head":
                filled = fill_features(self.zoo, self.train, self.everything)
            elif method in LATE and LATE[method][1]:
                filled = fill_cache(self.zoo, self.train, self.everything, k, folder, "bf16")
            before = 0.0 if filled is None else now() - start
            rows = None if filled is None else filled.rows
            contestant = self.zoo.contestant(method, k, self.train, rows)
            if contestant.rows is not None:
                before += contestant.rows.held_seconds
            found = train_curve(
                contestant.step,
                self._evaluation(contestant),
                len(self.train),
                limits,
                seed=self.seed,
                before=before,
                target=target,
            )
            if rows is not None and rows.cache is not None:
                rows.cache.close()
        return {"k": k, "once_s": before, "trainable": contestant.trainable, **found}

    def _evaluation(self, contestant) -> Callable[[], float]:
        """Accuracy on the texts that it is measured on, from the text."""
        import numpy as np
        import torch

        from lpt_fast.cache.forward import BATCH_TOKENS, batches_of

        from .rows import fill_features

        texts = self.test
        features = None
        if contestant.name == "head":
            features = fill_features(self.zoo, texts, np.arange(len(texts))).rows.features
        lengths = texts.lengths
        order = np.argsort(-lengths, kind="stable")
        parts = [order[part] for part in batches_of(lengths[order], BATCH_TOKENS["cpu"])]

        @torch.no_grad()
        def evaluate() -> float:
            contestant.model.eval()
            right = 0
            for rows in parts:
                if features is not None:
                    logits = contestant.model.logits(features[torch.as_tensor(rows)])
                else:
                    inputs = texts.collate(rows, contestant.device)
                    inputs.pop("labels")
                    logits = contestant.model(**inputs).logits
                right += int((logits.argmax(-1) == texts.labels[torch.as_tensor(rows)]).sum())
            contestant.model.train()
            return right / len(texts)

        return evaluate


def main(
    data: str = typer.Option(
        ..., "--data", help="Folder with a folder of train/dev/test .tsv for each task."
    ),
    tasks: str = typer.Option("trec,subj", "--tasks"),
    k: int = typer.Option(3, "--k", help="Insertion layer."),
    seeds: str = typer.Option("0", "--seeds"),
    methods: str = typer.Option(
        ",".join(METHODS), "--methods", help="head and full always run: the target needs them."
    ),
    split: str = typer.Option("dev", "--split", help="Accuracy is measured on it."),
    eval_rows: int = typer.Option(500, "--eval_rows", help="Texts of it."),
    eval_steps: int = typer.Option(20, "--eval_steps"),
    max_epochs: int = typer.Option(10, "--max_epochs"),
    max_seconds: float = typer.Option(150.0, "--max_seconds", help="Of each training's clock."),
    max_train_samples: int = typer.Option(None, "--max_train_samples"),
    model: str = typer.Option(None, "--model", help="Default: the demo's encoder (MiniLM)."),
    threads: int = typer.Option(None, "--threads", help="Of torch; default: as torch chooses."),
    out: str = typer.Option(
        str(RESULTS / "time_to_accuracy.jsonl"), "--out", help="JSON lines are appended to it."
    ),
) -> None:
    """Seconds of training until 95 % of full fine-tuning's gain over a head alone is reached."""
    import torch

    from ..data import Source, quiet
    from ..machine import describe
    from .main import need_peft

    need_peft()
    chosen = methods.split(",")
    if unknown := [name for name in chosen if name not in METHODS]:
        raise typer.BadParameter(f"--methods must be of {', '.join(METHODS)}, got {unknown[0]!r}.")
    quiet()
    if threads:
        torch.set_num_threads(threads)
    limits = Limits(max_epochs, max_seconds, eval_steps)
    typer.echo(
        f"Accuracy on {eval_rows} texts of {split} every {eval_steps} steps. A training ends after "
        f"{max_epochs} epochs (a head's after {HEAD_TIMES * max_epochs}), {max_seconds:g} s, or "
        f"its {ENOUGH}rd evaluation at the target. One after another, constant learning rate, "
        f"{torch.get_num_threads()} thread(s): seconds "
        + ("are the processor's." if torch.get_num_threads() == 1 else "are noisy.")
    )
    for task in tasks.split(","):
        for seed in map(int, seeds.split(",")):
            place = Task(
                Source(Path(data), model), task, split, eval_rows, max_train_samples, k, seed
            )
            _run_all(place, task, chosen, limits, split, out, describe())


def _run_all(place: Task, task: str, chosen, limits: Limits, split: str, out: str, about: dict):
    """Trains by all methods on one task; prints and appends a line for each."""
    head_limits = Limits(HEAD_TIMES * limits.epochs, limits.seconds, limits.eval_steps)
    found = {
        "head": place.run("head", head_limits, None),
        "full": place.run("full", limits, None),
    }
    best = {name: max(accuracy for _, accuracy in run["curve"]) for name, run in found.items()}
    target = target_accuracy(best["head"], best["full"])
    if target is None:
        typer.echo(
            f"{task:5} full fine-tuning ({100 * best['full']:.1f} %) gained nothing over a head "
            f"({100 * best['head']:.1f} %): no target."
        )
    for name in METHODS:
        if name not in found and name not in chosen:
            continue
        run = found.get(name) or place.run(name, limits, target)
        reached = seconds_to(run["curve"], target)
        line = {
            "part": "time_to_accuracy",
            "task": task,
            "method": name,
            "seed": place.seed,
            "target": None if target is None else round(target, 5),
            "reached_s": reached,
            "best": max(accuracy for _, accuracy in run["curve"]),
            "head_best": best["head"],
            "full_best": best["full"],
            "split": split,
            "eval_examples": len(place.test),
            "train_examples": len(place.train),
            "max_epochs": head_limits.epochs if name == "head" else limits.epochs,
            "max_seconds": limits.seconds,
            "eval_steps": limits.eval_steps,
            "batch_size": limits.batch_size,
            **run,
            **about,
        }
        with open(out, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        typer.echo(describe_line(line))


def describe_line(line: dict) -> str:
    """A line of results in words."""
    seconds, last = line["reached_s"], line["curve"][-1][0]
    if line["target"] is None:
        verdict = "no target"
    elif seconds is None:
        verdict = f"{100 * line['target']:.2f} % never"
    else:
        verdict = f"{100 * line['target']:.2f} % after {seconds:.1f} s"
    name = line["method"] + (f" (k = {line['k']})" if line["k"] else "")
    return (
        f"{line['task']:5} {name:22} {verdict:26} best {100 * line['best']:.2f} %, "
        f"{line['steps']:,} steps in {last:.1f} s ({line['once_s']:.1f} s of it once, before), "
        f"ended by {line['stopped']}"
    )
