"""What the commands share on the screen: errors as one sentence, tables, percentages."""

from __future__ import annotations

import os

import typer


class clean_errors:
    """Wrong input is one sentence on stderr and exit code 2; anything else keeps its traceback.

    LPT_FAST_TRACEBACK=1 shows where the sentence comes from.
    """

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None and issubclass(kind, (ValueError, OSError)):
            if os.environ.get("LPT_FAST_TRACEBACK"):
                return False
            typer.secho(f"lpt-fast: {error}", fg="red", err=True)
            raise typer.Exit(2) from None
        return False


def table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def percent(value: float) -> str:
    """A share as 12.3 %."""
    return f"{100 * value:.1f} %"


def metrics_table(splits: dict[str, dict[str, float]]) -> str:
    """Metrics of each split as a table of text."""
    rows = [["split", "examples", "accuracy", "F1", "MCC"]]
    for name, m in splits.items():
        rows.append(
            [name, str(m["examples"]), percent(m["accuracy"]), percent(m["f1"]), f"{m['mcc']:.3f}"]
        )
    return table(rows)
