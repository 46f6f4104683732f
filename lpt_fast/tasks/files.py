"""One data file -> `datasets.Dataset`, in memory, with errors that name the row."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

KNOWN_SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")


def read_file(path: Path) -> Dataset:
    """Read a file by its extension. Text is UTF-8, with or without a byte order mark.

    Raises:
        ValueError: unknown extension, or content that is not of the kind it says.
    """
    from datasets import Dataset

    suffix = path.suffix.lower()
    if suffix not in KNOWN_SUFFIXES:
        raise ValueError(
            f"{path}: got the extension {suffix!r}, expected one of {', '.join(KNOWN_SUFFIXES)}: "
            "convert or rename the file"
        )
    if suffix == ".parquet":
        return _read_parquet(path)
    try:
        if suffix == ".tsv":
            return Dataset.from_dict(_read_tsv(path))
        if suffix == ".csv":
            return Dataset.from_dict(_read_csv(path))
        return _from_records(path, _read_json(path))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: got bytes that are not UTF-8 ({error.reason}), expected UTF-8 text: convert "
            "the file"
        ) from error


def _read_tsv(path: Path) -> dict[str, list[str]]:
    # No quoting in TSV: real data is full of single stray quotes. newline="\n" and no csv module,
    # so that nothing but a line feed ends a row.
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        rows = [line.rstrip("\n").removesuffix("\r").split("\t") for line in lines]
    return _columns(path, rows, "write a tab in a text as a space")


def _read_csv(path: Path) -> dict[str, list[str]]:
    limit = csv.field_size_limit(sys.maxsize)  # The default refuses a text of 128 KiB.
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.reader(lines, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path}: got text that is no CSV ({error}), expected quotes doubled inside quoted "
            "fields: correct it, or save as .tsv, which has no quoting"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return _columns(path, rows, "put a text with commas in double quotes")


def _columns(path: Path, rows: list[list[str]], way_out: str) -> dict[str, list[str]]:
    rows = [row for row in rows if row not in ([], [""])]
    if not rows:
        raise ValueError(
            f"{path}: got an empty file, expected a header and rows: check that it was written"
        )
    header, *body = rows
    if len(set(header)) != len(header) or "" in header:
        raise ValueError(
            f"{path}: got the header {header}, expected a different name for every column: "
            "correct the first line"
        )
    for number, row in enumerate(body, start=1):
        if len(row) != len(header):
            raise ValueError(
                f"{path}: got {len(row)} fields in row {number}, expected {len(header)} "
                f"({', '.join(header)}): {way_out}"
            )
    values = zip(*body, strict=True) if body else ([] for _ in header)
    return {name: list(column) for name, column in zip(header, values, strict=True)}


def _read_json(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise ValueError(
            f"{path}: got an empty file, expected one JSON object a line or a list of objects: "
            "check that it was written"
        )
    # Many .json files hold one object a line, and `datasets` takes them so.
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        return _parse(path, text, "")
    # Not splitlines(): U+2028 and the like are legal inside a JSON string.
    lines = [line for line in text.split("\n") if line.strip()]
    return [_parse(path, line, f" in row {i}") for i, line in enumerate(lines, start=1)]


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: got text that is no JSON{where} ({error}), expected one object a line, or "
            "in .json a list of objects: correct it"
        ) from error


def _from_records(path: Path, records: list[Any]) -> Dataset:
    from datasets import Dataset

    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}: got a {type(record).__name__} in row {number}, expected an object like "
                '{"text": ..., "label": ...}: write one for each example'
            )
    # Keys in order of appearance; a key that a row lacks is None there and reported by the caller.
    keys = list(dict.fromkeys(key for record in records for key in record))
    columns = {key: [record.get(key) for record in records] for key in keys}
    for key, values in columns.items():
        if len({type(v) for v in values if v is not None}) > 1 and all(
            v is None or isinstance(v, str | int | float) for v in values
        ):
            # Arrow columns have one type: 1 beside "one" becomes "1".
            columns[key] = [None if v is None else str(v) for v in values]
    try:
        return Dataset.from_dict(columns)
    except Exception as error:  # pyarrow raises several kinds, none of which names the file.
        raise ValueError(
            f"{path}: got values of different kinds in one column ({error}), expected one kind a "
            "column: make them alike"
        ) from error


def _read_parquet(path: Path) -> Dataset:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        # Read whole: Dataset.from_parquet would keep a copy in the cache folder. The table keeps
        # the schema's metadata, and with it ClassLabel names.
        return Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"{path}: got a file that is no Parquet ({error}), expected one: write it again or "
            "correct its extension"
        ) from error
