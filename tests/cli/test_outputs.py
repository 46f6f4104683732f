"""What a command will write is looked at before it works, and paths may begin with ~."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lpt_fast.cli.arguments import (
    EvalArguments,
    PredictArguments,
    TrainArguments,
)
from lpt_fast.cli.outputs import check_file, check_folder, whole_file
from lpt_fast.cli.precompute_arguments import PrecomputeArguments
from lpt_fast.cli.settings import merge
from tests.cli.cases import ROWS, invoke, refused, write_tsv


@pytest.fixture
def taken(tmp_path):
    """Things that are no folder to write to: a file, below a file, a link to nowhere, a place
    where nobody makes files.
    """
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    places = ("file", "file/below", "file/far/below", "link", "link/below")
    return [*(tmp_path / name for name in places), Path("/proc/lpt-fast")]


def commands(place):
    """A call of every command that writes, with its output at a place, and the flag's name."""
    train = ("train", "--model", "m", "--train_file", "t")
    fill = ("precompute", "--model", "m", "--train_file", "t")
    yield "--output_dir", (*train, "--output_dir", place)
    yield "--activation_cache", (*train, "--output_dir", "o", "--activation_cache", place)
    yield "--out", (*fill, "--out", place)
    yield "--out", (*fill, "--out", place, "--dry_run")
    yield "--output_dir", ("demo", "--model", "m", "--output_dir", place)
    yield "OUT", ("cache", "export", "c", place)


