"""One training of a contest, in a process of its own: python -m bench.accuracy.one JOB RESULT.

JOB is a file with a `contest.Job` as JSON, and where its data, model and folder are; RESULT is
written at the end. Without arguments, a pair of such files for each line of standard input, one
after another: where many run side by side, starting a program takes longer than training on a GPU.
A line "done" follows each; a training that fails ends the program.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch


def peak_mib() -> float:
    """Most memory that this program has held. (Not ru_maxrss, where the kernel says better: that
    one also counts what the parent held when it started this process.)
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


@contextmanager
def _clocked() -> Iterator[dict]:
    """Fills in the seconds of processor and the peak memory of `Trainer.train`, evaluation apart.

    A late method's cache is built in there. `lpt_fast.cli.train` itself tells wall time alone.
    """
    from lpt_fast.cli import train as program

    spent: dict = {}

    def timed(train):
        def run(self, *args, **named):
            start = time.process_time()
            result = train(self, *args, **named)
            spent["cpu_seconds"] = round(time.process_time() - start, 2)
            spent["peak_mib"] = round(peak_mib(), 1)
            return result

        return run

    with ExitStack() as stack:
        for cls in (program.CountedTrainer, program.LPTTrainer):
            stack.enter_context(patch.object(cls, "train", timed(cls.train)))
        yield spent


def _draw(job: dict) -> dict:
    """Files of the rows that `--few_shot K` draws. (It would evaluate its dev rows after every
    epoch, which takes longer than so small a training.)
    """
    from lpt_fast.cli.arguments import TrainArguments
    from lpt_fast.cli.task_data import read_data

    source = f"{job['data']}/{job['task']}/train.tsv"
    args = TrainArguments(
        model="-", task=job["task"], train_file=source, few_shot=job["few_shot"], seed=job["seed"]
    )
    data = read_data(args)
    files = {}
    for name, split in (("train", data.train), ("dev", data.validation)):
        files[name] = f"{job['folder']}/{name}.jsonl"
        columns = {**split.texts, "label": [data.labels[i] for i in split.labels]}
        with open(files[name], "w", encoding="utf-8") as f:
            for values in zip(*columns.values(), strict=True):
                f.write(json.dumps(dict(zip(columns, values, strict=True))) + "\n")
    return files


def run(job: dict) -> dict:
    """Trains and tests.

    Args:
        job: fields of `contest.Job`, with data, model_path, folder and threads.

    Returns:
        accuracy and f1 of the split, numbers of rows, wall and processor seconds of the training
        (with the cache's build), trained parameters, peak memory up to the training's end, threads,
        machine, versions, commit.
    """
    import torch

    from lpt_fast.cli.arguments import TrainArguments
    from lpt_fast.cli.demo import demo_model
    from lpt_fast.cli.main import _quiet
    from lpt_fast.cli.train import train

    from ..machine import describe

    _quiet()
    torch.set_num_threads(job["threads"])
    task = f"{job['data']}/{job['task']}"
    files = {name: f"{task}/{name}.tsv" for name in ("train", "dev", "test")}
    if job["few_shot"]:
        files |= _draw(job)
    more = dict(job["settings"])
    if more["method"] == "lpt":
        more["activation_cache"] = f"{job['folder']}/cache"
    args = TrainArguments(
        model=job["model_path"] or demo_model(),
        task=job["task"],
        train_file=files["train"],
        test_file=files[job["split"]],
        num_train_epochs=job["epochs"],
        learning_rate=job["learning_rate"],
        max_train_samples=job["max_train_samples"],
        max_eval_samples=job["max_eval_samples"],
        per_device_train_batch_size=32,
        seed=job["seed"],
        save_strategy="no",
        logging_steps=10**9,
        output_dir=f"{job['folder']}/out",
        **more,
    )
    with _clocked() as spent:
        result = train(args)
    tested = result["test"]
    return {
        "accuracy": round(tested["accuracy"], 4),
        "f1": round(tested["f1"], 4),
        "train_examples": result["train_examples"],
        "test_examples": tested["examples"],
        "train_loss": result["train_loss"],
        "seconds": result["train_seconds"],
        **spent,
        "trainable_parameters": result["trainable_parameters"],
        "threads": torch.get_num_threads(),
        **describe(),
    }


def serve() -> None:
    """Trains what standard input names, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a training prints is no answer
    for line in sys.stdin:
        _train(*line.rstrip("\n").split("\t"))
        print("done", file=answers, flush=True)


def _train(given: str, got: str) -> None:
    Path(got).write_text(json.dumps(run(json.loads(Path(given).read_text()))))


if __name__ == "__main__":
    _train(*sys.argv[1:]) if sys.argv[1:] else serve()
