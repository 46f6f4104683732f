"""python -m bench predict: texts a second of `lpt-fast predict`'s own code, beside a transformers
pipeline with a LoRA model, as users run them.

Test texts of the tasks, in their order, tokenised within the time of each. The pipeline has the
best of several batch sizes. Who classifies a text otherwise than the model's own padded code in
fp32 more often than one time in a hundred gets no figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import typer

from ..paths import RESULTS

BATCHES = (8, 32, 64)
SURE = 0.05  # Of texts whose two best classes are closer in probability, either answer is right.
OTHERWISE = 0.01


def _train(folder: Path, data: Path, name: str, model: str, method: dict) -> str:
    """An adapter after a few steps: what it says does not matter, but that it says something."""
    from lpt_fast.cli.arguments import TrainArguments
    from lpt_fast.cli.train import train

    out = str(folder / name)
    train(
        TrainArguments(
            model=model,
            task="subj",
            train_file=str(data / "subj" / "train.tsv"),
            max_train_samples=512,
            num_train_epochs=2,
            save_strategy="no",
            use_cpu=True,
            output_dir=out,
            **method,
        )
    )
    return out


def _pipeline(folder: str, batch_size: int) -> Callable[[list[str]], list[str]]:
    from transformers import pipeline

    from lpt_fast.cli.inference import Classifier

    found = Classifier(folder, use_cpu=True, compute_dtype="float32")
    model, labels = found.model, found.labels
    model.config.id2label = dict(enumerate(labels))
    run = pipeline("text-classification", model=model, tokenizer=found.tokenizer, device="cpu")

    def classify(texts: list[str]) -> list[str]:
        how = {"batch_size": batch_size, "truncation": True, "max_length": 128}
        return [one["label"] for one in run(texts, **how)]

    return classify


def _ours(folder: str, dtype: str) -> Callable[[list[str]], list[str]]:
    from lpt_fast.cli.inference import Classifier

    found = Classifier(folder, use_cpu=True, compute_dtype=dtype)

    def classify(texts: list[str]) -> list[str]:
        return [one["label"] for one in found.predict({"text": texts})]

    return classify


def _truth(folder: str, texts: list[str]) -> list[tuple[str, bool]]:
    """What the padded way in fp32 says, one text at a time, and whether it is sure."""
    from lpt_fast.cli.inference import Classifier
    from lpt_fast.train.trainer import find_late_prompt

    found = Classifier(folder, batch_size=1, use_cpu=True, compute_dtype="float32")
    if found.formulation.method == "lpt":
        find_late_prompt(found.model).upper = "padded"
    chances = found.probabilities({"text": texts})
    two = chances.copy()
    two.sort(axis=1)
    sure = two[:, -1] - two[:, -2] > SURE
    return [(found.labels[best], bool(s)) for best, s in zip(chances.argmax(1), sure, strict=True)]


def main(
    data: str = typer.Option(
        ..., "--data", help="Folder with a folder of train/dev/test .tsv for each task."
    ),
    tasks: str = typer.Option("subj,trec", "--tasks"),
    model: str = typer.Option(None, "--model", help="Default: the demo's encoder (MiniLM)."),
    rounds: int = typer.Option(3, "--rounds", help="In which all take their turn."),
    rows: int = typer.Option(None, "--rows", help="Texts; default: all."),
    out: str = typer.Option(
        str(RESULTS / "predict.jsonl"), "--out", help="JSON lines are appended to it."
    ),
) -> None:
    """Texts a second of prediction, and how many times a pipeline with LoRA's."""
    from ..data import Figure, Recorder, Source, ends_where_wrong, quiet, require, temporary

    quiet()
    source = Source(Path(data), model)
    texts = [text for task in tasks.split(",") for text, _ in source.lines(task, "test")][:rows]
    name = Path(model).name if model else "all-MiniLM-L6-v2"
    record = Recorder(out, {"tasks": tasks, "model": name, "texts": len(texts)})
    model = source.model_name
    with temporary() as folder:
        here = Path(folder)
        lora = _train(here, Path(data), "lora", model, {"method": "lora"})
        late = {"lora_r": 8, "generator": "none"}
        adapters = {
            "late_lora": _train(here, Path(data), "late_lora", model, late),
            "late_prompt": _train(here, Path(data), "late_prompt", model, {}),
        }
        runs = {f"pipeline, LoRA, batches of {n}": (lora, _pipeline(lora, n)) for n in BATCHES}
        for name, adapter in adapters.items():
            for dtype in ("float32", "bfloat16"):
                runs[f"lpt-fast, {name}, {dtype}"] = adapter, _ours(adapter, dtype)
        some = texts[:: max(1, len(texts) // 500)]
        truths = {adapter: _truth(adapter, some) for adapter in {a for a, _ in runs.values()}}
        with ends_where_wrong("predict"):
            for label, (adapter, run) in runs.items():
                said = zip(run(some), truths[adapter], strict=True)
                wrong = sum(own != best and sure for own, (best, sure) in said) / len(some)
                record(Figure("gate", f"{label}: otherwise", 100 * wrong, "%", 100 * OTHERWISE))
                require(wrong <= OTHERWISE, f"{label} classifies {wrong:.1%} otherwise")
        seconds: dict[str, list[float]] = {label: [] for label in runs}
        for turn in range(rounds):
            order = list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]
            for label in order:
                start = time.perf_counter()
                runs[label][1](texts)
                seconds[label].append(time.perf_counter() - start)
    took = {label: statistics.median(found) for label, found in seconds.items()}
    best = min(took[label] for label in runs if label.startswith("pipeline"))
    for label, one in took.items():
        record(Figure("predict", label, len(texts) / one, "texts/s"))
        if not label.startswith("pipeline"):
            record(Figure("ratio", f"{label}, over the best pipeline", best / one, "x", 2.0, True))
