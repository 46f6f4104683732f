"""Reading bench/results/kernels.jsonl: the latest measurement of each thing, in groups that belong
together.
"""

from __future__ import annotations

import json
from pathlib import Path

PROVIDERS = ("eager", "compile", "varlen", "triton")


def read(path: str) -> list[dict]:
    """The rows of a results file, oldest first.

    Raises:
        ValueError: no such file, or a line that is not a row.
    """
    if not Path(path).exists():
        raise ValueError(f"There is no {path}; `python -m bench kernels` makes it.")
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is not JSON: {error}") from error
        if not isinstance(row, dict) or not {"op", "provider", "shape", "machine"} <= row.keys():
            raise ValueError(f"Line {number} of {path} is no row of results.")
        rows.append(row)
    return rows


def latest(rows: list[dict]) -> dict[tuple, dict[tuple, dict]]:
    """(machine, shape, dtype, graph) -> (op, provider) -> its newest row.

    Rows that failed have no `graph`; they go to both.
    """
    groups: dict[tuple, dict[tuple, dict]] = {}
    for row in rows:
        if "ms" in row:
            groups.setdefault((row["machine"], row["shape"], row["dtype"], row["graph"]), {})
    for row in rows:
        for group in groups:
            if group[:3] == (row["machine"], row["shape"], row["dtype"]) and (
                row.get("graph", group[3]) == group[3]
            ):
                groups[group][row["op"], row["provider"]] = row
    return groups
