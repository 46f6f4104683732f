"""Every reader on every kind of content: rows in are rows out, values and order by hand, or one
sentence of at most 300 characters that names the file, and the row where a row is at fault.
"""

from __future__ import annotations

import io
import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from lpt_fast.cli.arguments import PredictArguments
from lpt_fast.cli.data import ROW, Formulation, read_rows
from lpt_fast.cli.predict import read_texts
from lpt_fast.tasks import encode_labels, label_names
from lpt_fast.tasks.readers import label_keys
from tests.cli.readers_table import ALL, CASES, JSON, MANY, NAMES, lines, separated


def read(reader, content, folder):
    """[(text, label)] as the commands read them; labels of standard input are None."""
    if reader == "stdin":
        raw = content if isinstance(content, bytes) else content.encode()
        stdin = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8")
        form = Formulation(["x", "y"], ["text"], "label", 16, False, False, None, "m")
        texts, _ = read_texts(PredictArguments(adapter="out"), stdin, form)
        return [(text, None) for text in texts["text"]]
    path = folder / NAMES[reader]
    path.parent.mkdir(exist_ok=True)
    if reader == "parquet":
        table = content if isinstance(content, pyarrow.Table) else pyarrow.table(content)
        parquet.write_table(table, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = path.parent if reader == "folder" else path
    rows, texts, origin = read_rows(str(source), "validation", None, ["text"], "label")
    names = label_names(rows)
    ids = encode_labels(rows, "label", names, origin=origin)["labels"]
    assert [names[i] for i in ids] == label_keys(rows, "label")
    return list(zip(texts["text"], label_keys(rows, "label"), strict=True))


@pytest.mark.parametrize(
    ("case", "reader"),
    [(case, reader) for case, (contents, _) in CASES.items() for reader in contents],
)
def test_rows_in_are_rows_out(tmp_path, case, reader):
    contents, wanted = CASES[case]
    want = wanted.get(reader, wanted[""])
    if isinstance(want, list):
        assert read(reader, contents[reader], tmp_path) == want
        return
    with pytest.raises(ValueError) as caught:
        read(reader, contents[reader], tmp_path)
    message = str(caught.value)
    assert type(caught.value) is ValueError and "\n" not in message and len(message) <= 300
    assert re.search(want, message), message
    where = "standard input" if reader == "stdin" else str(tmp_path / NAMES[reader])
    assert where in message


def test_every_reader_has_every_kind():
    """Not all can be: Parquet has no header, lines or marks; standard input has no labels."""
    kinds = {
        **dict.fromkeys(("blank text", "quoted breaks", "latin-1"), f"{ALL} stdin"),
        **dict.fromkeys(("missing label", "bools", "ints", "floats", "1,500 classes"), ALL),
        **dict.fromkeys(("tab in label", "duplicate header", "dates as text"), ALL),
        **dict.fromkeys(("BOM", "no header", "blank line"), f"csv tsv folder {JSON} stdin"),
        "lists": f"csv tsv {JSON} parquet",
    }
    for kind, readers in kinds.items():
        assert set(CASES[kind][0]) >= set(readers.split()), kind


def test_rows_keep_their_numbers_in_a_sample(tmp_path):
    """Row 90 of the file is named so, whatever a sample makes of it."""
    rows = [(f"t{i}", "x" if i % 2 else "y") for i in range(1, 101)]
    rows[89] = ("t90", "z")
    path = tmp_path / "a.csv"
    path.write_text(separated(rows)["csv"])
    for seed in range(20):
        found, texts, origin = read_rows(str(path), "test", None, ["text"], "label", 50, seed)
        assert [f"t{number}" for number in found[ROW]] == texts["text"]
        if "z" in found["label"]:
            break
    with pytest.raises(ValueError, match=r"a\.csv: got the label 'z' in row 90 \(line 91\)"):
        encode_labels(found, "label", ["x", "y"], origin=origin)


def test_an_unknown_label_among_many_classes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,c0001\nb,c1500\n")
    found, _, origin = read_rows(str(path), "test", None, ["text"], "label")
    with pytest.raises(ValueError) as caught:
        encode_labels(found, "label", [label for _, label in MANY], origin=origin)
    message = str(caught.value)
    assert message.startswith(f"{path}: got the label 'c1500' in row 2 (line 3), expected one of")
    assert "'c0000', " in message and "1,500 in all" in message and len(message) <= 300


def test_a_long_path_leaves_room(tmp_path):
    folder = tmp_path / ("f" * 200) / ("g" * 200)
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text('{"text": "a", "label": "x"}\n' + lines([("b" * 999, 0.5)]))
    with pytest.raises(ValueError) as caught:
        read_rows(str(folder / "rows.jsonl"), "test", None, ["text"], "label")
    (folder / "rows.jsonl").write_text(lines([("b" * 999, 0.5)]))
    with pytest.raises(ValueError) as again:
        read_rows(str(folder / "rows.jsonl"), "test", None, ["text"], "label")
    assert "g/rows.jsonl: got values of different kinds" in str(caught.value)
    assert "g/rows.jsonl: got the label 0.5" in str(again.value) and "row 1" in str(again.value)
    assert len(str(caught.value)) <= 300 and len(str(again.value)) <= 300


def test_twins_have_the_same_classes(tmp_path):
    """Trained on one kind of file, evaluated on another."""
    values = {"text": ["a", "b", "c"], "label": [True, False, True]}
    parquet.write_table(pyarrow.table(values), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(values))
    (tmp_path / "a.csv").write_text("text,label\na,true\nb,false\nc,true\n")
    for name in ("a.parquet", "a.json", "a.csv"):
        rows, _, _ = read_rows(str(tmp_path / name), "test", None, ["text"], "label")
        assert label_names(rows) == ["false", "true"]
        assert encode_labels(rows, "label", ["false", "true"])["labels"][:] == [1, 0, 1]
    # As Python writes it, and as an earlier version named the classes.
    (tmp_path / "a.csv").write_text("text,label\na,True\nb,False\nc,True\n")
    for name in ("a.parquet", "a.csv"):
        rows, _, _ = read_rows(str(tmp_path / name), "test", None, ["text"], "label")
        assert label_names(rows) == ["false", "true"]
        assert encode_labels(rows, "label", ["False", "True"])["labels"][:] == [1, 0, 1]
    # A class that an earlier version named with a space is found by its label.
    (tmp_path / "b.csv").write_text("text,label\na, x\nb,y\n")
    rows, _, origin = read_rows(str(tmp_path / "b.csv"), "test", None, ["text"], "label")
    assert encode_labels(rows, "label", ["y", " x"])["labels"][:] == [1, 0]
    with pytest.raises(ValueError, match="different label for each"):
        encode_labels(rows, "label", ["x", " x", "y"], origin=origin)


def test_messages_about_a_column_or_a_folder_name_it(tmp_path):
    (tmp_path / "train.csv").write_text("text,label,labels\na,x,1\n")
    rows, _, origin = read_rows(str(tmp_path), "train", None, ["text"], "label")
    with pytest.raises(ValueError, match=r"train\.csv: got a column 'labels' already"):
        encode_labels(rows, "label", ["x"], origin=origin)
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,\n")
    with pytest.raises(ValueError, match=r"train\.csv: got no label \(''\) in row 2 .*line 3"):
        read_rows(str(tmp_path), "train", None, ["text"], "label")
    with pytest.raises(FileNotFoundError, match="got no file for split 'test', expected test"):
        read_rows(str(tmp_path), "test", None, ["text"], "label")