def test_folders_of_every_command(tmp_path, taken, monkeypatch):
    """Said before anything is read or loaded: neither the model nor the data is touched."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def never(*args, **kwargs):
        raise AssertionError("work had begun")

    for name in ("train.read_data", "precompute.load_model", "demo.write_files"):
        monkeypatch.setattr(f"lpt_fast.cli.{name}", never)
    for place in taken:
        for flag, call in commands(place):
            said = refused(*call)
            assert f"`{flag}` is {place}" in said and "name another" in said, said
            assert "[Errno" not in said and len(said) <= 300 + 3 * len(str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_what_lies_in_the_folder(tmp_path):
    """Files that a folder has in the place of folders, and the other way round."""
    (tmp_path / "results.json").mkdir()
    (tmp_path / "head_only").touch()
    said = refused("train", "--model", "m", "--train_file", "t", "--output_dir", tmp_path)
    assert "in which results.json is a folder, expected a file or nothing of that name" in said
    said = refused("demo", "--model", "m", "--output_dir", tmp_path)
    assert f"`--output_dir` is {tmp_path / 'head_only'}, which is a file" in said


def test_the_file_of_predict(tmp_path, taken):
    """The adapter is not there either, which would be said later."""
    call = ("predict", "--adapter", tmp_path / "none", "--input_file", "x", "--output_file")
    said = refused(*call, tmp_path)
    assert f"`--output_file` is {tmp_path}, which is a folder, expected a file" in said
    for place in (tmp_path / "none" / "x.tsv", taken[1], taken[4]):
        assert "There is no folder" in refused(*call, place)
    assert "cannot be written to" in refused(*call, "/proc/lpt-fast.tsv")
    assert "holds no lpt_run.json" in refused(*call, tmp_path / "fine.tsv")
    assert not (tmp_path / "fine.tsv").exists()


def test_good_places(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for place in (tmp_path, tmp_path / "new" / "deep", tmp_path / "link", tmp_path / "link/new"):
        check_folder(place, "--out")
    for place in (tmp_path / "new.tsv", tmp_path / "file", tmp_path / "link" / "x", "/dev/null"):
        check_file(place, "--out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "link", "there"]


def test_a_file_is_whole_or_not_there(tmp_path):
    target = tmp_path / "a.tsv"
    target.write_text("old")
    (tmp_path / "link.tsv").symlink_to(target)
    for kind in (ValueError, KeyboardInterrupt):
        with pytest.raises(kind), whole_file(target) as out:
            out.write("half")
            raise kind
        assert target.read_text() == "old"
    with whole_file(tmp_path / "link.tsv") as out:
        out.write("ö")
    assert target.read_text(encoding="utf-8") == "ö" and (tmp_path / "link.tsv").is_symlink()
    with whole_file("/dev/null") as out:
        out.write("gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    umask = os.umask(0)
    os.umask(umask)
    with whole_file(tmp_path / "new.tsv") as out:
        out.write("x")
    assert stat.S_IMODE((tmp_path / "new.tsv").stat().st_mode) == 0o666 & ~umask
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tsv", "link.tsv", "new.tsv"]


# -- paths that begin with ~ -----------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (
            TrainArguments,
            "model task dataset train_file validation_file test_file activation_cache output_dir "
            "resume_from_checkpoint",
        ),
        (EvalArguments, "adapter model test_file dataset"),
        (PredictArguments, "adapter model input_file output_file activation_cache"),
        (PrecomputeArguments, "model task dataset train_file validation_file test_file out"),
    ],
)
def test_every_path_of_every_command(home, cls, names):
    """From a YAML file in the home folder and from flags; what is no path stays."""
    names = names.split()
    lines = [f"{name}: ~/of {name}" for name in names]
    needed = {PredictArguments: [], EvalArguments: []}.get(cls, ["text_column: ~/text"])
    (home / "c.yaml").write_text("\n".join([*lines, *needed]))
    for args in (
        merge(cls, "~/c.yaml", {}),
        merge(cls, None, {name: f"~/of {name}" for name in names}),
    ):
        for name in names:
            value = f"{home}/of {name}"
            several = (cls, name) == (PredictArguments, "adapter")
            assert getattr(args, name) == ([value] if several else value)
    if needed:
        assert merge(cls, "~/c.yaml", {}).text_column == "~/text"
    for name in names:
        if name not in ("model", "adapter"):
            other = merge(cls, "~/c.yaml", {name: "data/~x"})
            assert getattr(other, name) == "data/~x"


@pytest.mark.slow
def test_home_in_a_yaml_file(models_dir, home):
    """Checkpoints, adapter and cache in one place, and no folder named `~`."""
    write_tsv(home / "train.tsv")
    settings = {
        "model": models_dir / "bert",
        "train_file": "~/train.tsv",
        "output_dir": "~/runs/one",
        "activation_cache": "~/cache",
        "max_steps": 2,
        "use_cpu": "true",
        "bottleneck_size": 8,
    }
    (home / "c.yaml").write_text("\n".join(f"{k}: {v}" for k, v in settings.items()))
    done = invoke("train", "--config", "~/c.yaml")
    assert done.exit_code == 0, done.output
    out = home / "runs" / "one"
    assert (out / "checkpoint-2").is_dir() and (out / "adapter_model.safetensors").is_file()
    assert not Path("~").exists() and len(list((home / "cache").iterdir())) == 1
    for call in (
        ("cache", "info", "~/cache"),
        ("cache", "verify", "~/cache"),
        ("cache", "gc", "~/cache"),
        ("cache", "export", "~/cache", "~/copy"),
        ("eval", "--adapter", "~/runs/one", "--test_file", "~/train.tsv", "--use_cpu"),
    ):
        done = invoke(*call)
        assert done.exit_code == 0, done.output
    assert len(list((home / "copy").iterdir())) == 1
    predict = ("predict", "--adapter", "~/runs/one", "--input_file", "~/train.tsv", "--use_cpu")
    done = invoke(*predict, "--output_file", "~/labels.tsv")
    assert done.exit_code == 0, done.output
    assert len((home / "labels.tsv").read_text().splitlines()) == 1 + len(ROWS)
    assert not Path("~").exists()


def test_home_in_python(home):
    from lpt_fast import ActivationCache, LPTTrainer, last_checkpoint
    from tests.train.cases import Stop, arguments, collate, model_of, rows, trained

    steps = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = LPTTrainer(
        model_of(),
        arguments("~/out", **steps),
        collate,
        rows(),
        activation_cache="~/cache",
        callbacks=[Stop(2)],
    )
    trainer.train()
    assert last_checkpoint("~/out") == home / "out" / "checkpoint-2"
    assert ActivationCache.open("~/cache").root == home / "cache"
    again = LPTTrainer(model_of(seed=8), arguments("~/out", **steps), collate, rows())
    again.train(resume_from_checkpoint="~/out/checkpoint-2")
    assert again.state.global_step == 4 and trained(again.model)
    assert not Path("~").exists()
