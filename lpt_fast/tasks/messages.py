"""Sentences about data: the file, what was got and where, what is wanted, the way out; short."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

LIMIT = 300  # characters of a sentence
_WIDTH = 40  # of a value or a name in it
_PATH = 60  # of a path, in any case

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _WIDTH
_repr.maxlist = _repr.maxdict = _repr.maxtuple = 2
_repr.maxlevel = 2


def shown(value: object) -> str:
    """`repr` of a value; of a long one its beginning and end."""
    text = _repr.repr(value)
    return text if len(text) <= 2 * _WIDTH else f"{text[: 2 * _WIDTH]}..."


def some(names: Iterable[str]) -> str:
    """Names as a list; of many the first ones and their number."""
    names = list(names)
    kept: list[str] = []
    for name in names:
        if sum(map(len, kept)) + len(shown(name)) + 2 * len(kept) > 2 * _WIDTH:
            return f"[{', '.join(kept)}, ... {len(names):,} in all]"
        kept.append(shown(name))
    return f"[{', '.join(kept)}]"


def sentence(source: object, got: str, wanted: str, way_out: str) -> str:
    """`source: got ..., expected ...: way out`, on one line, of at most 300 characters: of a long
    path its end stays, of a long finding its beginning.
    """
    rest = f", expected {wanted}: {way_out}"
    finding = " ".join(f"got {got}".split())
    room = LIMIT - 2 - len(rest) - _cut_path(source)
    if len(finding) > room:
        finding = f"{finding[: room - 3]}..."
    return with_source(source, finding + rest)


def with_source(source: object, text: str) -> str:
    """`source: text`, of at most 300 characters where the text is: a path loses its beginning."""
    where = str(source)
    room = max(_PATH, LIMIT - 2 - len(text))
    return f"{where if len(where) <= room else '...' + where[3 - room :]}: {text}"


def _cut_path(source: object) -> int:
    """Characters of a path that stay in any case."""
    return min(len(str(source)), _PATH)


@dataclass
class Origin:
    """Where rows come from, to name them as an editor counts them.

    Attributes:
        source: the file, or a name for messages.
        numbers: the rows' numbers there, from 1; None: all rows in their order.
        line: number of a row -> its line in the file, or None where rows are no lines.
    """

    source: str = "data"
    numbers: Sequence[int] | None = None
    line: Callable[[int], int | None] = lambda number: None

    def row(self, index: int, column: str | None = None) -> str:
        """ "row 2 of column 'text' (line 3)" for the row at `index`, which counts from 0."""
        number = index + 1 if self.numbers is None else self.numbers[index]
        line = self.line(number)
        where = f"row {number}" if column is None else f"row {number} of column {shown(column)}"
        return where if line is None else f"{where} (line {line})"

    def at(self, numbers: Sequence[int]) -> Origin:
        """Of some of the rows, by their numbers."""
        return replace(self, numbers=list(numbers))
