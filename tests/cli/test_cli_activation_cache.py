"""`lpt-fast train --activation_cache`: the same results, rows that `precompute` made or that it
makes itself, and what does not go together.
"""

from __future__ import annotations

import json

import pytest

from tests.cli.cases import ROWS, invoke, refused
from tests.cli.test_cli import run_train

TASK = (
    "name: films\ntext_columns: [text]\ntemplate: '{text} . It was {mask} .'\n"
    "decoder_template: '{text} . It was'\nlabel_words: {positive: great, negative: terrible}\n"
)


def results_of(out) -> dict:
    return json.loads((out / "results.json").read_text())


def same_numbers(a: dict, b: dict, **tolerance) -> None:
    for split in ("validation", "test"):
        for name, value in a[split].items():
            assert b[split][name] == pytest.approx(value, **tolerance), (split, name)
    assert b["train_loss"] == pytest.approx(a["train_loss"], **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "formulation", "smoothing"),
    [
        ("gpt2", "classification", 0),
        ("bert-mlm", "cloze", 0),
        ("gpt2", "cloze", 0),
        ("bert-mlm", "cloze", 0.1),
    ],
)
def test_train(models_dir, data, tmp_path, model, formulation, smoothing):
    """From the text, from rows that precompute made, and from no rows: one result."""
    (tmp_path / "task.yaml").write_text(TASK)
    more = ["--formulation", formulation, "--task", tmp_path / "task.yaml"]
    if formulation == "classification":
        more = []
    train = [*more, "--validation_file", data["test"], "--prompt_dropout", 0.1]
    train += ["--label_smoothing_factor", smoothing, "--max_length", 32, "--num_train_epochs", 2]
    run_train(models_dir, data, tmp_path / "text", *train, model=model)
    done = invoke(
        *("precompute", "--model", models_dir / model, "--train_file", data["train"], *more),
        *("--test_file", data["test"], "--out", tmp_path / "made", "--store", "fp32"),
        *("--use_cpu", "--max_length", 32),
    )
    assert done.exit_code == 0, done.output
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "made").rglob("*.safetensors")}
    assert made
    expected = results_of(tmp_path / "text")
    assert "activation_cache" not in expected
    for name, upper in (("made", "packed"), ("new", "padded")):
        cache = tmp_path / name
        run_train(
            *(models_dir, data, tmp_path / f"out-{name}", *train),
            *("--activation_cache", cache, "--upper", upper),
            model=model,
        )
        got = results_of(tmp_path / f"out-{name}")
        same_numbers(expected, got, **({"rel": 1e-4} if name == "made" else {"rel": 0.05}))
        found = got["activation_cache"]
        assert found["path"] == str(cache) and found["tier"] in ("page", "pinned", "disk")
        assert found["rows"] == len({text for text, _ in ROWS})
        assert found["store"] == ("fp32" if name == "made" else "bf16")
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "made").rglob("*.safetensors")}
    adapter = tmp_path / "out-made"
    shown = invoke("eval", "--adapter", adapter, "--test_file", data["test"], "--use_cpu").output
    assert f"{100 * results_of(adapter)['test']['accuracy']:.1f} %" in shown


@pytest.mark.slow
def test_resume(models_dir, data, tmp_path):
    call = (models_dir, data, tmp_path / "out", "--activation_cache", tmp_path / "cache")
    call = (*call, "--num_train_epochs", "2", "--save_strategy", "epoch")
    run_train(*call)
    first = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    run_train(*call, "--resume_from_checkpoint", "last")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == first


@pytest.mark.slow
def test_what_does_not_go_together(models_dir, data, tmp_path):
    base = ["train", "--model", models_dir / "bert", "--train_file", data["train"]]
    base += ["--output_dir", tmp_path / "out", "--use_cpu", "--max_length", 32]
    for flags, message in (
        (["--activation_cache", "c", "--method", "lora"], "`--activation_cache` goes with --meth"),
        (["--upper", "packed", "--method", "head"], "`--upper` goes with --method lpt, got 'packe"),
        (["--upper", "quick"], "`--upper` must be one of auto, packed, padded, got 'quick'"),
        (["--activation_cache", data["train"]], "which is a file, expected a folder"),
    ):
        assert message in refused(*base, *flags)
    assert not list((tmp_path / "out").glob("adapter*"))
