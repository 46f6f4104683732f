"""`predict` gives back what went in, one line a row; what it reads is UTF-8 or refused."""

from __future__ import annotations

import io
import json

import pytest
from transformers import AutoTokenizer

from lpt_fast.cli.arguments import PredictArguments
from lpt_fast.cli.data import Formulation, read_rows
from lpt_fast.cli.predict import _write, predict
from lpt_fast.tasks import load_task
from tests.cli.cases import GOOD, invoke, refused

LABELS = ["a\tb", "c\nd", 'e"\\n', "f\u2028g\x85h\x1ci\rj"]
TEXTS = ["two  spaces ", "tab\tbreak\nend", 'a "quote" C:\\new', "line\u2028break\r\n", " café"]


def unescaped(line):
    return [json.loads('"' + cell.replace('"', '\\"') + '"') for cell in line.split("\t")]


def written(kind, texts=TEXTS, labels=LABELS):
    share = {name: 0.25 for name in labels}
    found = [
        {"label": labels[i % 4], "probability": 0.25, "probabilities": share}
        for i in range(len(texts))
    ]
    out = io.StringIO()
    _write(out, kind, {"te\txt": texts}, labels, found)
    return out.getvalue()


def test_tsv_gives_back_what_went_in():
    # splitlines: by every character that any program takes for the end of a line.
    header, *rows = written("tsv").splitlines()
    names = ["te\txt", "label", "probability", *(f"p({name})" for name in LABELS)]
    assert unescaped(header) == names and len(rows) == len(TEXTS)
    for i, row in enumerate(rows):
        assert unescaped(row) == [TEXTS[i], LABELS[i % 4], "0.2500", *["0.2500"] * 4]
    assert written("tsv", ["plain"], list("wxyz")).splitlines()[1].startswith("plain\tw\t0.2500")


def test_jsonl_gives_back_what_went_in():
    rows = [json.loads(line) for line in written("jsonl").splitlines()]
    assert [row["te\txt"] for row in rows] == TEXTS
    assert [row["label"] for row in rows] == [LABELS[i % 4] for i in range(len(TEXTS))]
    assert all(list(row["probabilities"]) == LABELS for row in rows)
    assert "café" in written("jsonl")


@pytest.mark.parametrize(
    ("model", "text"), [("bert", "\u200b"), ("bert-mlm", "\u200b"), ("bert-mlm", "[MASK]")]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "stdin"])
def test_a_text_that_cannot_be_encoded_is_named(models_dir, tmp_path, model, text, kind):
    """A zero-width space has no token; a mask token of its own is one too many for a cloze."""
    tokenizer = AutoTokenizer.from_pretrained(models_dir / model)
    cloze = model == "bert-mlm"
    what = "mask token" if text == "[MASK]" else "a text without a token"
    task = load_task("sst2") if cloze else None
    labels = ["negative", "positive"]
    form = Formulation(labels, ["text"], "label", 16, cloze, False, task, model)
    if kind == "stdin":
        from lpt_fast.cli.predict import read_texts

        stdin = io.StringIO(f"fine\n{text}\n")
        texts, origin = read_texts(PredictArguments(adapter="x"), stdin, form)
        where, row = "standard input", "row 2"
    else:
        path = tmp_path / f"a.{kind}"
        lines = {"csv": f"text\nfine\n{text}\n", "jsonl": '{"text": "fine"}\n{"text": "%s"}\n'}
        path.write_text(lines[kind].replace("%s", text), encoding="utf-8")
        _, texts, origin = read_rows(str(path), "test", task, ["text"], None)
        where, row = str(path), f"row 2 (line {3 if kind == 'csv' else 2})"
    with pytest.raises(ValueError) as caught:
        form.encode(tokenizer, texts, None, origin)
    message = str(caught.value)
    assert message.startswith(where) and what in message and row in message
    assert len(message) <= 300 and "\n" not in message


