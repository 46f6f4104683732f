"""Contents of files for every reader, written out by hand, with the rows or the message that each
must give: `test_readers_table.py`.
"""

from __future__ import annotations

import datetime
import json

import pyarrow

AX = [("a", "x"), ("b", "y")]
DAY, NEXT = datetime.date(2020, 1, 1), datetime.date(2021, 1, 1)
LATIN = pyarrow.StringArray.from_buffers(
    2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\5\0\0\0"), pyarrow.py_buffer(b"acaf\xe9")
)
MANY = [(f"t{i}", f"c{i:04}") for i in range(1500)]


def both(texts, labels):
    return {"text": texts, "label": labels}


def listed(rows):
    return json.dumps([both(*row) for row in rows])


def lines(rows):
    return "".join(json.dumps(both(*row)) + "\n" for row in rows)


def columns(rows):
    return json.dumps(both(*map(list, zip(*rows, strict=True))))


def as_json(rows):
    """The three layouts of JSON."""
    return {"list": listed(rows), "columns": columns(rows), "jsonl": lines(rows)}


def separated(rows):
    """CSV, TSV and a folder of CSV, of the same rows."""
    csv = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
    return {"csv": csv, "tsv": csv.replace(",", "\t"), "folder": csv}


def refusals(names, message):
    return {name: message for name in names.split()}


