"""Readers: what the file says is what comes back, and mistakes name file, row and way out."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lpt_fast.tasks import TASKS, encode_labels, label_names, read_split

datasets = pytest.importorskip("datasets")

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = [
    {"text": 'the 7" disc , "great', "label": "positive"},
    {"text": "null", "label": "negative"},
    {"text": "NA", "label": "nan"},
    {"text": "line\u2028break", "label": "positive"},
]


def write_tsv(path, rows=ROWS, header="text\tlabel"):
    lines = [header, *("\t".join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write(path, rows=ROWS):
    if path.suffix == ".tsv":
        return write_tsv(path, rows)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        quoted = [[v.replace('"', '""') for v in row.values()] for row in rows]
        body = "".join('"{}","{}"\r\n'.format(*row) for row in quoted)
        path.write_text("text,label\r\n" + body, encoding="utf-8", newline="")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    else:
        path.write_text(json.dumps(rows), "utf-8")
    return path


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".json", ".jsonl", ".parquet"])
def test_every_kind_gives_back_what_was_written(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}")
    assert read_split(path, text_columns="text").to_list() == ROWS
    # No cache that goes stale: the same path, other rows.
    write(path, ROWS[:1])
    assert read_split(str(path)).to_list() == ROWS[:1]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".json", ".jsonl", ".parquet"])
def test_names_are_no_patterns(tmp_path, suffix):
    folder = tmp_path / "[ab]*?"
    folder.mkdir()
    path = write(folder / f"[1]*?{suffix}")
    write(folder / f"1{suffix}", ROWS[:1])
    assert read_split(path).to_list() == ROWS


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_all_is_text_in_tsv_and_csv(tmp_path, suffix):
    values = ["007", "1.0", "True", "2020-01-01", "inf", "-", "#", " a "]
    rows = [{"text": value, "label": str(i)} for i, value in enumerate(values)]
    data = read_split(write(tmp_path / f"a{suffix}", rows))
    assert data.to_list() == rows
    assert {feature.dtype for feature in data.features.values()} == {"string"}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".json", ".jsonl", ".parquet"])
def test_nothing_is_left_behind_and_10_000_rows_are_quick(tmp_path, monkeypatch, capfd, suffix):
    rows = [{"text": f"the {i}th text", "label": str(i % 5)} for i in range(10_000)]
    path = write(tmp_path / f"a{suffix}", rows)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    capfd.readouterr()
    start = time.perf_counter()
    data = read_split(path, text_columns="text")
    assert time.perf_counter() - start < 3
    assert data.cache_files == [] and not list((tmp_path / "tmp").iterdir())
    path.unlink()
    assert data.to_list() == rows
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bars", [True, False])
def test_settings_of_datasets_come_back(tmp_path, bars):
    datasets.enable_progress_bars() if bars else datasets.disable_progress_bars()
    before = datasets.logging.get_verbosity()
    try:
        read_split(write(tmp_path / "a.tsv"))
        (tmp_path / "a.json").write_text("{oops")
        with pytest.raises(ValueError, match="no JSON"):
            read_split(tmp_path / "a.json")
        assert datasets.is_progress_bar_enabled() is bars
        assert datasets.logging.get_verbosity() == before
    finally:
        datasets.enable_progress_bars()


def test_json_lines_under_the_name_json_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS), "utf-8")
    assert read_split(path).to_list() == ROWS
    # Windows line ends go; a carriage return inside a text is no line end.
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbftext\tlabel\r\na\rb\tx\r\n\r\n")
    assert read_split(tmp_path / "a.tsv").to_list() == [{"text": "a\rb", "label": "x"}]


def test_parquet_keeps_class_names(tmp_path):
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["b", "a"])
    )
    data = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    back = read_split(tmp_path / "a.parquet")
    assert label_names(back, "label") == ["b", "a"]
    assert encode_labels(back, "label", ["a", "b"])["labels"][:] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sst2", "mpqa", "mr", "subj", "trec"])
def test_real_data(name):
    if not DATA.is_dir():
        pytest.skip("no shared data here")
    spec = TASKS[name]
    for split in ("train", "dev", "test"):
        data = read_split(DATA / name, split=split, text_columns=spec)
        raw = (DATA / name / f"{split}.tsv").read_bytes().decode().rstrip("\n").split("\n")[1:]
        assert [f"{r['text']}\t{r['label']}" for r in data] == raw
        ids = encode_labels(data, "label", spec.labels)["labels"]
        assert [spec.labels[i] for i in ids] == list(data["label"])


def test_folder_split_names(tmp_path):
    write_tsv(tmp_path / "dev.tsv", ROWS[:2])
    assert len(read_split(tmp_path, split="validation")) == 2
    with pytest.raises(FileNotFoundError, match=r"split 'train'.*\.tsv.*\.parquet"):
        read_split(tmp_path)
    write(tmp_path / "dev.json")
    with pytest.raises(ValueError, match=r"dev\.tsv.*dev\.json.*one file"):
        read_split(tmp_path, split="dev")


def test_folder_of_save_to_disk(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "d")
    assert len(read_split(tmp_path / "d")) == 4
    assert len(read_split(tmp_path / "d", split="test")) == 1
    with pytest.raises(FileNotFoundError, match=r"split 'dev'.*train"):
        read_split(tmp_path / "d", split="dev")


@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("glue/sst2", ("nyu-mll/glue", "sst2")),
        ("owner/name", ("owner/name",)),
        ("owner/name/config", ("owner/name", "config")),
    ],
)
def test_hub_names(monkeypatch, source, called):
    calls = []

    def load_dataset(*args, split):
        calls.append((args, split))
        return datasets.Dataset.from_dict({"sentence": ["a"], "label": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = read_split(source, split="validation", text_columns=TASKS["sst2"])
    assert calls == [(called, "validation")]
    ids = TASKS["sst2"].hub_label_ids
    assert label_names(data, "label", ids) == ["negative", "positive"]
    assert encode_labels(data, "label", ["negative", "positive"], ids)["labels"][:] == [1]


def test_hub_not_reachable(monkeypatch):
    def load_dataset(*args, split):
        raise ConnectionError("no net")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"'owner/name'.*ConnectionError.*connection"):
        read_split("owner/name")


@pytest.mark.parametrize("source", ["none/train.tsv", "/none/a/b", "none", "../none/x"])
def test_no_such_file(source):
    with pytest.raises(FileNotFoundError, match=f"'{source}', which does not exist"):
        read_split(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", "x", r"'\.xlsx', expected one of \.tsv, \.csv"),
        ("a.tsv", "", "empty file"),
        ("a.csv", "", "empty file"),
        ("a.json", " ", "empty file"),
        ("a.json", "[]", "no rows"),
        ("a.tsv", "text\tlabel\n", "no rows"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.tsv", "text\ttext\nb\tx\n", "different name"),
        ("a.tsv", "sentence\tlabel\nb\tx\n", r"no column 'text'.*\['sentence', 'label'\]"),
        ("a.tsv", "text\tclass\nb\tx\n", r"no column 'label'.*\['text', 'class'\]"),
        ("a.tsv", "text\tlabel\na\tx\nb\n", r"no label \(''\) in row 2"),
        ("a.tsv", "text\tlabel\na\tb\tx\n", "2 fields in line 2, saw 3.* a tab"),
        ("a.tsv", "text\tlabel\n" + "a\tx\n" * 10_000 + "a\tb\tx\n", "in line 10002, saw 3"),
        ("a.csv", "text,label\na,b,x\n", "2 fields in line 2, saw 3.*double quotes"),
        ("a.csv", 'text,label\n"a,x\n', "no CSV"),
        ("a.tsv", "text\tlabel\na\tx\n\tx\n", "empty text in row 2"),
        ("a.tsv", "text\tlabel\na\tx\nb\t\n", r"no label \(''\) in row 2"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"label": 1}\n', "got None in row 2 of column"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', r"no label \(None\) in row 2"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{oops\n', r"no JSON \(.* in row 2\)"),
        ("a.jsonl", '{"text": "a", "label": 1}\n' * 5_000 + "{oops", r"no JSON.* in row 5001\)"),
        ("a.jsonl", '{"text": "a", "label": 1}\n3\n', r"no JSON object in row 2 \(3\)"),
        ("a.jsonl", '{"text": "a", "label": 1}\nnull\n', r"no JSON object in row 2 \(None\)"),
        ("a.json", "[1, 2]", "got no JSON object in row 1"),
        ("a.json", "null", "got no JSON object in row 1"),
        ("a.json", '[{"text": "a", "label": 1}, {"label": 1}]', "got None in row 2 of column"),
        ("a.json", '[{"text": "a", "label": 1}, {"text": "b", "label": "02"}]', "kinds.*'label'"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": ["b"], "label": 1}', "kinds.*'text'"),
        ("a.json", '[{"text": "a", "label": {"x": 1}}, {"text": "b", "label": 2}]', "kinds"),
        ("a.json", "[1,", "no JSON"),
        ("a.parquet", "x" * 99, "no Parquet"),
    ],
)
def test_mistakes_in_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_split(tmp_path / name, text_columns="text")
    assert str(tmp_path / name) in str(caught.value)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


def test_no_rows_in_parquet(tmp_path):
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: got no rows"):
        read_split(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_not_utf8(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_split(tmp_path / name)


def test_one_text_of_a_pair_may_be_empty(tmp_path):
    header = "question1\tquestion2\tlabel"
    rows = [{"a": "x", "b": "", "l": "duplicate"}]
    write_tsv(tmp_path / "a.tsv", rows, header)
    assert len(read_split(tmp_path / "a.tsv", text_columns=TASKS["qqp"])) == 1
    write_tsv(tmp_path / "a.tsv", [{"a": "", "b": " ", "l": "duplicate"}], header)
    with pytest.raises(ValueError, match="empty text in row 1"):
        read_split(tmp_path / "a.tsv", text_columns=TASKS["qqp"])
    with pytest.raises(ValueError, match=r"a\.tsv: task 'rte'.*sentence1"):
        read_split(tmp_path / "a.tsv", text_columns=TASKS["rte"])


def test_a_long_text_in_csv(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "a " * 200_000 + ",x\n")
    assert len(read_split(tmp_path / "a.csv")[0]["text"]) == 400_000


def test_max_samples_is_a_fixed_random_sample(tmp_path):
    path = write_tsv(tmp_path / "a.tsv", [{"text": f"t{i}", "label": i} for i in range(100)])
    one, two = (read_split(path, max_samples=10, seed=3)["text"][:] for _ in range(2))
    assert one == two and len(set(one)) == 10 and one != [f"t{i}" for i in range(10)]
    assert read_split(path, max_samples=10, seed=4)["text"][:] != one
    assert len(read_split(path, max_samples=1_000)) == 100
    with pytest.raises(ValueError, match="max_samples=0"):
        read_split(path, max_samples=0)


def test_data_without_labels(tmp_path):
    path = write_tsv(tmp_path / "a.tsv", [{"text": "a"}], "text")
    assert read_split(path, text_columns="text", label_column=None).to_list() == [{"text": "a"}]


def from_labels(values):
    return datasets.Dataset.from_dict({"label": values})


def test_label_names_are_sorted_as_what_they_are():
    assert label_names(from_labels(["10", "9", "1"])) == ["1", "9", "10"]
    assert label_names(from_labels([10, 9, 1])) == ["1", "9", "10"]
    assert label_names(from_labels([1.0, 0.0])) == ["0", "1"]
    assert label_names(from_labels(["b", "a", "10", "9"])) == ["10", "9", "a", "b"]
    with pytest.raises(ValueError, match="no column 'class'"):
        label_names(from_labels(["a"]), "class")


def test_encode_labels():
    train, test = from_labels(["b", "a", "b"]), from_labels(["a", "c"])
    names = label_names(train)
    encoded = encode_labels(train, "label", names)
    assert encoded["labels"][:] == [1, 0, 1] and encoded.features["labels"].dtype == "int64"
    with pytest.raises(ValueError, match=r"label 'c' in row 2, expected one of \['a', 'b'\]"):
        encode_labels(test, "label", names)
    assert encode_labels(from_labels([1, 0]), "label", ["0", "1"])["labels"][:] == [1, 0]
    renamed = encoded.remove_columns("labels").rename_column("label", "labels")
    assert encode_labels(renamed, "labels", names)["labels"][:] == [1, 0, 1]
    with pytest.raises(ValueError, match="'labels' already"):
        encode_labels(encoded, "label", names)


def test_hidden_labels_of_the_hub_are_named():
    features = datasets.Features(label=datasets.ClassLabel(names=["a", "b"]))
    data = datasets.Dataset.from_dict({"label": [0, -1]}, features=features)
    with pytest.raises(ValueError, match=r"no label \(-1\) in row 2.*labelled split"):
        encode_labels(data, "label", ["a", "b"])


@pytest.mark.parametrize("seed", ["1", "2", "3", "4"])
def test_class_order_does_not_depend_on_the_process(tmp_path, seed):
    """Labels that are equal as numbers are classes of their own, in an order of the data alone."""
    (tmp_path / "train.tsv").write_text("text\tlabel\na\t+1\nb\t1\nc\t01\nd\t-1\ne\t10\n")
    code = (
        "import sys; from lpt_fast.tasks import label_names, read_split;"
        "print(label_names(read_split(sys.argv[1])))"
    )
    env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    call = [sys.executable, "-c", code, str(tmp_path / "train.tsv")]
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['-1', '+1', '01', '1', '10']"


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
@pytest.mark.parametrize("blank", ["", "   ", "\r"])
def test_blank_rows_of_one_column_are_rows(tmp_path, suffix, blank):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(f"text\nfirst\n{blank}\nthird\n".encode())
    with pytest.raises(ValueError, match=r"got an empty text in row 2 of column 'text'"):
        read_split(path, text_columns="text", label_column=None)
    assert len(read_split(path, label_column=None)) == 3


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_blank_lines_between_rows_of_several_columns_are_none(tmp_path, suffix):
    path, sep = tmp_path / f"rows{suffix}", "\t" if suffix == ".tsv" else ","
    path.write_text(f"text{sep}label\nfirst{sep}a\n\nsecond{sep}b\n\n")
    assert read_split(path)["text"] == ["first", "second"]
