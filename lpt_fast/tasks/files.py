"""One data file -> `datasets.Dataset`, read by `datasets`, held in memory, with nothing cached."""

from __future__ import annotations

import glob
import io
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, Features

# Extension -> what it says the file is, and what to do where it is not.
_KINDS = {
    ".tsv": ("TSV", "write a tab in a text as a space"),
    ".csv": ("CSV", "put a text with commas in double quotes, or save as .tsv, without quoting"),
    ".jsonl": ("JSON", "write one object a line"),
    ".json": ("JSON", "write one object a line or a list of objects"),
    ".parquet": ("Parquet", "write it again or correct its extension"),
}
KNOWN_SUFFIXES = tuple(_KINDS)


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
    # Not `load_dataset`, which reports each use to the hub. A path is a glob pattern to `datasets`.
    source = glob.escape(str(path.absolute()))
    with tempfile.TemporaryDirectory() as folder, _quiet():
        options: dict[str, Any] = {"cache_dir": folder, "keep_in_memory": True}
        if suffix == ".parquet":
            with _mistakes_named(path):
                return Dataset.from_parquet(source, **options)
        content = _read_text(path)
        # One chunk, so that kinds and fields are compared in all rows; for JSON, of which pyarrow
        # gets it in 32 parts, one part: rows in its messages are counted from the start of a part.
        options["chunksize"] = len(content) * (32 if len(content) < 2**23 else 1)
        if suffix in (".jsonl", ".json"):
            if not content.lstrip(b"\xef\xbb\xbf \t\r\n[").startswith((b"{", b"]")):
                # Asked for here since a null in row 1 crashes pyarrow 26 (apache/arrow#47409).
                raise ValueError(
                    f"{path}: got no JSON object in row 1, expected one like "
                    '{"text": ..., "label": ...}: write one for each example'
                )
            with _mistakes_named(path):
                data = Dataset.from_json(source, **options)
            _check_json_kinds(path, data)
            return data
        dialect: dict[str, Any] = {"keep_default_na": False}
        if suffix == ".tsv":
            # No quoting: real data is full of single stray quotes. Nothing but a line feed ends a
            # row: a carriage return inside a text stays, the one of a Windows line end goes.
            dialect |= {"sep": "\t", "quoting": 3, "lineterminator": "\n"}
            content = content.replace(b"\r\n", b"\n")
            copy = Path(folder, "rows.tsv")
            copy.write_bytes(content)
            source = glob.escape(str(copy))
        features = _text_features(path, content, dialect)
        # A line without anything is no row, but where a row has one column it is one without text.
        dialect["skip_blank_lines"] = len(features) > 1
        with _mistakes_named(path):
            return Dataset.from_csv(source, features=features, **dialect, **options)


def _read_text(path: Path) -> bytes:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: got bytes that are not UTF-8 ({error.reason}), expected UTF-8 text: convert "
            "the file"
        ) from error
    if not text.strip():
        raise ValueError(f"{path}: got an empty file, expected rows: check that it was written")
    return content


def _text_features(path: Path, content: bytes, dialect: dict[str, Any]) -> Features:
    """All columns of a CSV or TSV as strings: 01 is not 1, and "NA" is a text."""
    import pandas
    from datasets import Features, Value

    with _mistakes_named(path):
        # Two rows: a second one that is too long would become an index in the real read.
        head = pandas.read_csv(io.BytesIO(content), header=None, nrows=2, dtype=str, **dialect)
    header = head.iloc[0].tolist()
    if len(set(header)) != len(header) or "" in header:
        raise ValueError(
            f"{path}: got the header {header}, expected a different name for every column: "
            "correct the first line"
        )
    return Features({name: Value("string") for name in header})


def _check_json_kinds(path: Path, data: Dataset) -> None:
    import datasets

    mixed = getattr(datasets, "Json", ())  # Older versions raise where kinds differ.
    for name, feature in data.features.items():
        # Objects with different keys come so, too.
        if isinstance(feature, mixed) and {type(v) for v in data[name]} - {dict, type(None)}:
            raise ValueError(
                f"{path}: got values of different kinds in column {name!r}, expected one kind a "
                "column: make them alike"
            )


@contextmanager
def _mistakes_named(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Several kinds, of datasets, pandas and pyarrow.
        if "corresponds to no data" in str(error):
            raise ValueError(
                f"{path}: got no rows, expected one or more: check that it was written"
            ) from error
        kind, way_out = _KINDS[path.suffix.lower()]
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        # pyarrow counts rows from 0, and where it names a column gives the row as 0 always.
        row = re.search(r" in row (\d+)$", reason)
        if row and kind == "JSON":
            number = "" if "Column(" in reason else f" in row {int(row[1]) + 1}"
            reason = reason[: row.start()] + number
        raise ValueError(
            f"{path}: got content that is no {kind} ({reason}), expected {kind}: {way_out}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no log lines about errors that are raised anyway."""
    import datasets

    had_bars = not datasets.utils.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.utils.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.utils.enable_progress_bars()
