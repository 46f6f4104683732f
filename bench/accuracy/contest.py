"""A contest of training methods: who takes part, which trainings that makes, the file of results.

Each training runs in a process of its own (one.py) with one thread, so that its peak memory is its
own and its seconds of processor compare even where another training runs on the core beside it.
A line is appended when a training has ended, and what the file holds is not run again: after a kill
the same command goes on, and only the training that ran is lost.

Several may run side by side (`jobs`), on a machine with a GPU and many cores: then each process
does one training after another, and neither seconds nor memory are worth comparing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import typer

from ..paths import ROOT

TASKS = ("mpqa", "trec", "sst2", "subj", "mr")  # cheap ones first
THREADS = 1
_FAILURE = 3000  # characters of what a training that failed has said


@dataclass(frozen=True)
class Method:
    """A contestant.

    Attributes:
        settings: of lpt_fast.cli.arguments.TrainArguments. Late methods (method "lpt") train from
            an activation cache that is built within their seconds.
        rates: peak learning rates; of several the best on dev is taken, for each task.
    """

    settings: dict
    rates: tuple[float, ...]


# Peers get batches of like length, so that the packed layers of late methods win nothing by padding
# that could be avoided. All train the same head: pooler and classifier.
_PEER = {"group_by_length": True}
_LATE = {"method": "lpt", "upper": "packed"}
METHODS = {
    "head": Method({"method": "head", **_PEER}, (3e-4, 1e-3, 3e-3)),
    "prompt_tuning": Method({"method": "prompt_tuning", **_PEER}, (3e-3, 1e-2, 3e-2)),
    # Rank 8, alpha 16, dropout 0.1: the command line's, written out should that change.
    "lora": Method(
        {"method": "lora", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1, **_PEER},
        (5e-4, 1e-3, 2e-3),
    ),
    "lora_all": Method(
        {
            **{"method": "lora", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1},
            **{"lora_target_modules": "all-linear", **_PEER},
        },
        (5e-4, 1e-3, 2e-3),
    ),
    "full": Method({"method": "full", **_PEER}, (2e-5, 5e-5, 1e-4)),
    # One rate each: late methods do not choose. They are the defaults of the command line.
    "lpt_paper": Method(
        {**_LATE, "generator": "npg", "num_virtual_tokens": 5, "insertion_layer": 3}, (1e-3,)
    ),
    "lpt_default": Method({**_LATE, "generator": "mppg", "num_virtual_tokens": 10}, (1e-3,)),
    "lpt_lora": Method(
        {
            **{**_LATE, "generator": "mppg", "num_virtual_tokens": 10},
            **{"lora_r": 8, "lora_target_modules": "all-linear", "lora_learning_rate": 2e-3},
        },
        (1e-3,),
    ),
    "late_lora": Method(
        {**_LATE, "generator": "none", "lora_r": 8, "lora_target_modules": "all-linear"}, (2e-3,)
    ),
    # One layer less to train, and to run.
    "late_lora_k4": Method(
        {
            **{**_LATE, "generator": "none", "insertion_layer": 4},
            **{"lora_r": 8, "lora_target_modules": "all-linear"},
        },
        (2e-3,),
    ),
    # The same share of twelve layers.
    "late_lora_k8": Method(
        {
            **{**_LATE, "generator": "none", "insertion_layer": 8},
            **{"lora_r": 8, "lora_target_modules": "all-linear"},
        },
        (2e-3,),
    ),
}


@dataclass(frozen=True)
class Job:
    """One training and what it is tested on; its fields stand in its line.

    Attributes:
        task, method, seed, learning_rate, epochs: of the training.
        split: "dev" where a learning rate is chosen, "test" for results.
        model: name of the encoder.
        few_shot: K rows drawn as `lpt-fast train --few_shot` draws them ("dev" is then the rows
            drawn beside them); None: all rows.
        max_train_samples, max_eval_samples: of a random sample; None: all.
        settings: more of TrainArguments.
    """

    task: str
    method: str
    seed: int
    split: str
    learning_rate: float
    epochs: int
    model: str
    few_shot: int | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    settings: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What makes two lines the same measurement."""
        return _key(asdict(self))


def _key(row: dict) -> str:
    return json.dumps([row[name] for name in Job.__dataclass_fields__], sort_keys=True)


class Results:
    """The lines of a file, by their jobs.

    Args:
        path: of the file; need not be there yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def rows(self) -> list[dict]:
        """All lines; a last one without its end was being written at a kill and is left out."""
        if not self.path.exists():
            return []
        whole = self.path.read_text(encoding="utf-8").rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def find(self, job: Job) -> dict | None:
        """The line of a job. The file is read each time, for another run may write to it too."""
        return next((row for row in self.rows() if _key(row) == job.key), None)

    def append(self, row: dict) -> None:
        """Adds a line, in the place of half a line if the file ends in one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")


class TrainingFailed(RuntimeError):
    """A training ended without a result."""


