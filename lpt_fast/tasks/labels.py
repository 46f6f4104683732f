"""What is a label: text, a whole number or a bool, by one rule for every kind of file.

It stays as it stands in the file: `01` is not `1`, `10:00` not `10:00:00`. Only what programs add
on the way from one kind of file to another does not count: spaces around it, the fraction of a
whole number, the case of a bool (` a` is `a`, `1.0` is `1`, `True` is `true`). CSV and TSV have no
types, so a text that spells a fraction counts as a number everywhere.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

# (1e5 without a sign may be a code; the numbers that programs write have one: 1e-05.)
_NUMBER = re.compile(r"[+-]?(\d*\.\d+([eE][+-]?\d+)?|\d+[eE][+-]\d+)", re.ASCII)
RULE = "text, a whole number or a bool"


class NoLabel(ValueError):
    """A value that is no label. Its text says what it is.

    Attributes:
        missing: there is none at all.
    """

    def __init__(self, what: str, missing: bool = False):
        super().__init__(what)
        self.missing = missing


def label_text(value: Any) -> str:
    """A label as text, as JSON spells it: "good", "3", "true".

    Raises:
        NoLabel: nothing (None, NaN, blank text), a number that is not whole, or another kind of
            value.
    """
    from .messages import shown

    if value is None or value != value:
        raise NoLabel(f"no label ({shown(value)})", missing=True)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        text = value.strip()
        if not text:
            raise NoLabel(f"no label ({shown(value)})", missing=True)
        if text.lower() in ("true", "false"):
            return text.lower()
        if not _NUMBER.fullmatch(text):
            return text
        value = Decimal(text)
    if isinstance(value, float | Decimal):
        # From 2**53 on not every whole number is a float: two could have become one.
        if math.isfinite(value) and abs(value) < 2**53 and value == int(value):
            return str(int(value))
        raise NoLabel(f"the label {value}, a number that is not whole")
    raise NoLabel(f"the label {shown(value)} of type {type(value).__name__}")
