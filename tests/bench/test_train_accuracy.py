"""python -m bench train-accuracy, train-plot, step-plot: time to accuracy, and pictures."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.paths import RESULTS
from bench.train import accuracy as train_accuracy
from bench.train import plot_steps
from bench.train.accuracy import Limits, seconds_to, target_accuracy, train_curve
from bench.train.plot import draw
from tests.bench.source import call, lines_of, small_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small_source(tmp_path_factory.mktemp("bench"), ("subj",), ("train", "dev"))


def test_target_and_when_it_is_reached():
    assert target_accuracy(0.7, 0.9) == pytest.approx(0.89)
    assert target_accuracy(0.9, 0.9) is None
    curve = [(1.0, 0.5), (2.0, 0.9), (3.0, 0.8), (4.0, 0.95)]
    assert seconds_to(curve, 0.9) == 2.0 and seconds_to(curve, 0.91) == 4.0
    assert seconds_to(curve, 0.96) is None and seconds_to(curve, None) is None


def test_the_clock_stands_still_while_it_evaluates(monkeypatch):
    """(That of the wall: a process that sleeps takes no seconds of the processor.)"""
    monkeypatch.setattr("bench.train.accuracy.seconds_of", lambda: time.perf_counter)
    seen = []

    def evaluate():
        time.sleep(0.05)
        return len(seen) / 10

    limits = Limits(epochs=2, seconds=60.0, eval_steps=2, batch_size=4)
    found = train_curve(seen.append, evaluate, 10, limits, seed=0, before=3.0)
    assert found["stopped"] == "epochs" and found["steps"] == 6 == len(seen)
    assert [accuracy for _, accuracy in found["curve"]] == [0.2, 0.4, 0.6]
    assert 3.0 <= found["curve"][0][0] <= found["curve"][-1][0] < 3.04
    assert sorted(np.concatenate(seen[:3]).tolist()) == list(range(10))
    seen.clear()
    found = train_curve(seen.append, evaluate, 10, replace(limits, epochs=9), seed=0, target=0.4)
    assert found["stopped"] == "target" and found["steps"] == 8  # 0.4, 0.6 and 0.8 are at it
    found = train_curve(
        lambda rows: time.sleep(0.03), lambda: 1.0, 99, replace(limits, seconds=0.05), seed=0
    )
    assert found["stopped"] == "seconds" and found["steps"] == 2


@pytest.mark.slow
def test_train_accuracy_and_plot(source, tmp_path):
    out, picture = tmp_path / "out.jsonl", tmp_path / "out.png"
    options = ("--tasks", "subj", "--k", 2, "--eval_rows", 20, "--eval_steps", 2)
    done = call(source, "train-accuracy", *options, "--max_epochs", 2, "--out", out)
    assert done.exit_code == 0, done.output
    lines = lines_of(out)
    assert [line["method"] for line in lines] == list(train_accuracy.METHODS)
    best = {line["method"]: max(a for _, a in line["curve"]) for line in lines}
    target = target_accuracy(best["head"], best["full"])
    for line in lines:
        assert line["target"] == (None if target is None else pytest.approx(target, abs=1e-4))
        reached = seconds_to(line["curve"], line["target"])
        assert line["reached_s"] == reached and line["best"] == best[line["method"]]
        assert line["curve"][0][0] >= line["once_s"] - 1e-3 and line["machine"]
        once = ("head", "cached_packed", "lpt_lora", "late_lora")
        assert (line["once_s"] > 0) == (line["method"] in once)
    assert lines[0]["steps"] == 5 * lines[1]["steps"] == 5 * 2 * 2  # 40 texts by 32
    pytest.importorskip("matplotlib")
    done = CliRunner().invoke(app, ["train-plot", "--file", str(out), "--out", str(picture)])
    assert done.exit_code == 0 and picture.read_bytes()[:4] == b"\x89PNG"


def test_plot_refuses_what_is_no_result(tmp_path):
    with pytest.raises(ValueError, match="There is no"):
        draw(str(tmp_path / "none.jsonl"), str(tmp_path / "a.png"))
    (tmp_path / "a.jsonl").write_text('{"task": "subj", "method": "lora", "seed": 0}\n')
    with pytest.raises(ValueError, match="Line 1 of .* is no result"):
        draw(str(tmp_path / "a.jsonl"), str(tmp_path / "a.png"))
    (tmp_path / "a.jsonl").write_text("")
    done = CliRunner().invoke(app, ["train-plot", "--file", str(tmp_path / "a.jsonl")])
    assert done.exit_code == 1 and "is empty" in done.output


def test_step_plot(tmp_path):
    """The newest figure of each, ours in bf16, whole batches of 32; another model's, other batches'
    and older ones do not count. And a picture of the committed figures."""
    step = {"part": "step", "encoder": "minilm", "batch_tokens": None}
    lines = [
        {**step, "name": "lora", "value": 9.0},
        {**step, "name": "lora", "value": 500.0},
        {**step, "name": "recipe, k = 4", "value": 300.0},
        {**step, "name": "recipe, k = 3", "value": 350.0},
        {**step, "name": "ours_bf16, k = 4", "value": 25.0},
        {**step, "name": "cached_held, k = 4", "value": 50.0},
        {**step, "name": "ours_bf16, k = 4", "value": 70.0, "batch_tokens": 4096},
        {**step, "name": "ours_bf16, k = 4", "value": 90.0, "encoder": "roberta-base"},
        {**step, "name": "lora", "value": 7.0, "part": "ratio"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    times = plot_steps.milliseconds(tmp_path, "minilm", 4, None)
    assert times == {"lora": 500.0, "recipe": 300.0, "ours": 25.0}
    times = plot_steps.milliseconds(RESULTS, "roberta-large", 18, "b32")
    assert {n: round(t, 1) for n, t in times.items()} == {"lora": 87.5, "recipe": 49.7, "ours": 7.0}
    done = CliRunner().invoke(app, ["step-plot", "--out", str(tmp_path / "steps.png")])
    assert done.exit_code == 0 and (tmp_path / "steps.png").stat().st_size > 10_000
