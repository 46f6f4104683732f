"""`lpt-fast sweep` and `lpt_fast.Sweep` end to end on tiny models, and what they refuse."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from lpt_fast import Sweep
from lpt_fast.cli.settings import merge
from lpt_fast.cli.sweep_arguments import SweepArguments
from tests.cli.cases import ROWS, invoke, refused, write_tsv
from tests.cli.test_cli_activation_cache import TASK, results_of

pytest.importorskip("optuna")
ROOT = Path(__file__).parents[2]
SPEED = ("--use_cpu", "--max_length", 32, "--bottleneck_size", 8, "--compute_dtype", "float32")


@pytest.fixture
def files(tmp_path):
    """Training and validation data; some labels are wrong, so that accuracies differ."""
    other = {"positive": "negative", "negative": "positive"}
    noisy = [(f"{t} or so", other[y] if i % 5 == 0 else y) for i, (t, y) in enumerate(ROWS)]
    return {
        "--train_file": write_tsv(tmp_path / "train.tsv"),
        "--validation_file": write_tsv(tmp_path / "dev.tsv", noisy),
    }


@pytest.fixture(scope="session")
def calm(models_dir, tmp_path_factory):
    """Models without dropout, which draws other numbers where trials train together."""
    root = tmp_path_factory.mktemp("calm")
    shutil.copytree(models_dir / "bert", root / "bert")
    config = json.loads((root / "bert" / "config.json").read_text())
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        config[name] = 0.0
    (root / "bert" / "config.json").write_text(json.dumps(config))
    return root


def flags(models_dir, files, out, *more, model="bert"):
    given = [word for pair in files.items() for word in pair]
    return ("--model", models_dir / model, *given, *SPEED, "--output_dir", out, *more)


def run(models_dir, files, out, *more, **how):
    done = invoke("sweep", *flags(models_dir, files, out, *more, **how))
    assert done.exit_code == 0, done.output
    return done


def lines_of(out) -> list[dict]:
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_grid(calm, files, tmp_path):
    """Each point once; the accuracies are those of single trainings, though those of a layer and
    seed train in the same steps; the best one predicts; a second call has nothing to do.
    """
    out = tmp_path / "out"
    space = ("--insertion_layer", "1,2", "--generator", "npg,static", "--seed", "1,2")
    space += ("--learning_rate", "1e-3,1e-2", "--num_train_epochs", 3)
    shown = run(calm, files, out, *space).stdout
    lines = lines_of(out)
    names = ("insertion_layer", "generator", "learning_rate", "seed")
    points = Counter(tuple(line[name] for name in names) for line in lines)
    assert len(lines) == len(points) == 16
    assert len({line["accuracy"] for line in lines}) > 3
    for line in (lines[1], lines[6], lines[11], lines[15]):
        single = tmp_path / f"single-{line['trial']}"
        given = [word for name in names for word in (f"--{name}", line[name])]
        how = ("--activation_cache", out / "cache", "--num_train_epochs", 3)
        done = invoke("train", *flags(calm, files, single, *given, *how))
        assert done.exit_code == 0, done.output
        found = results_of(single)
        assert float(line["accuracy"]) == found["validation"]["accuracy"]
        assert int(line["parameters"]) == found["trainable_parameters"]
    assert "± spread" in shown and f"--adapter {out / 'best'}" in shown
    table = [row for row in shown.splitlines() if " % " in row]
    assert len(table) == 8
    for name in ("accuracy_by_layer.png", "accuracy_by_seconds.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    chosen = json.loads((out / "best" / "sweep.json").read_text())
    (winner,) = [line for line in lines if int(line["trial"]) == chosen["trial"]]
    assert results_of(out / "best")["validation"]["accuracy"] == float(winner["accuracy"])
    done = invoke("predict", "--adapter", out / "best", "--use_cpu", text="a lovely film\n")
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 2
    before = {p: p.stat().st_mtime_ns for p in (out / "best").iterdir()}
    run(calm, files, out, *space)
    assert lines_of(out) == lines
    assert before == {p: p.stat().st_mtime_ns for p in (out / "best").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("bert", ("--generator", "none", "--lora_r", 2, "--lora_learning_rate", 5e-3)),
        ("bert", ("--few_shot", 16)),
        ("bert-mlm", ("--formulation", "cloze")),
        ("gpt2", ("--generator", "appg", "--group_by_length")),
    ],
    ids=["lora", "few-shot", "cloze", "gpt2"],
)
def test_a_trial_is_a_training(models_dir, files, tmp_path, monkeypatch, model, more):
    """To the bit: every weight that was trained, also of the second training of a process."""
    from lpt_fast.cli import sweep_trials

    if "--few_shot" in more:
        files.pop("--validation_file")
    if "cloze" in more:
        (tmp_path / "task.yaml").write_text(TASK)
        more += ("--task", tmp_path / "task.yaml")
    trained = {}
    build = sweep_trials.build_trainer

    def noting(args, *rest, **more):
        trainer = build(args, *rest, **more)
        trained[args.seed] = trainer.model
        return trainer

    monkeypatch.setattr(sweep_trials, "build_trainer", noting)
    more += ("--num_train_epochs", 2, "--learning_rate", 5e-3)
    out, single = tmp_path / "out", tmp_path / "single"
    run(models_dir, files, out, *more, "--seed", "3,4", model=model)
    more += ("--activation_cache", out / "cache", "--seed", 4)
    done = invoke("train", *flags(models_dir, files, single, *more, model=model))
    assert done.exit_code == 0, done.output
    mine = get_peft_model_state_dict(trained[4])
    theirs = load_file(single / "adapter_model.safetensors")
    assert set(mine) == set(theirs) and mine
    for name, tensor in theirs.items():
        assert mine[name].equal(tensor), name


def start(what, settings, *more):
    call = [sys.executable, "-W", "ignore", "-m", "tests.cli.sweep_killed", what]
    call += [json.dumps(settings), *more]
    here = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        call, cwd=ROOT, env=here, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]


def settings_of(models_dir, files, out) -> dict:
    given = {name.removeprefix("--"): value for name, value in files.items()}
    given |= {"model": str(models_dir / "bert"), "output_dir": str(out), "use_cpu": True}
    given |= {"max_length": 32, "compute_dtype": "float32", "num_train_epochs": 2, "group": 2}
    space = {"insertion_layer": [1, 2], "generator": ["npg", "mppg"], "seed": [1, 2, 3]}
    return {**given, "space": {**space, "bottleneck_size": 8}}


@pytest.mark.slow
def test_killed_five_times(calm, files, tmp_path):
    """At random moments, while it fills the cache too: nothing is lost, nothing is doubled, and
    the figures are those of a sweep that was not killed.
    """
    start("sweep", settings_of(calm, files, tmp_path / "killed"), "5")
    start("sweep", settings_of(calm, files, tmp_path / "whole"))
    names = ("insertion_layer", "generator", "seed")
    found = [
        sorted((*(line[n] for n in names), line["accuracy"]) for line in lines_of(tmp_path / out))
        for out in ("killed", "whole")
    ]
    assert found[0] == found[1] and len(found[0]) == 12
    assert len({line[:3] for line in found[0]}) == 12
    from optuna.storages import RDBStorage

    trials = RDBStorage(f"sqlite:///{tmp_path / 'killed' / 'study.db'}").get_all_trials(1)
    states = Counter(trial.state.name for trial in trials)
    assert states["COMPLETE"] == 12 and states["RUNNING"] == 0


@pytest.mark.slow
def test_two_processes_share_a_study(models_dir, files, tmp_path):
    out = tmp_path / "out"
    start("both", settings_of(models_dir, files, out))
    assert len((out / "ended.txt").read_text().splitlines()) == 2
    lines = lines_of(out)
    names = ("insertion_layer", "generator", "seed")
    assert len({tuple(line[n] for n in names) for line in lines}) == len(lines) == 12
    assert (out / "best" / "adapter_model.safetensors").is_file()
    from optuna.storages import RDBStorage

    trials = RDBStorage(f"sqlite:///{out / 'study.db'}").get_all_trials(1)
    owners = Counter(trial.user_attrs["claim"]["owner"] for trial in trials)
    assert len(owners) == 2 and sum(owners.values()) == 12


@pytest.mark.slow
def test_in_python(models_dir, files, tmp_path):
    """Ranges go to Optuna's sampler; what is returned is what the files have."""
    given = settings_of(models_dir, files, tmp_path / "out")
    given["space"] = {
        "insertion_layer": [1, 2],
        "learning_rate": (5e-4, 5e-2),
        "bottleneck_size": (4, 8),
        "seed": [1, 2],
    }
    found = Sweep(**given | {"num_train_epochs": 4}, trials=16).run()
    assert found.folder == tmp_path / "out"
    assert len(found.table) == 8
    for row in found.table:
        assert 5e-4 <= row["learning_rate"] <= 5e-2 and row["bottleneck_size"] in range(4, 9)
        assert row["seeds"] + row["pruned"] == 2
    whole = [row["accuracy"] for row in found.table if row["seeds"] == 2]
    assert whole == sorted(whole, reverse=True) and found.best["mean"] == whole[0]
    assert found.best["seed"] in (1, 2)
    lines = lines_of(found.folder)
    assert len(lines) == 16
    with pytest.raises(ValueError, match="`space` got 'layer', expected of bottleneck_size"):
        Sweep(**given | {"space": {"layer": [1]}})
    with pytest.raises(ValueError, match="Sweep got the setting 'trails', expected one of"):
        Sweep(**given, trails=3)
    with pytest.raises(ValueError, match=r"A range got 3 values, expected \(low, high\)"):
        Sweep(**given | {"space": {"learning_rate": (1, 2, 3)}})


