"""A disk that fills up while a training saves: one sentence, and a way on that works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lpt_fast.train.disk_room import saving_to
from tests.cli.cases import invoke, refused
from tests.cli.test_cli import SPEED
from tests.small_disk import mounted, stuff


@pytest.mark.slow
@pytest.mark.parametrize("leave", [0, 60_000, 400_000, 760_000, 900_000, 1_300_000])
def test_training(models_dir, data, tmp_path, leave):
    with mounted(tmp_path / "disk", 8 << 20) as disk:
        ballast = stuff(disk, leave)
        out = disk / "out"
        call = ["train", "--model", models_dir / "bert", "--train_file", data["train"]]
        call += ["--test_file", data["test"], "--output_dir", out, *SPEED]
        call += ["--num_train_epochs", 3, "--save_strategy", "epoch"]
        said = refused(*call)
        assert f"There is no room left to save the training in {out} (" in said
        assert "), expected some for checkpoints and the adapter; make room" in said
        ballast.unlink()
        found = re.search(r"--resume_from_checkpoint (\S+)\.$", said)
        assert (found is None) == said.endswith("and start again.")
        assert (found is None) == (leave < 800_000)  # a checkpoint is 780 kB
        more = [] if found is None else ["--resume_from_checkpoint", found[1]]
        done = invoke(*call, *more)
        assert done.exit_code == 0, done.output
        assert (out / "results.json").is_file() and (out / "adapter_model.safetensors").is_file()


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (RuntimeError("another"), OSError(13, "Permission denied"), ValueError("no")):
        with pytest.raises(type(error)) as got, saving_to(tmp_path):
            raise error
        assert got.value is error


def test_only_checkpoints_of_this_training_are_named(tmp_path):
    """What lay there before may be another's, unless it is what this one goes on from."""

    def checkpoint(step):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir(exist_ok=True)
        (path / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
        return str(path)

    def said(resumed=None, new=None):
        with pytest.raises(OSError, match="no room left") as got, saving_to(tmp_path, resumed):
            if new is not None:
                checkpoint(new)
            raise OSError(28, "No space left on device", "/elsewhere/x")
        assert "(No space left on device: '/elsewhere/x')" in str(got.value).replace(
            "[Errno 28] ", ""
        )
        return str(got.value)

    assert said(new=5).endswith(f"go on with --resume_from_checkpoint {tmp_path}/checkpoint-5.")
    assert said().endswith("and start again.")
    old = checkpoint(70)
    assert said(new=7).endswith("and start again.")
    assert said(resumed=old).endswith(f"--resume_from_checkpoint {old}.")
    assert said(resumed=old, new=72).endswith("checkpoint-72.")


def test_what_libraries_say(tmp_path):
    """(torch.save's own words where it got no further after writing a part.)"""
    words = "[enforce fail at inline_container.cc:672] . unexpected pos 256 vs 128"
    with pytest.raises(OSError, match="There is no room left") as got, saving_to(Path(tmp_path)):
        raise RuntimeError(words)
    assert "start again" in str(got.value)
