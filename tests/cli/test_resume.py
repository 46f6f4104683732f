"""Resuming on the command line: what a checkpoint was trained with is compared with what it is
resumed with.
"""

from __future__ import annotations

import shutil

import pytest

from tests.cli.cases import BAD, GOOD, invoke, refused, write_tsv

GOOD_ROWS = [(f"{text} {i}", "good") for i in range(2) for text in GOOD]
BAD_ROWS = [(f"{text} {i}", "bad") for i in range(2) for text in BAD]
SPEED = ("--use_cpu", "--bottleneck_size", 8, "--insertion_layer", 2)


@pytest.fixture(scope="module")
def stopped(models_dir, tmp_path_factory):
    """A training of one epoch, with its checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    write_tsv(folder / "en.tsv", GOOD_ROWS + BAD_ROWS)
    other = {"good": "better", "bad": "worse"}
    write_tsv(folder / "renamed.tsv", [(t, other[label]) for t, label in GOOD_ROWS + BAD_ROWS])
    write_tsv(folder / "added.tsv", [*GOOD_ROWS, *BAD_ROWS, ("a book", "neutral")])
    write_tsv(folder / "columns.tsv", GOOD_ROWS + BAD_ROWS, header="review\tgold")
    done = train(models_dir, folder, "en.tsv", epochs=1)
    assert done.exit_code == 0, done.output
    return folder


def call(models_dir, folder, file, *more, epochs=2, model="bert"):
    return (
        *("train", "--model", models_dir / model, "--train_file", folder / file, *SPEED),
        *("--output_dir", folder / "out", "--num_train_epochs", epochs, *more),
    )


def train(models_dir, folder, file, *more, **settings):
    return invoke(*call(models_dir, folder, file, *more, **settings))


RESUME = ("--resume_from_checkpoint", "last")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "more", "message"),
    [
        ("renamed.tsv", (), "class names: class 0 is 'bad' there, 'better' here"),
        ("added.tsv", (), "class names: 2 classes there, 3 here ('neutral' is new)"),
        ("en.tsv", ("--max_length", 9), "max_length: 64 there, 9 here"),
        ("en.tsv", ("--insertion_layer", 1), "insertion_layer: 2 there, 1 here"),
        ("en.tsv", ("--generator", "npg"), "generator: 'mppg' there, 'npg' here"),
        ("en.tsv", ("--method", "lora"), "method: 'lpt' there, 'lora' here"),
        ("en.tsv", ("--torch_dtype", "bfloat16"), "dtype: 'float32' there, 'bfloat16' here"),
        (
            "columns.tsv",
            ("--text_column", "review", "--label_column", "gold"),
            "text_columns: ['text'] there, ['review'] here",
        ),
    ],
)
def test_others_are_refused_by_name(models_dir, stopped, file, more, message):
    kept = (stopped / "out" / "adapter_model.safetensors").read_bytes()
    said = refused(*call(models_dir, stopped, file, *RESUME, *more))
    assert f"was trained with other {message}; give" in said
    assert len(said) <= 300 + len(str(stopped))
    assert (stopped / "out" / "adapter_model.safetensors").read_bytes() == kept


@pytest.mark.slow
def test_the_formulation_and_the_task(models_dir, stopped, tmp_path):
    yaml = tmp_path / "films.yaml"
    content = (
        "name: films\ntext_columns: [text]\ntemplate: '{{text}} . It was {{mask}} .'\n"
        "label_words: {{good: {}, bad: terrible}}\n"
    )
    yaml.write_text(content.format("great"))
    how = {"model": "bert-mlm"}
    cloze = ("--formulation", "cloze", "--task", yaml)
    write_tsv(tmp_path / "en.tsv", GOOD_ROWS + BAD_ROWS)
    done = train(models_dir, tmp_path, "en.tsv", *cloze, epochs=1, **how)
    assert done.exit_code == 0, done.output
    said = refused(*call(models_dir, tmp_path, "en.tsv", *RESUME, "--task", yaml, **how))
    assert "was trained with other formulation: 'cloze' there, 'classification' here" in said
    yaml.write_text(content.format("good"))
    said = refused(*call(models_dir, tmp_path, "en.tsv", *RESUME, *cloze, **how))
    assert "was trained with other label_words: {" in said
    yaml.write_text(content.format("great").replace("films", "books"))
    said = refused(*call(models_dir, tmp_path, "en.tsv", *RESUME, *cloze, **how))
    assert "was trained with other task: 'films' there, 'books' here" in said


@pytest.mark.slow
@pytest.mark.parametrize(("method", "file"), [("lpt", "adapter_model"), ("full", "model")])
def test_the_same_goes_on(models_dir, tmp_path, method, file):
    """With groups of like length, for methods without a late prompt too: the end is that of a run
    that was not stopped.
    """
    write_tsv(tmp_path / "en.tsv", GOOD_ROWS + BAD_ROWS)
    more = ("--method", method, "--group_by_length", "--per_device_train_batch_size", 4)
    more += ("--save_total_limit", 9)
    done = train(models_dir, tmp_path, "en.tsv", *more, epochs=3)
    assert done.exit_code == 0, done.output
    (tmp_path / "parts").mkdir()
    shutil.copytree(tmp_path / "out" / "checkpoint-4", tmp_path / "parts" / "checkpoint-4")
    more += ("--output_dir", tmp_path / "parts")
    done = train(models_dir, tmp_path, "en.tsv", *more, *RESUME, epochs=3)
    assert done.exit_code == 0, done.output
    whole, parts = (tmp_path / name / f"{file}.safetensors" for name in ("out", "parts"))
    assert parts.read_bytes() == whole.read_bytes()