@pytest.mark.slow
def test_pruning(models_dir, files, tmp_path):
    """Trainings that learn nothing are stopped, both of a group; the others run to their end."""
    files["--validation_file"] = files["--train_file"]
    good, bad = ["5e-3", "6e-3", "7e-3", "8e-3", "1e-2"], ["1e-9", "2e-9"]
    space = ("--learning_rate", ",".join(good + bad), "--insertion_layer", 3, "--generator", "npg")
    run(
        models_dir,
        files,
        tmp_path / "out",
        *space,
        "--prune",
        "--num_train_epochs",
        8,
        "--group",
        5,
    )
    lines = lines_of(tmp_path / "out")
    assert [line["pruned"] for line in lines] == ["0"] * 5 + ["1"] * 2
    assert [int(line["epochs"]) for line in lines[:5]] == [8] * 5
    assert all(2 < int(line["epochs"]) < 8 for line in lines[5:])
    done = run(models_dir, files, tmp_path / "all", *space, "--num_train_epochs", 8)
    assert "pruned" in done.stdout  # a grid prunes nothing by itself
    assert {line["pruned"] for line in lines_of(tmp_path / "all")} == {"0"}


@pytest.mark.slow
def test_another_study_is_refused(models_dir, files, tmp_path):
    out = tmp_path / "out"
    space = ("--insertion_layer", "1,2", "--num_train_epochs", 1)
    run(models_dir, files, out, *space)
    lines = lines_of(out)
    where = len(str(out))
    call = flags(models_dir, files, out, *space)
    rows = write_tsv(tmp_path / "other.tsv", ROWS[:20])
    for more, message in (
        (("--train_file", rows), "is of other data, got"),
        (("--model", models_dir / "bert-small"), "is of other model, got bert "),
        (("--weight_decay", 0.5), "is of other weight_decay, got 0.5, expected 0.01 as there"),
        (("--insertion_layer", "1..2"), "is of other insertion_layer, got 1..2, expected 1,2"),
    ):
        said = refused("sweep", *call, *more)
        assert message in said and "name another --output_dir" in said
        assert len(said) <= 300 + where
    assert lines_of(out) == lines


