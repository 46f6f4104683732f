"""The space of a sweep, and the study that processes share: who takes what, and what is left when
one is killed.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lpt_fast.cli.sweep_space import GENERATORS, Space, key_of, parse_axis, parse_seeds
from lpt_fast.method.config import GENERATORS as OF_CONFIG
from lpt_fast.method.config import NO_PROMPT
from tests.cli.sweep_killed import study_of

pytest.importorskip("optuna")
from lpt_fast.cli.sweep_study import Owner, SweepStudy

ROOT = Path(__file__).parents[2]


def space_of(seeds="1", **axes) -> Space:
    return Space({name: parse_axis(name, text) for name, text in axes.items()}, parse_seeds(seeds))


def make(folder, space, trials=40, grid=True, prune_after=None, epochs=4, facts=None):
    return SweepStudy(folder, space, trials, grid, prune_after, epochs, facts or {"data": "a"})


def run_all(study, accuracy=lambda trial, epoch: 0.5, most=8, epochs=1):
    """Every trial, in this process; their groups."""
    groups = []
    while claimed := study.claim(most):
        groups.append(claimed)
        for trial in claimed:
            for epoch in range(1, epochs + 1):
                got = accuracy(trial, epoch)
                pruned = study.report(trial, epoch, got)
                if pruned:
                    break
            study.finish(trial, got, pruned, 1.0, 7)
    return groups


def test_generators():
    assert (*OF_CONFIG, NO_PROMPT) == GENERATORS


def test_axes():
    assert parse_axis("insertion_layer", "2, 3,4").values == (2, 3, 4)
    rate = parse_axis("learning_rate", "5e-4..5e-3")
    assert (rate.values, rate.low, rate.high, str(rate)) == (None, 5e-4, 5e-3, "0.0005..0.005")
    assert parse_axis("bottleneck_size", "8..10").choices == [8, 9, 10]
    assert parse_axis("lora_r", "none,8").values == (None, 8)
    assert parse_seeds("1..3") == parse_seeds("1,2,3") == [1, 2, 3]


def test_what_does_nothing_is_no_setting_of_its_own():
    space = space_of(
        generator="none,static,npg", bottleneck_size="8,16", lora_r="none,4",
        lora_learning_rate="1e-3,2e-3",
    )  # fmt: skip
    settings = space.settings()
    # none: with LoRA alone, 2 rates; static: 2 rates and without; npg: the same, 2 sizes each.
    assert len(settings) == 2 + 3 + 2 * 3
    assert len({key_of(s) for s in settings}) == len(settings)
    for setting in settings:
        assert space.setting_of(space.params_of(setting)) == setting
        assert ("lora_learning_rate" in setting) == (setting["lora_r"] is not None)
        assert ("bottleneck_size" in setting) == (setting["generator"] == "npg")


@pytest.mark.slow
def test_grid(tmp_path):
    """3 layers x 2 generators x 2 rates x 2 seeds: 24 trials, in groups of a layer and a seed."""
    space = space_of(
        "1,2", insertion_layer="2,3,4", generator="npg,mppg", learning_rate="1e-3,2e-3"
    )
    study = make(tmp_path, space)
    assert study.total == 24
    groups = run_all(study)
    assert [len(group) for group in groups] == [4] * 6
    assert all(len({(t.layer, t.seed) for t in group}) == 1 for group in groups)
    done = study.finished()
    assert len(done) == len({(key_of(t.setting), t.seed) for t in done}) == 24
    study.close()
    again = make(tmp_path, space)
    assert again.claim(8) == [] and len(again.finished()) == 24
    again.close()
    assert not list((tmp_path / "running").iterdir())


@pytest.mark.slow
def test_tpe(tmp_path):
    """Ranges, all seeds of each setting, never one setting twice; more trials go on."""
    space = space_of(
        "1,2", insertion_layer="2..4", generator="npg,mppg", learning_rate="1e-4..1e-2"
    )
    study = make(tmp_path, space, trials=21, grid=False)
    assert study.total == 20
    run_all(study, lambda trial, epoch: 1 - trial.setting["learning_rate"], most=3)
    settings = Counter(key_of(t.setting) for t in study.finished())
    assert len(settings) == 10 and set(settings.values()) == {2}
    for trial in study.finished():
        assert trial.setting["insertion_layer"] in (2, 3, 4)
        assert 1e-4 <= trial.setting["learning_rate"] <= 1e-2
    study.close()
    more = make(tmp_path, space, trials=24, grid=False)
    run_all(more)
    assert len(more.finished()) == 24
    more.close()


@pytest.mark.slow
def test_tpe_of_a_small_space(tmp_path):
    """A sampler draws with repeats; each setting is run once, and there are no more than there
    are. Settings that train nothing are drawn again.
    """
    study = make(tmp_path, space_of(insertion_layer="1,2", generator="npg,mppg"), grid=False)
    assert study.total == 4
    run_all(study)
    assert len({key_of(t.setting) for t in study.finished()}) == 4
    study.close()
    (tmp_path / "b").mkdir()
    axes = {"generator": "none,npg", "lora_r": "none,2", "learning_rate": "1e-4..1e-2"}
    study = make(tmp_path / "b", space_of(insertion_layer="1", **axes), trials=12, grid=False)
    run_all(study)
    kinds = {(t.setting["generator"], t.setting["lora_r"]) for t in study.finished()}
    assert len(study.finished()) == 12 and ("none", None) not in kinds
    study.close()


@pytest.mark.slow
def test_pruning(tmp_path):
    """What is below the median after some epochs stops, but not among the first five, nor in the
    first epoch, nor in the last.
    """
    space = space_of(insertion_layer="1,2", num_virtual_tokens="1..10")
    study = make(tmp_path, space, prune_after=1)
    run_all(study, lambda trial, epoch: 1 - trial.number / 100, most=1, epochs=4)
    done = study.finished()
    assert len(done) == 20
    assert [t.pruned for t in done] == [False] * 5 + [True] * 15
    assert {len(t.curve) for t in done[5:]} == {2}
    assert done[5].accuracy == pytest.approx(0.95)
    study.close()


def test_others_are_refused(tmp_path):
    space = space_of(insertion_layer="1,2")
    make(tmp_path, space, facts={"data": "a", "bf16": "False"}).close()
    make(tmp_path, space, facts={"data": "a", "bf16": "False"}).close()
    with pytest.raises(ValueError, match=r"is of other data, got b, expected a .*; name another"):
        make(tmp_path, space, facts={"data": "b", "bf16": "False"})
    with pytest.raises(ValueError, match=r"is of other bf16, got nothing, expected False as there"):
        make(tmp_path, space, facts={"data": "a"})
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "study.db").write_text("no database, but some text in its place" * 9)
    with pytest.raises(
        ValueError, match=r"cannot be opened as a study \(.*; name another"
    ) as error:
        make(tmp_path / "x", space)
    assert len(str(error.value)) <= 300 + len(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_module_that_is_missing_is_not_the_study_s_fault(tmp_path, monkeypatch):
    """Nobody is told to take a sound file away."""
    make(tmp_path, space_of(insertion_layer="1,2")).close()

    def storage(*_, **__):
        raise ModuleNotFoundError("No module named 'mako'")

    monkeypatch.setattr("lpt_fast.cli.sweep_study.RDBStorage", storage)
    with pytest.raises(ModuleNotFoundError, match="^No module named 'mako'$"):
        make(tmp_path, space_of(insertion_layer="1,2"))


def test_what_a_dead_process_left_is_taken_up(tmp_path):
    space = space_of("1,2", insertion_layer="1,2")
    first, second = make(tmp_path, space), make(tmp_path, space)
    assert [t.layer for t in first.claim(8)] == [1]
    assert [t.layer for t in second.claim(8)] == [2]
    assert [t.seed for t in second.claim(8) + second.claim(8)] == [2, 2]
    assert second.claim(8) == []  # the first process lives
    os.close(first._owner._fd)  # as when it dies
    (left,) = second.claim(8)
    assert (left.layer, left.seed) == (1, 1) and second.claim(8) == []
    # One that was asked for and has no claim yet.
    second._study.ask(second._distributions)
    with sqlite3.connect(tmp_path / "study.db") as file:
        assert file.execute("select count(*) from trials where state='RUNNING'").fetchone() == (5,)
    assert second.claim(8) == []
    with sqlite3.connect(tmp_path / "study.db") as file:
        assert file.execute("select count(*) from trials where state='RUNNING'").fetchone() == (4,)
    second.give_back([left])
    assert [(t.layer, t.seed) for t in second.claim(8)] == [(1, 1)]
    second.close()


def test_owners(tmp_path):
    mine, other = Owner(tmp_path), Owner(tmp_path)
    assert mine.lives(mine.name) and mine.lives(other.name)
    assert not mine.lives("somebody") and not mine.lives(None)
    os.close(other._fd)
    assert not mine.lives(other.name)
    mine.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """Three processes at once, one of them killed 7 times, with a grid and with a sampler: each
    trial is finished once.
    """
    call = [sys.executable, "-m", "tests.cli.sweep_killed", "study", str(tmp_path), "7"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    failed = 0
    for name in ("grid", "tpe"):
        study = study_of(tmp_path / name, name == "grid")
        assert len((tmp_path / name / "ended.txt").read_text().splitlines()) >= 3
        found = Counter((key_of(t.setting), t.seed) for t in study.finished())
        assert len(found) == 60 and set(found.values()) == {1}
        assert {seed for _, seed in found} == set(range(1, 11))
        study.close()
        with sqlite3.connect(tmp_path / name / "study.db") as file:
            states = dict(file.execute("select state, count(*) from trials group by state"))
        assert states["COMPLETE"] == 60 and "RUNNING" not in states
        failed += states.get("FAIL", 0)
    assert failed > 0  # what was running when its process was killed
