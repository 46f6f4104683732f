"""`lpt-fast demo` on a tiny model: its table, its picture, and what it says to type next."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from lpt_fast.cli.demo import CURVE_POINTS, METHODS, PICTURE, WATCHED, draw, table_rows
from lpt_fast.cli.demo_spelling import CORRECT, MISSPELT
from tests.cli.cases import invoke, write_tsv


def result(accuracy=0.9, seconds=10.0, curve=((1.0, 0.5), (2.0, 0.9))):
    return {
        "test": {"accuracy": accuracy, "examples": 900},
        "train_seconds": seconds,
        "trainable_parameters": 1234,
        "accuracy_over_seconds": list(curve),
    }


def test_table():
    seconds = dict(zip(METHODS, (20.0, 40.0, 8.0, 0.0), strict=True))
    header, *rows = table_rows({name: result(seconds=s) for name, s in seconds.items()})
    assert header == ["method", "test accuracy", "parameters trained", "seconds", "speed-up"]
    assert [row[0] for row in rows] == list(METHODS)
    # The standard error of a share: sqrt(0.9 * 0.1 / 900) = 0.01.
    assert {tuple(row[1:3]) for row in rows} == {("90.0 % ± 1.0", "1,234")}
    assert [row[3] for row in rows] == ["20", "40", "8", "0"]
    assert [row[4] for row in rows] == ["2.0x", "", "5.0x", "400.0x"]


def test_picture(tmp_path):
    curves = dict.fromkeys(METHODS, result()) | {"head only": result(curve=())}
    said = draw(curves, tmp_path / PICTURE)
    assert said.startswith(str(tmp_path / PICTURE))
    assert (tmp_path / PICTURE).read_bytes()[:4] == b"\x89PNG"


def test_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = draw(dict.fromkeys(METHODS, result()), tmp_path / PICTURE)
    assert "pip install matplotlib" in said and "\n" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("again", [False, True])
def test_every_method_trains_the_same(tmp_path, monkeypatch, again):
    """What is handed to each training; and a cache of an earlier demo is not kept quiet."""
    rows = write_tsv(tmp_path / "rows.tsv")
    paths = dict.fromkeys(("train", "validation", "test", "watch"), Path(rows))
    given = []
    monkeypatch.setattr("lpt_fast.cli.demo.write_files", lambda folder: paths)
    monkeypatch.setattr(
        "lpt_fast.cli.train.train",
        lambda args: given.append(args) or result() | {"insertion_layer": 3},
    )
    out = tmp_path / "out"
    if again:
        (out / "cache").mkdir(parents=True)
    out.mkdir(exist_ok=True)
    done = invoke("demo", "--model", "m", "--output_dir", out, "--seed", 7)
    assert done.exit_code == 0, done.output
    assert ("A cache of an earlier demo" in done.stdout) == again
    assert [args.method for args in given] == ["head", "lora", "lpt", "lpt"]
    names = "train_file test_file num_train_epochs max_length seed eval_steps"
    assert len({tuple(getattr(a, n) for n in names.split()) for a in given}) == 1
    assert [args.group_by_length for args in given] == [True, True, False, False]
    assert len({args.output_dir for args in given}) == 4
    caches = [args.activation_cache for args in given]
    assert caches[:2] == [None, None] and caches[3] == str(out / "cache") != caches[2]


@pytest.mark.slow
def test_demo(models_dir, tmp_path):
    """From real sentences to what it says to type next, which works."""
    out = tmp_path / "demo"
    call = ("demo", "--model", models_dir / "bert", "--output_dir", out, "--num_train_epochs", 0.05)
    shown = invoke(*call).stdout
    results = json.loads((out / "results.json").read_text())
    assert results["train_examples"] > 800
    lines = shown.splitlines()
    header, rule, *rows = lines[lines.index("") + 1 :][:6]
    assert header.startswith("method ") and set(rule) == {"-"}
    cells = [re.split(r"  +", row.strip()) for row in rows]
    assert [row[0] for row in cells] == list(METHODS)
    assert all(re.fullmatch(r"\d+\.\d % ± \d\.\d", row[1]) for row in cells)
    assert int(cells[-1][2].replace(",", "")) == results["trainable_parameters"]
    assert f"standard error of {results['test']['examples']:,} test sentences" in shown
    assert results["validation"]["examples"] == WATCHED
    assert 0 < len(results["accuracy_over_seconds"]) <= CURVE_POINTS
    assert f"{out / PICTURE} shows" in shown and (out / PICTURE).is_file()
    assert "earlier demo" not in shown

    start = next(n for n, line in enumerate(lines) if line.startswith("What to type next"))
    predict, evaluate, train, _ = (line.strip() for line in lines[start + 1 :][:4])
    text, predict = predict.split(" | ")
    done = invoke(*shlex.split(predict)[1:], "--use_cpu", text=shlex.split(text)[1] + "\n")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[1].split("\t")[1] in (CORRECT, MISSPELT)
    done = invoke(*shlex.split(evaluate)[1:], "--use_cpu")
    assert done.exit_code == 0, done.output
    # The training that it proposes finds the rows of this one.
    rows = results["activation_cache"]["rows"]
    assert rows > 800 and results["activation_cache"]["path"] == str(out / "cache")
    more = ("--output_dir", tmp_path / "next", "--max_steps", 1, "--save_strategy", "no")
    done = invoke(*shlex.split(train)[1:], *more, "--use_cpu")
    assert done.exit_code == 0, done.output
    again = json.loads((tmp_path / "next" / "results.json").read_text())
    new = again["activation_cache"]["rows"] - rows
    assert 0 < new <= again["validation"]["examples"]