BASE = {"model": "-", "train_file": "train.tsv", "validation_file": "dev.tsv"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trials": 0}, "`--trials` must be at least 1, got 0."),
        ({"trials": 2, "seed": "1,2,3"}, "`--trials` is 2 with 3 seeds, expected at least one"),
        ({"generator": "npg,nix"}, "`--generator` got 'nix', expected one of static, npg,"),
        ({"insertion_layer": "0,2"}, "`--insertion_layer` got '0' in '0,2', expected whole num"),
        ({"insertion_layer": "2,2"}, "`--insertion_layer` got 2,2, expected different values"),
        ({"learning_rate": "5e-3..5e-4"}, "got the empty range 5e-3..5e-4, expected its smaller"),
        ({"learning_rate": "0..1"}, "`--learning_rate` got '0' in '0..1', expected numbers above"),
        ({"prompt_dropout": "0,1"}, "got '1' in '0,1', expected numbers from 0 and below 1;"),
        ({"sampler": "nix"}, "`--sampler` must be one of grid, tpe, got 'nix'."),
        ({"generator": "none"}, "got 'none' without late LoRA, expected something to train;"),
        ({"lora_alpha": "4"}, "`--lora_alpha` got 4 without late LoRA, expected --lora_r beside"),
        ({"validation_file": None}, "A sweep chooses by validation data and got none, expected"),
        ({"few_shot": 8}, "`--few_shot` draws its own training and validation rows"),
        ({"train_file": None}, "There is nothing to train on: give --train_file or --dataset."),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError) as error:
        SweepArguments(**BASE | settings)
    assert message in str(error.value) and len(str(error.value)) <= 300


