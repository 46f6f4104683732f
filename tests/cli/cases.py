"""What tests of the command line share: small data files, and calls of the program."""

from __future__ import annotations

from typer.testing import CliRunner

from lpt_fast.cli.main import app

GOOD = [
    "a lovely film",
    "great acting and a great plot",
    "i enjoyed every minute",
    "wonderful music",
]
BAD = ["a dull film", "terrible acting and no plot", "i hated every minute", "boring music"]
ROWS = [
    (f"{text} {i}", label)
    for i in range(6)
    for texts, label in ((GOOD, "positive"), (BAD, "negative"))
    for text in texts
]


def write_tsv(path, rows=ROWS, header="text\tlabel"):
    path.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return str(path)


def invoke(*arguments, text=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text)


def refused(*arguments, text=None) -> str:
    """The one sentence on stderr of a refused call."""
    result = invoke(*arguments, text=text)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    line = next(line for line in result.stderr.splitlines() if line.startswith("lpt-fast: "))
    return line
