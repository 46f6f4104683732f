"""The sweep for the defaults: what runs, on which rows, and what is not run again."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.accuracy import sweep
from lpt_fast.cli import demo
from lpt_fast.cli import train as cli_train


@pytest.fixture
def trained(monkeypatch):
    """What the command trains, without training."""
    seen = []

    def train(args):
        seen.append(args)
        return {"test": {"accuracy": 0.5, "loss": 1.0}, "trainable_parameters": 7}

    monkeypatch.setattr(cli_train, "train", train)
    monkeypatch.setattr(demo, "demo_model", lambda: "here")
    return seen


def call(tmp_path, *more):
    options = ["--data", "DATA", "--tasks", "trec,sst2", "--out", str(tmp_path / "out.jsonl")]
    return CliRunner().invoke(app, ["accuracy-sweep", *options, *more])


def test_dev_rows_and_never_test_rows(trained, tmp_path):
    done = call(tmp_path, "--stages", "lora,peer", "--insertion_layers", "2", "--seeds", "1,2")
    assert done.exit_code == 0, done.output
    assert len(trained) == 2 * 2 * (len(sweep.STAGES["lora"]) + len(sweep.STAGES["peer"]))
    assert {args.test_file for args in trained} == {"DATA/trec/dev.tsv", "DATA/sst2/dev.tsv"}
    assert {args.train_file.rpartition("/")[2] for args in trained} == {"train.tsv"}
    assert not any(args.validation_file for args in trained)
    late = [args for args in trained if args.method == "lpt"]
    assert all(args.activation_cache and args.insertion_layer == 2 for args in late)
    peers = [args for args in trained if args.method == "lora"]
    assert peers and all(p.activation_cache is None and p.group_by_length for p in peers)


def test_what_is_there_is_not_run_again(trained, tmp_path):
    call(tmp_path, "--stages", "depth")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(lines) == len(trained) == 4
    (tmp_path / "out.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    call(tmp_path, "--stages", "depth")
    assert len(trained) == 5
    call(tmp_path, "--stages", "depth", "--insertion_layers", "4")
    assert len(trained) == 9  # of another layer
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"dev"} and all(row["machine"] for row in rows)


def test_report(trained, tmp_path):
    call(tmp_path, "--stages", "depth", "--insertion_layers", "2,3")
    shown = CliRunner().invoke(
        app, ["accuracy-sweep-report", "--file", str(tmp_path / "out.jsonl")]
    )
    (head, _, *rows) = shown.output.splitlines()
    assert head == "| encoder | k | setting | trec | sst2 |" and len(rows) == 4
    assert [row.split(" | ")[1] for row in rows] == ["2", "2", "3", "3"]
    assert rows[0].endswith("| 50.0 | 50.0 |") and "learning_rate=0.002" in rows[0]
