"""Sentences about data: the file, what was got and where, what is wanted, the way out; short."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

LIMIT = 300  # characters of a sentence
_WIDTH = 40  # of a value or a name in it

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
    where = str(source)

    def whole() -> str:
        return f"{where}: " + " ".join(f"got {got}, expected {wanted}: {way_out}".split())

    if len(whole()) > LIMIT and len(where) > 100:
        where = "..." + where[-max(40, len(where) - 3 - (len(whole()) - LIMIT)) :]
    if len(whole()) > LIMIT:
        got = got[: max(40, len(got) - 3 - (len(whole()) - LIMIT))] + "..."
    return whole()


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
        where = f"row {number}" if column is None else f"row {number} of column {column!r}"
        return where if line is None else f"{where} (line {line})"
