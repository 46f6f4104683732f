"""`python -m bench many`: figures of what gives the right probabilities, and of nothing else."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.train import many
from lpt_fast.cli.all_tasks import Classifiers
from tests.bench.source import small_source


def run(folder, *more):
    flags = ["--data", folder, "--model", folder / "model", "--k", 2, "--rows", 20, "--rounds", 1]
    flags = [*flags, "--out", folder / "many.jsonl", *more]
    return CliRunner().invoke(app, ["many", *map(str, flags)])


@pytest.mark.slow
def test_every_contestant(tmp_path):
    small_source(tmp_path, ("subj",), ("test",))
    done = run(tmp_path, "--tasks", "1,3")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "many.jsonl").read_text().splitlines()]
    for tasks in (1, 3):
        own = {row["name"]: row for row in rows if row["tasks"] == tasks and row["unit"] != "x"}
        assert list(own) == list(many.CONTESTANTS)
        assert all(row["value"] > 0 and row["texts"] == 20 for row in own.values())
    names = [row["name"] for row in rows if row["unit"] == "x"]
    assert "late LoRA, bf16, over LoRA, set_adapter, fp32" in names


@pytest.mark.slow
def test_what_is_wrong_gets_no_figure(tmp_path, monkeypatch):
    small_source(tmp_path, ("subj",), ("test",))
    right = Classifiers.of_examples

    def wrong(self, *args):
        return {name: p[::-1] for name, p in right(self, *args).items()}

    monkeypatch.setattr(Classifiers, "of_examples", wrong)
    done = run(tmp_path, "--tasks", "2", "--contestants", "late prompts, fp32")
    assert done.exit_code == 1 and "late prompts, fp32: probabilities differ by" in done.output
    assert not (tmp_path / "many.jsonl").exists()


def test_unknown_names(tmp_path):
    done = run(tmp_path, "--contestants", "nobody")
    assert done.exit_code == 2