JSON = "list columns jsonl"
ALL = f"csv tsv folder {JSON} parquet"
# case -> (reader -> content, reader -> rows or message; "" for those that are not named)
CASES = {
    "blank line": (
        {
            **separated([*AX[:1], ("", "")]),
            "csv": "text,label\na,x\n\nb,y\n\n",
            "tsv": "text\tlabel\na\tx\n\nb\ty\n\n",
            "folder": "text,label\na,x\n\nb,y\n",
            "list": '[{"text": "a", "label": "x"},\n\n{"text": "b", "label": "y"}]',
            "columns": '{"text": ["a", "b"],\n\n"label": ["x", "y"]}',
            "jsonl": '{"text": "a", "label": "x"}\n\n{"text": "b", "label": "y"}\n\n',
            "stdin": "a\n\nb\n",
        },
        {"": AX, "stdin": "Line 2 of standard input is empty"},
    ),
    "blank at the end": ({"stdin": "a\nb\n\n"}, {"": "Line 3 of standard input is empty"}),
    "blank text": (
        {
            **separated([("a", "x"), (" ", "y")]),
            **as_json([("a", "x"), (" ", "y")]),
            "parquet": both(["a", " "], ["x", "y"]),
            "stdin": "a\n \n",
        },
        {
            "": r"empty text in row 2 of column 'text' \(line 3\)",
            "jsonl": r"empty text in row 2 of column 'text' \(line 2\)",
            **refusals("list columns parquet", "empty text in row 2 of column 'text',"),
            "stdin": "Line 2 of standard input is empty",
        },
    ),
    "missing label": (
        {
            **separated([("a", "x"), ("b", "")]),
            "tsv": "text\tlabel\na\tx\nb\n",
            "list": '[{"text": "a", "label": "x"}, {"text": "b"}]',
            "columns": '{"text": ["a", "b"], "label": ["x", null]}',
            "jsonl": '{"text": "a", "label": "x"}\n\n{"text": "b"}\n',
            "parquet": both(["a", "b"], ["x", None]),
        },
        {
            "": r"no label \(''\) in row 2 of column 'label' \(line 3\)",
            "jsonl": r"no label \(None\) in row 2 of column 'label' \(line 3\)",
            **refusals("list columns parquet", r"no label \(None\) in row 2 of column 'label',"),
        },
    ),
    "missing cells": (
        {
            "columns": '{"text": ["a", "b"], "label": ["x"]}',
            "jsonl": '{"text": "a", "label": NaN}\n{"text": "b", "label": 1}\n',
            "parquet": both(["a", "b"], [float("nan"), 1.0]),
        },
        {"": r"no label \(nan\) in row 1", "columns": r"columns of different rows .*label: 1"},
    ),
    "quoted breaks": (
        {
            "csv": 'text,label\n"a\nb",x\n"c\r\nd",y\n',
            "folder": 'text,label\r\n"a\nb",x\r\n"c\r\nd",y\r\n',
            "tsv": 'text\tlabel\n"a\tx\nb"\ty\n',
            **as_json([("a\nb", "x"), ("c\r\nd", "y")]),
            "parquet": both(["a\nb", "c\r\nd"], ["x", "y"]),
            "stdin": '"a\nb"\n',
        },
        {
            "": [("a\nb", "x"), ("c\r\nd", "y")],
            "tsv": [('"a', "x"), ('b"', "y")],
            "stdin": [('"a', None), ('b"', None)],
        },
    ),
    "fault behind quoted breaks": (
        {"csv": 'text,label\n"a\nb",x\n\nc,\n', "folder": 'text,label\n"a\nb",x\n\nc,\n'},
        {"": r"in row 2 of column 'label' \(line 5\)"},
    ),
    "open quote": (
        {"csv": 'text,label\n"a,x\nb,y\n', "folder": 'text,label\n"a" b,x\n'},
        {"": "no CSV .*line 3", "folder": "no CSV .*line 2"},
    ),
    "carriage returns": (
        {
            **separated([("a\rb", "x")]),
            "folder": 'text,label\r\n"a\rb",x\r\n',
            **as_json([("a\rb", "x")]),
            "parquet": both(["a\rb"], ["x"]),
            "stdin": "a\rb\r\n",
        },
        {
            "": [("a\rb", "x")],
            "csv": r"no CSV \(a carriage return outside quotes, line 2\)",
            "stdin": [("a\rb", None)],
        },
    ),
    "carriage returns alone": (
        {"csv": "text,label\ra,x\rb,y\r", "list": listed(AX).replace(", ", ",\r")},
        {"": AX},
    ),
    "BOM": (
        {
            **{name: "\ufeff" + text for name, text in (separated(AX) | as_json(AX)).items()},
            "stdin": "\ufeffa\nb\n",
        },
        {"": AX, "stdin": [("a", None), ("b", None)]},
    ),
    "latin-1": (
        {
            **{
                name: text.encode("latin-1")
                for name, text in separated([("a", "x"), ("café", "y")]).items()
            },
            "list": '[{"text": "a", "label": "x"},\n{"text": "café", "label": "y"}]'.encode(
                "latin-1"
            ),
            "columns": '{"text": ["a", "café"],\n"label": ["x", "y"]}'.encode("latin-1"),
            "jsonl": '{"text": "a", "label": "x"}\n{"text": "café", "label": "y"}'.encode(
                "latin-1"
            ),
            "parquet": both(LATIN, ["x", "y"]),
            "stdin": b"caf\xe9 au lait\nplain\n",
        },
        {
            "": "not UTF-8 in line 3 .*convert",
            **refusals("list jsonl", "not UTF-8 in line 2 .*convert"),
            **refusals("columns stdin", "not UTF-8 in line 1 .*convert"),
            "parquet": "no Parquet .*UTF8",
        },
    ),
    "half characters": (
        {
            "list": '[{"text": "a", "label": "x"}, {"text": "\\ud83d", "label": "y"}]',
            "columns": '{"text": ["a", "\\ud83d"], "label": ["x", "y"]}',
            "jsonl": '{"text": "a", "label": "x"}\n{"text": "\\ud83d", "label": "y"}\n',
            "stdin": b"a\n\xed\xa0\xbd\n",
        },
        {"": "half a character .* in row 2 of column 'text'", "stdin": "not UTF-8 in line 2"},
    ),
    "dates as text": (
        {
            **separated([("a", "2020-01-01"), ("b", "2021-01-01")]),
            **as_json([("a", "2020-01-01"), ("b", "2021-01-01")]),
            "parquet": both(["a", "b"], ["2020-01-01", "2021-01-01"]),
        },
        {"": [("a", "2020-01-01"), ("b", "2021-01-01")]},
    ),
    "minutes": (
        {
            **separated([("a", "2020-01-01 10:00"), ("b", "2020-01-01 10:00:00")]),
            **as_json([("a", "2020-01-01 10:00"), ("b", "2020-01-01 10:00:00")]),
            "parquet": both(["a", "b"], ["2020-01-01 10:00", "2020-01-01 10:00:00"]),
        },
        {"": [("a", "2020-01-01 10:00"), ("b", "2020-01-01 10:00:00")]},
    ),
    "texts like dates": (
        {
            **separated([("2020-01-01", "x"), ("10:00", "y")]),
            **as_json([("2020-01-01", "x"), ("10:00", "y")]),
            "parquet": both(["2020-01-01", "10:00"], ["x", "y"]),
            "stdin": "2020-01-01\n10:00\n",
        },
        {
            "": [("2020-01-01", "x"), ("10:00", "y")],
            "stdin": [("2020-01-01", None), ("10:00", None)],
        },
    ),
    "dates": (
        {"parquet": both(["a", "b"], [DAY, NEXT])},
        {"": r"datetime.date\(2020, 1, 1\) in row 1 of column 'label'|.* of type date in row 1"},
    ),
    "bools": (
        {
            **separated([("a", "true"), ("b", "False")]),
            **as_json([("a", True), ("b", False)]),
            "parquet": both(["a", "b"], [True, False]),
        },
        {"": [("a", "true"), ("b", "false")]},
    ),
    "ints": (
        {
            **separated([("a", "10"), ("b", "9"), ("c", "-1")]),
            **as_json([("a", 10), ("b", 9), ("c", -1)]),
            "parquet": both(["a", "b", "c"], [10, 9, -1]),
        },
        {"": [("a", "10"), ("b", "9"), ("c", "-1")]},
    ),
    "numbers as text": (
        {
            **separated([("a", "1"), ("b", "01"), ("c", "+1")]),
            **as_json([("a", "1"), ("b", "01"), ("c", "+1")]),
            "parquet": both(["a", "b", "c"], ["1", "01", "+1"]),
        },
        {"": [("a", "1"), ("b", "01"), ("c", "+1")]},
    ),
    "long ints": (
        {
            **separated([("a", "9007199254740993"), ("b", "9007199254740992")]),
            **as_json([("a", 9007199254740993), ("b", 9007199254740992)]),
            "parquet": both(["a", "b"], [9007199254740993, 9007199254740992]),
        },
        {"": [("a", "9007199254740993"), ("b", "9007199254740992")]},
    ),
    "whole floats": (
        {
            **separated([("a", "1.0"), ("b", "1"), ("c", "2.0")]),
            **as_json([("a", 1.0), ("b", 1), ("c", 2.0)]),
            "parquet": both(["a", "b", "c"], [1.0, 1.0, 2.0]),
        },
        {"": [("a", "1"), ("b", "1"), ("c", "2")]},
    ),
    "floats": (
        {
            **separated([("a", "1"), ("b", "0.25")]),
            **as_json([("a", 1.0), ("b", 0.25)]),
            "parquet": both(["a", "b"], [1.0, 0.25]),
        },
        {
            "": r"label 0\.25, a number that is not whole in row 2 of column 'label' \(line 3\)",
            "jsonl": r"the label 0\.25, a number that is not whole in row 2 .*\(line 2\)",
            **refusals("list columns parquet", r"0\.25, a number that is not whole in row 2 of"),
        },
    ),
    "spaces around labels": (
        {
            **separated([("a", " x"), (" b ", "x "), ("c", "x")]),
            **as_json([("a", " x"), (" b ", "x "), ("c", "x")]),
            "parquet": both(["a", " b ", "c"], [" x", "x ", "x"]),
            "stdin": " b \n",
        },
        {"": [("a", "x"), (" b ", "x"), ("c", "x")], "stdin": [(" b ", None)]},
    ),
    "lists": (
        {
            "csv": 'text,label\na,"[""x"", ""y""]"\n',
            "tsv": 'text\tlabel\na\t["x", "y"]\n',
            **as_json([("a", ["x", "y"]), ("b", ["x"])]),
            "parquet": both(["a", "b"], [["x", "y"], ["x"]]),
        },
        {
            "": r"label \['x', 'y'\] of type list in row 1 of column 'label'",
            "csv": [("a", '["x", "y"]')],
            "tsv": [("a", '["x", "y"]')],
        },
    ),
    "objects": (
        {**as_json([("a", {"k": 1})]), "parquet": both(["a"], [{"k": 1}])},
        {"": r"label \{'k': 1\} of type dict in row 1 of column 'label'"},
    ),
    "bytes": ({"parquet": both(["a"], [b"x"])}, {"": "label b'x' of type bytes in row 1"}),
    "texts of bytes": (
        {"parquet": both([b"a"], ["x"])},
        {"": "got b'a' in row 1 of column 'text'"},
    ),
    "texts in lists": (
        {**as_json([(["a"] * 9999, "x")]), "parquet": both([["a"] * 9999], ["x"])},
        {"": r"got \['a', 'a', \.\.\.\] in row 1 of column 'text'"},
    ),
    "kinds": (
        as_json([("a", 1), ("b", "1")]),
        {"": r"different kinds in column 'label' \(1, then '1' in row 2\)"},
    ),
    "duplicate header": (
        {
            "csv": "text,label,label\na,x,y\n",
            "tsv": "text\tlabel\tlabel\na\tx\ty\n",
            "folder": "text,label,label\na,x,y\n",
            "list": '[{"text": "a", "label": "x", "label": "y"}]',
            "columns": '{"text": ["a"], "label": ["x"], "label": ["y"]}',
            "jsonl": '{"text": "a", "label": "x"}\n{"text": "a", "label": "x", "label": "y"}\n',
            "parquet": pyarrow.table([pyarrow.array(["a"])] * 3, names=["text", "label", "label"]),
        },
        {
            "": r"columns \['label'\] twice",
            "list": "key 'label' twice",
            "columns": "key 'label' twice",
            "jsonl": "key 'label' twice in row 2",
        },
    ),
    "no header": (
        {
            "csv": "a,x\nb,y\n",
            "tsv": "a\tx\nb\ty\n",
            "folder": "a,x\nb,y\n",
            "list": '[["a", "x"], ["b", "y"]]',
            "columns": '[["a", "b"], ["x", "y"]]',
            "jsonl": '["a", "x"]\n["b", "y"]\n',
            "stdin": "text\na\n",
        },
        {
            "": r"no column 'text', expected it among \['a', 'x'\]",
            "list": r"no JSON object in row 1 \(\['a', 'x'\]\)",
            "columns": r"no JSON object in row 1 \(\['a', 'b'\]\)",
            "jsonl": "no JSON",
            "stdin": [("text", None), ("a", None)],
        },
    ),
    "1,500 classes": (
        {**separated(MANY), **as_json(MANY), "parquet": both(*map(list, zip(*MANY, strict=True)))},
        {"": MANY},
    ),
    "1,500 columns": (
        {
            "csv": ",".join(label for _, label in MANY) + "\n" + "a," * 1499 + "a\n",
            "jsonl": json.dumps(dict.fromkeys((label for _, label in MANY), "a")),
            "parquet": {label: ["a"] for _, label in MANY},
        },
        {"": r"no column 'text', expected it among \['c0000', .* 1,500 in all\]"},
    ),
    "tab in label": (
        {
            "csv": "text,label\na,x\ty\nb,z\n",
            "tsv": "text\tlabel\na\tx\ty\nb\tz\n",
            "folder": "text,label\na,x\ty\nb,z\n",
            **as_json([("a", "x\ty"), ("b", "z")]),
            "parquet": both(["a", "b"], ["x\ty", "z"]),
        },
        {"": [("a", "x\ty"), ("b", "z")], "tsv": "Expected 2 fields in line 2, saw 3.*a tab"},
    ),
    "breaks in label": (
        {
            "csv": 'text,label\na,"x\ny"\nb,z\n',
            "folder": 'text,label\na,"x\ny"\nb,z\n',
            **as_json([("a", "x\ny"), ("b", "z")]),
            "parquet": both(["a", "b"], ["x\ny", "z"]),
        },
        {"": [("a", "x\ny"), ("b", "z")]},
    ),
    "unrelated columns": (
        {
            "list": '[{"text": "a", "label": "x", "m": 1}, {"text": "b", "label": "y", "m": "?"}]',
            "columns": '{"text": ["a", "b"], "label": ["x", "y"], "m": [1, "?"]}',
            "jsonl": '{"text": "a", "label": "x", "m": {"k": 1}}\n'
            '{"text": "b", "label": "y", "m": {"k": "?"}, "n": 18446744073709551616}\n',
            "parquet": both(["a", "b"], ["x", "y"])
            | {
                "m": pyarrow.array(
                    [[("k", 1)]] * 2, pyarrow.map_(pyarrow.string(), pyarrow.int64())
                )
            },
        },
        {"": AX},
    ),
    "a map as label": (
        {
            "parquet": both(
                ["a"],
                pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            )
        },
        {"": "values of the type map<.* in column 'label', expected"},
    ),
    "categories": (
        {"parquet": both(["a", "b"], pyarrow.array(["x", "y"]).dictionary_encode())},
        {"": AX},
    ),
    "pandas": (
        {"columns": '{"text": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}}'},
        {"": AX},
    ),
}
NAMES = {
    **{"csv": "a.csv", "tsv": "a.tsv", "jsonl": "a.jsonl", "parquet": "a.parquet"},
    **{"list": "a.json", "columns": "a.json", "folder": "task/dev.csv"},
}
