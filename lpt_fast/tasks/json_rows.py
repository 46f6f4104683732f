"""Rows of a JSON file: a list of objects, one object after the other, or columns.

Read by `json`, not by `datasets`: that makes timestamps of texts that look like dates, and so
merges 10:00 and 10:00:00.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .messages import sentence, shown, some

if TYPE_CHECKING:
    import pyarrow

_SPACE = re.compile(r"[ \t\r\n]*")
_WAY_OUT = "write one object a line or a list of objects"


def json_records(path: Path, text: str) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Each object with its line (None in a list or in columns, where rows are no lines).

    Raises:
        ValueError: no JSON, something else than objects, a key twice in one.
    """
    start = _SPACE.match(text).end()
    if text[start] == "[":
        records = _decode(path, text, start, None)[0]
        yield from ((None, _checked(path, r, i)) for i, r in enumerate(records, start=1))
        return
    end, line, row = 0, 1, 0
    while start < len(text):
        row += 1
        line += text.count("\n", end, start)
        value, stop = _decode(path, text, start, row)
        line_after = line + text.count("\n", start, stop)
        end, start = stop, _SPACE.match(text, stop).end()
        if row == 1 and start == len(text) and _is_columns(path, value):
            names = list(value)
            for cells in zip(*_even(path, value), strict=True):
                yield None, dict(zip(names, cells, strict=True))
            return
        yield line, _checked(path, value, row)
        line = line_after


def json_table(path: Path, text: str) -> tuple[pyarrow.Table, dict[str, str]]:
    """The rows as a table, a key without a value as null; and the columns that cannot be in it:
    name -> what was got.
    """
    import pyarrow

    records = [record for _, record in json_records(path, text)]
    columns, unfit = {}, {}
    for name in dict.fromkeys(key for record in records for key in record):
        values = [record.get(name) for record in records]
        try:
            unfit[name] = _mixed(name, values)
            if not unfit[name]:
                columns[name] = pyarrow.array(values)
                del unfit[name]
        except UnicodeEncodeError:
            row = next(i for i, v in enumerate(values, start=1) if not _encodes(v))
            unfit[name] = f"half a character (a lone surrogate) in row {row} of column {name!r}"
        except (OverflowError, pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            unfit[name] = f"values of different kinds or beyond 64 bits in column {name!r}"
    return pyarrow.table(columns), unfit


def _decode(path: Path, text: str, start: int, row: int | None) -> tuple[Any, int]:
    in_row = "" if row is None else f" in row {row}"
    try:
        value, end = _DECODER.raw_decode(text, start)
        if row is None and _SPACE.match(text, end).end() < len(text):
            raise json.JSONDecodeError("more after the end of the list", text, end)
        return value, end
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, line {error.lineno} column {error.colno}{in_row}"
    except (ValueError, RecursionError) as error:  # A number or a nesting without end.
        reason = f"{str(error)[:80]}{in_row}"
    except _Twice as error:
        raise ValueError(
            sentence(path, f"the key {error}{in_row}", "each key once an object", "rename one")
        ) from None
    raise ValueError(sentence(path, f"content that is no JSON ({reason})", "JSON", _WAY_OUT))


class _Twice(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(f"{shown(next(k for k in keys if keys.count(k) > 1))} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _checked(path: Path, value: Any, row: int) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError(
        sentence(
            path,
            f"no JSON object in row {row} ({shown(value)})",
            'one like {"text": ..., "label": ...}',
            "write one for each example",
        )
    )


def _is_columns(path: Path, value: Any) -> bool:
    """{"text": [...], "label": [...]}, or as pandas writes it: {"text": {"0": ...}, ...}."""
    if path.suffix.lower() != ".json" or not isinstance(value, dict) or not value:
        return False
    return all(isinstance(v, list) for v in value.values()) or all(
        isinstance(v, dict) and "0" in v for v in value.values()
    )


def _even(path: Path, value: dict[str, Any]) -> list[list[Any]]:
    columns = [list(v.values()) if isinstance(v, dict) else v for v in value.values()]
    orders = {tuple(v) for v in value.values() if isinstance(v, dict)}
    if len({len(column) for column in columns}) > 1 or len(orders) > 1:
        sizes = some(f"{name}: {len(column)}" for name, column in zip(value, columns, strict=True))
        raise ValueError(
            sentence(path, f"columns of different rows {sizes}", "as many in each", _WAY_OUT)
        )
    return columns


_KINDS = {bool: "bool", int: "number", float: "number", str: "text", list: "list", dict: "object"}


def _mixed(name: str, values: list[Any]) -> str:
    """What was got, where two values are of different kinds; else nothing."""
    first = next((v for v in values if v is not None), None)
    for row, value in enumerate(values, start=1):
        if value is not None and _KINDS[type(value)] != _KINDS[type(first)]:
            return (
                f"values of different kinds in column {name!r} ({shown(first)}, then "
                f"{shown(value)} in row {row})"
            )
    return ""


def _encodes(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
