"""The soak and the scaling benchmarks on tiny sizes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from bench.cluster import scaling, soak
from bench.data import Source, WrongResult
from lpt_fast.cache import ActivationCache
from tests.cli.cases import ROWS, write_tsv


@pytest.mark.slow
def test_nothing_is_held_after_a_cycle(tmp_path):
    told = []
    torch.set_num_threads(1)
    samples, growth = soak.soak(0.0, 4, told.append)
    assert told == samples and len(samples) == 4
    first, last = samples[1], samples[-1]
    assert last["files"] == first["files"] and last["threads"] == first["threads"]
    assert last["python_threads"] == first["python_threads"]
    assert last["rss_mb"] - first["rss_mb"] < 32
    assert last["heap_mb"] - first["heap_mb"] < 8
    for name in ("files", "threads"):
        assert growth[name]["per_minute"] == pytest.approx(0, abs=1e-9)
    assert len({one["loss"] for one in samples}) == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_a_cycle_holds_on_to_is_seen(monkeypatch):
    """A file that stays open, and a loss that moves."""
    held = []
    monkeypatch.setattr(soak, "cycle", lambda root: held.append(open("/dev/null")) or 0.5)  # noqa: SIM115
    samples, growth = soak.soak(0.0, 5, lambda one: None)
    assert samples[-1]["files"] - samples[0]["files"] == 4
    assert growth["files"]["per_minute"] > 0
    for file in held:
        file.close()
    losses = iter((0.5, 0.25))
    monkeypatch.setattr(soak, "cycle", lambda root: next(losses))
    with pytest.raises(RuntimeError, match=r"ended with the loss 0.25, expected 0.5 as in the"):
        soak.soak(0.0, 2, lambda one: None)


def test_slope_and_its_error():
    x = np.arange(200.0)
    noise = np.random.default_rng(0).normal(0, 2.0, 200)
    rise, error = soak.slope(x, 0.3 * x + 5 + noise)
    assert abs(rise - 0.3) < 3 * error and error == pytest.approx(2 / np.sqrt(200**3 / 12), rel=0.2)
    assert soak.slope(x, 2 * x) == (pytest.approx(2), pytest.approx(0, abs=1e-9))
    assert all(np.isnan(soak.slope(x[:2], x[:2])))
    # A single step near the end is no slope, a leak is; single samples would say otherwise.
    step = np.where(x < 190, 0.0, 8.0)
    rise, error = soak.slope(soak.blocks(x), soak.blocks(step))
    assert abs(rise) < 2 * error and abs(soak.slope(x, step)[0]) > 5 * soak.slope(x, step)[1]
    rise, error = soak.slope(soak.blocks(x), soak.blocks(step + 0.3 * x))
    assert rise > 5 * error
    assert soak.blocks(x[:3]).tolist() == [0, 1, 2]


def test_the_heap_is_measured():
    before = soak.heap_bytes()
    held = [bytes(1000) for _ in range(20000)]  # above what Python's own allocator takes
    grown = soak.heap_bytes() - before
    assert np.isnan(grown) or 20e6 < grown < 23e6, len(held)


@pytest.fixture
def source(tmp_path, models_dir):
    """A small task and a tiny model."""
    folder = tmp_path / "data" / scaling.TASK
    folder.mkdir(parents=True)
    rows = [(f"{text} {i} " + "so " * (i % 9), label) for i in range(3) for text, label in ROWS]
    write_tsv(folder / "train.tsv", rows)
    return Source(tmp_path / "data", str(models_dir / "bert"))


@pytest.mark.slow
def test_one_and_two_processes(source):
    without, whole = scaling.scaling(source, 40, 1)
    assert without.target == 1.7 and without.value > 0 and whole.target is None
    assert 0 < without.details["seconds_1"] < whole.details["seconds_1"]
    shares = [int(share) for share in without.details["shares"].split("/")]
    assert len(shares) == 2 and min(shares) > 0 and sum(shares) == 40


def test_other_rows_give_no_figure(source, tmp_path, monkeypatch):
    model, examples = source.base(), source.examples(scaling.TASK)
    for name, rows in (("a", examples[:20]), ("b", examples[:24]), ("c", examples[1:21])):
        ActivationCache.open(tmp_path / name).build(model, rows, insertion_layer=2)
    a, b, c = (scaling._folder(tmp_path / name) for name in "abc")
    scaling._same(a, a)
    with pytest.raises(WrongResult, match="another number of rows"):
        scaling._same(a, b)
    with pytest.raises(WrongResult, match="made other rows than one"):
        scaling._same(a, c)
    twice = scaling.Run(2.0, 1.0, 1.0, {"rows": 20}, [11, 10])
    monkeypatch.setattr(scaling, "run", lambda *args: twice)
    with pytest.raises(WrongResult, match="21 texts were computed for 20 rows"):
        list(scaling.scaling(source, 20, 1))


def pretended(bend: float, source, rows: int, root: Path, world: int) -> scaling.Run:
    """A build that takes 1000 + 70 bytes a token, and seconds that are no straight line."""
    tokens = 10 * rows
    stats = {"tokens": tokens, "rows": rows, "bytes": 1000 + 70 * tokens}
    return scaling.Run(9.0, 1 + tokens / 100 + bend * tokens**2, 1.0, stats, [rows])


@pytest.mark.parametrize(("bend", "met"), [(0.0, True), (1e-4, False)])
def test_what_two_sizes_foretell(monkeypatch, bend, met, tmp_path):
    monkeypatch.setattr(scaling, "run", partial(pretended, bend))
    figures = {f.name: f for f in scaling.sizes(None, (100, 200, 400), 3)}
    assert figures["100 texts, bytes a token"].value == 71
    size = figures["bytes of 400 texts, foretold from 100 and 200: error"]
    assert size.met and size.value < 1e-12 and size.details["foretold"] == 281_000
    time = figures["seconds of 400 texts, foretold from 100 and 200: error"]
    assert time.met is met and time.details["measured"] == 41 + bend * 16e6
    large = figures["1,000,000 texts of 10.0 tokens, foretold size"]
    assert large.value == pytest.approx((1000 + 70 * 10**7) / 1e9)
    assert large.details["gb_of_memory_to_read"] == pytest.approx(0.06)
    monkeypatch.setattr(scaling, "scaling", lambda *args: iter(()))
    app = typer.Typer()
    app.command()(scaling.main)
    result = CliRunner().invoke(app, ["--data", "x", "--out", str(tmp_path / "out.jsonl")])
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 11