@pytest.mark.slow
def test_refused_when_more_is_known(models_dir, files, tmp_path):
    call = ("sweep", *flags(models_dir, files, tmp_path / "out"))
    for more, message in (
        (("--insertion_layer", "2,4"), "`--insertion_layer` got 4, expected layers from 1 to 3 of"),
        (("--sampler", "grid", "--learning_rate", "1e-3..1e-2"), "`--sampler grid` got the range"),
        (("--sampler", "grid", "--seed", "1..9", "--trials", 9, "--insertion_layer", "1,2"),
         "`--sampler grid` got 18 trainings, expected at most the 9 of --trials; raise it"),
    ):  # fmt: skip
        assert message in refused(*call, *more)
    assert not (tmp_path / "out").exists()
    data = tmp_path / "data"
    data.mkdir()
    write_tsv(data / "train.tsv")
    said = refused(
        *("sweep", "--model", models_dir / "bert", "--dataset", data, "--use_cpu"),
        *("--output_dir", tmp_path / "out"),
    )
    assert "has none, expected a validation split; give --validation_file or --few_shot." in said


def test_without_optuna(models_dir, files, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "optuna" else find(name, *a)
    )
    said = refused("sweep", *flags(models_dir, files, tmp_path / "out"))
    assert said.endswith("which is not installed; pip install lpt-fast[sweep].")


def test_one_process_each(models_dir, files, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused("sweep", *flags(models_dir, files, tmp_path / "out"))
    assert "got 2 processes from a launcher, expected one: they share a study" in said


@pytest.mark.slow
def test_others_do_without_optuna():
    code = (
        "import sys; sys.modules['optuna'] = None; import lpt_fast; from lpt_fast.cli.main import "
        "app; import lpt_fast.cli.train; lpt_fast.Sweep; print('fine')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_settings_from_yaml(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "model: m\ntrain_file: a.tsv\nvalidation_file: b.tsv\ninsertion_layer: 2,3\n"
        "learning_rate: 5e-4..5e-3\nlora_r: none,8\nseed: 7\n"
    )
    args = merge(SweepArguments, str(path), {"seed": "1..3", "trials": 12})
    space = args.space()
    assert space.seeds == [1, 2, 3] and args.trials == 12
    assert space.axes["lora_r"].values == (None, 8)
    assert [axis.name for axis in space.ranges] == ["learning_rate"]
    single = args.train_arguments({"insertion_layer": 3, "lora_r": None}, 2)
    assert (single.insertion_layer, single.seed, single.save_strategy) == (3, 2, "no")
