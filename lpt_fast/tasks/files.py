"""One data file -> `datasets.Dataset`, held in memory, with nothing cached and nothing changed."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .json_rows import json_records, json_table
from .messages import sentence, some

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

KNOWN_SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
_WAY_OUT = {
    ".tsv": "write a tab in a text as a space",
    ".csv": "put a text with commas in double quotes, or save as .tsv, without quoting",
    ".parquet": "write it again or correct its extension",
}


def read_file(path: Path) -> tuple[Dataset, dict[str, str]]:
    """Read a file by its extension. Text is UTF-8, with or without a byte order mark.

    Returns:
        The rows, and the columns that a data set cannot hold: name -> what was got.

    Raises:
        ValueError: unknown extension, or content that is not of the kind it says.
    """
    from datasets import Dataset

    suffix = path.suffix.lower()
    if suffix not in KNOWN_SUFFIXES:
        raise ValueError(
            sentence(
                path,
                f"the extension {suffix!r}",
                f"one of {', '.join(KNOWN_SUFFIXES)}",
                "convert or rename the file",
            )
        )
    if suffix == ".parquet":
        table, unfit = _parquet_table(path)
    elif suffix in (".jsonl", ".json"):
        table, unfit = json_table(path, _read_text(path))
    else:
        table, unfit = _text_table(path, _read_text(path)), {}
    return Dataset(table), unfit


def line_of(path: Path, row: int) -> int | None:
    """The line of the file on which a row begins, both counted from 1; None where rows are no
    lines: in Parquet and in a JSON list.
    """
    suffix = path.suffix.lower()
    if suffix not in KNOWN_SUFFIXES or suffix == ".parquet":
        return None
    text = _read_text(path)
    rows = json_records(path, text) if "json" in suffix else _data_rows(path, text)[1]
    return next((line for i, (line, _) in enumerate(rows, start=1) if i == row), None)


def decoded(content: bytes, source: object) -> str:
    """Text of bytes in UTF-8, without a byte order mark.

    Raises:
        ValueError: other bytes; names the line.
    """
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            sentence(
                source,
                f"bytes that are not UTF-8 in line {line} ({error.reason})",
                "UTF-8 text",
                "convert it, such as with `iconv -f latin1 -t utf-8`",
            )
        ) from error


def _read_text(path: Path) -> str:
    text = decoded(path.read_bytes(), path)
    if not text.strip():
        raise ValueError(sentence(path, "an empty file", "rows", "check that it was written"))
    return text


def _lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Each row of a CSV or TSV with the line on which it begins."""
    if path.suffix.lower() == ".tsv":
        # No quoting: real data is full of single stray quotes. Nothing but a line feed ends a row:
        # a carriage return inside a text stays, the one of a Windows line end goes.
        for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
            yield number, line.removesuffix("\r").split("\t")
        return
    # A carriage return between line feeds may be text that was not quoted: to end a row there would
    # make two of one. (Where there is no line feed at all, it ends the rows.)
    end = "\n" if "\n" in text else ""
    reader = csv.reader(io.StringIO(text, newline=end), strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # A text may be longer than the usual 131,072.
    try:
        line = 1
        for cells in reader:
            yield line, cells or [""]
            line = reader.line_num + 1
    except csv.Error as error:
        cr = "new-line character" in str(error)
        reason = "a carriage return outside quotes" if cr else str(error)
        raise _no_table(path, f"{reason}, line {reader.line_num}") from error
    finally:
        csv.field_size_limit(limit)


def _data_rows(path: Path, text: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and the rows with their lines, each of as many cells.

    A line without anything is no row, but where a row has one column it is one without text.
    """
    rows = list(_lines(path, text))
    start = next(i for i, (_, cells) in enumerate(rows) if "".join(cells).strip())
    header = rows[start][1]
    found = []
    for line, cells in rows[start + 1 :]:
        if len(header) > 1 and len(cells) == 1 and not cells[0].strip():
            continue
        if len(cells) > len(header):
            reason = f"Expected {len(header)} fields in line {line}, saw {len(cells)}"
            raise _no_table(path, reason)
        found.append((line, cells + [""] * (len(header) - len(cells))))
    return header, found


def _text_table(path: Path, text: str) -> pyarrow.Table:
    """All columns as text: 01 is not 1, and "NA" is a text."""
    import pyarrow

    header, rows = _data_rows(path, text)
    if len(set(header)) != len(header) or "" in header:
        raise _bad_header(path, header)
    return pyarrow.table(
        {
            name: pyarrow.array([cells[i] for _, cells in rows], type=pyarrow.string())
            for i, name in enumerate(header)
        }
    )


def _parquet_table(path: Path) -> tuple[pyarrow.Table, dict[str, str]]:
    import pyarrow
    from datasets import Features
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(path).read()
        table.validate(full=True)  # Bytes that are no UTF-8 in a column of text, for one.
    except (pyarrow.ArrowException, OSError) as error:
        raise _no_table(path, str(error)) from error
    if len(set(table.column_names)) != len(table.column_names):
        raise _bad_header(path, table.column_names)
    unfit = {}
    for field in table.schema:
        try:
            Features.from_arrow_schema(pyarrow.schema([field]))
        except (ValueError, NotImplementedError, KeyError):
            unfit[field.name] = f"values of the type {field.type} in column {field.name!r}"
    return table.drop_columns(list(unfit)), unfit


def _bad_header(path: Path, header: list[str]) -> ValueError:
    twice = [name for i, name in enumerate(header) if name in header[:i] or not name]
    got = f"columns {some(dict.fromkeys(twice))} twice or without a name in {some(header)}"
    return ValueError(
        sentence(path, got, "a different name for every column", "correct the first line")
    )


def _no_table(path: Path, reason: str) -> ValueError:
    kind = {".tsv": "TSV", ".csv": "CSV", ".parquet": "Parquet"}[path.suffix.lower()]
    reason = re.sub(r"\s+", " ", reason)
    reason = reason if len(reason) < 120 else f"{reason[:120]}..."
    return ValueError(
        sentence(path, f"content that is no {kind} ({reason})", kind, _WAY_OUT[path.suffix.lower()])
    )