@pytest.fixture(scope="module")
def adapter(models_dir, tmp_path_factory):
    """Trained on labels with a tab and a line break."""
    folder = tmp_path_factory.mktemp("tab")
    rows = [{"text": f"{text} {i}", "label": LABELS[i]} for i in (0, 1) for text in GOOD]
    (folder / "train.json").write_text(json.dumps(rows))
    done = invoke(
        *("train", "--model", models_dir / "bert", "--train_file", folder / "train.json"),
        *("--output_dir", folder / "out", "--use_cpu", "--max_steps", 1, "--max_length", 16),
        *("--save_strategy", "no", "--bottleneck_size", 4),
    )
    assert done.exit_code == 0, done.output
    return folder


def predicted(adapter, raw: bytes, encoding="utf-8", **more) -> str:
    stdin = io.TextIOWrapper(io.BytesIO(raw), encoding=encoding, errors="surrogateescape")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    predict(PredictArguments(adapter=str(adapter / "out"), use_cpu=True, **more), stdin, stdout)
    stdout.flush()
    return stdout.buffer.getvalue().decode("utf-8")


@pytest.mark.slow
def test_labels_with_tabs_and_breaks_come_back(adapter):
    header, *lines = predicted(adapter, "café\nplain\n".encode()).splitlines()
    assert unescaped(header)[3:] == ["p(a\tb)", "p(c\nd)"] and len(lines) == 2
    assert all(len(line.split("\t")) == 5 and unescaped(line)[1] in LABELS[:2] for line in lines)
    rows = predicted(adapter, "café\nplain\n".encode(), output_format="jsonl").splitlines()
    assert [json.loads(row)["label"] for row in rows] == [unescaped(line)[1] for line in lines]
    shown = invoke("eval", "--adapter", adapter / "out", "--test_file", adapter / "train.json")
    assert shown.exit_code == 0, shown.output


@pytest.mark.slow
def test_standard_input_is_utf8(adapter):
    """Whatever the terminal's encoding is, and without its mark."""
    plain = predicted(adapter, "café ☃\nplain\n".encode())
    assert predicted(adapter, "\ufeffcafé ☃\r\nplain".encode(), "latin-1") == plain
    assert "\ncafé ☃\t" in plain
    with pytest.raises(ValueError, match=r"standard input: got bytes that are not UTF-8 in line 2"):
        predicted(adapter, b"plain\ncaf\xe9\n")
    with pytest.raises(ValueError, match="Line 3 of standard input is empty"):
        predicted(adapter, b"plain\nplain\n\n")
    message = refused("predict", "--adapter", adapter / "out", "--use_cpu", text=b"caf\xe9\n")
    assert "standard input: got bytes that are not UTF-8 in line 1" in message


@pytest.mark.slow
def test_a_text_column_of_the_outputs_name_is_refused(adapter):
    flags = ("--input_file", adapter / "train.json", "--text_column", "label", "--use_cpu")
    message = refused("predict", "--adapter", adapter / "out", *flags)
    assert "got the text column 'label'" in message and "--text_column" in message


@pytest.mark.slow
def test_no_room_for_text_is_not_the_texts_fault(adapter):
    call = ("--adapter", adapter / "out", "--use_cpu", "--max_length")
    assert "leaves no room for text" in refused("predict", *call, 2, text="a\n")
    assert "takes 64 tokens" in refused("predict", *call, 65, text="a\n")
    file = ("--test_file", adapter / "train.json")
    assert "takes 64 tokens" in refused("eval", *call, 65, *file)
    done = invoke("eval", *call, 3, *file)
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_commands_name_file_and_row(models_dir, adapter, tmp_path):
    """The same sentence from training, evaluation, prediction and the cache."""
    path = tmp_path / "a.csv"
    path.write_text("text,label\nfine,x\n\u200b,y\n", encoding="utf-8")
    model = ("--model", models_dir / "bert", "--max_length", 16)
    messages = {
        refused("train", *model, "--train_file", path, "--output_dir", tmp_path / "out"),
        refused("precompute", *model, "--train_file", path, "--out", tmp_path / "cache"),
        refused("predict", "--adapter", adapter / "out", "--input_file", path, "--use_cpu"),
    }
    (message,) = messages
    assert f"{path}: got a text without a token (" in message and "row 2 (line 3)" in message
    message = refused("eval", "--adapter", adapter / "out", "--test_file", path, "--use_cpu")
    assert f"{path}: got the label 'x' in row 1 (line 2), expected one of" in message