class Servant:
    """A process that trains one job after another (`one.serve`)."""

    def __init__(self, environment: dict):
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.accuracy.one"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )

    def train(self, given: Path, got: Path) -> str | None:
        """Waits for a job; what the process has said where it broke."""
        try:
            self.process.stdin.write(f"{given}\t{got}\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended already
        if self.process.stdout.readline() == "done\n":
            return None
        self.process.wait()
        self.said.seek(0)
        return self.said.read()

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


class Contest:
    """Runs jobs that the file lacks.

    Args:
        data: folder with a folder of train/dev/test .tsv for each task.
        results: the file.
        model_path: of the encoder; None: the demo's.
        jobs: trainings side by side; 1: each in a process of its own.
        more: of TrainArguments, for all methods.
    """

    def __init__(
        self,
        data: str,
        results: Results,
        model_path: str | None = None,
        jobs: int = 1,
        more: dict | None = None,
    ):
        self.data, self.results, self.jobs = str(Path(data).absolute()), results, jobs
        self.model_path = str(Path(model_path).absolute()) if model_path else None
        self.more = more or {}
        self._writing = threading.Lock()
        self._choosing: dict[tuple, threading.Lock] = defaultdict(threading.Lock)
        self._mine = threading.local()
        self._servants: list[Servant] = []

    def result(self, job: Job) -> dict:
        """The job's line, from the file or by running it.

        Raises:
            TrainingFailed: when it had to be run and failed.
        """
        if found := self.results.find(job):
            return found
        row = asdict(job) | self.run(job)
        with self._writing:
            self.results.append(row)
        typer.echo(
            f"{job.task:6} {job.method:14} seed {job.seed}  {job.split:4} "
            f"{job.learning_rate:.0e}  {100 * row['accuracy']:5.1f} %  {row['cpu_seconds']:6.0f} s"
        )
        return row

    def run(self, job: Job) -> dict:
        """Trains in another process; see `one.run` for what comes back."""
        more = {"data": self.data, "model_path": self.model_path, "threads": THREADS}
        with tempfile.TemporaryDirectory() as folder:
            given, got = Path(folder, "job.json"), Path(folder, "result.json")
            given.write_text(json.dumps(asdict(job) | more | {"folder": folder}))
            broke = self._alone(given, got) if self.jobs == 1 else self._side_by_side(given, got)
            if broke is not None or not got.exists():
                raise TrainingFailed(f"{job} broke:\n{(broke or '')[-_FAILURE:]}")
            row = json.loads(got.read_text())
        if self.jobs > 1:
            row |= {"side_by_side": self.jobs}
        return row

    def _alone(self, given: Path, got: Path) -> str | None:
        """What was said by a process that broke."""
        done = subprocess.run(
            [sys.executable, "-m", "bench.accuracy.one", str(given), str(got)],
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        return done.stderr if done.returncode else None

    def _side_by_side(self, given: Path, got: Path) -> str | None:
        mine = getattr(self._mine, "servant", None)
        if mine is None:
            mine = self._mine.servant = Servant(self._environment)
            self._servants.append(mine)
        broke = mine.train(given, got)
        if broke is not None:
            self._mine.servant = None
        return broke

    @property
    def _environment(self) -> dict:
        return os.environ | {"OMP_NUM_THREADS": str(THREADS)}

    def final(self, name: str, task: str, seed: int, choice: dict, common: dict) -> dict:
        """Line of a tested training with the learning rate that is best on dev; of equally good
        ones the first.

        Args:
            name: of the method.
            task, seed: of the training.
            choice: fields of the jobs that choose, where they differ.
            common: fields of all jobs.
        """
        method = METHODS[name]
        common = {"task": task, "method": name, "settings": method.settings | self.more, **common}
        rate = method.rates[0]
        if len(method.rates) > 1:
            jobs = [
                Job(**common | choice, split="dev", learning_rate=rate) for rate in method.rates
            ]
            with self._choosing[name, task, common.get("few_shot")]:
                rows = [self.result(job) for job in jobs]
            rate = max(rows, key=lambda row: row["accuracy"])["learning_rate"]
        return self.result(Job(**common, seed=seed, split="test", learning_rate=rate))

    def all(self, finals: Iterable) -> None:
        """Runs what `finals` gives, functions without arguments; one that fails is said, and the
        next one runs.
        """
        # So that `kill` ends the trainings in progress too, and their folders go.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        failures = []

        def one(final) -> None:
            try:
                final()
            except TrainingFailed as error:
                failures.append(error)
                typer.echo(str(error), err=True)

        try:
            if self.jobs == 1:
                for final in finals:
                    one(final)
            else:
                self._all_side_by_side(one, finals)
        finally:
            signal.signal(signal.SIGTERM, before)
        if failures:
            typer.echo(f"{len(failures)} failed; the same command runs them again.", err=True)
            raise typer.Exit(1)

    def _all_side_by_side(self, one, finals: Iterable) -> None:
        pool = ThreadPoolExecutor(self.jobs)
        try:
            for ended in [pool.submit(one, final) for final in finals]:
                ended.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for servant in self._servants:
                servant.end()


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between."""
    return [int(part) for part in text.split(",")]


def chosen(names: str, known: Iterable[str], option: str) -> list[str]:
    """Names with commas between, each of them known.

    Raises:
        typer.BadParameter: for one that is not.
    """
    got = [name.strip() for name in names.split(",")]
    for name in got:
        if name not in known:
            raise typer.BadParameter(f"{name!r} in {option} is none of {', '.join(known)}.")
    return got
