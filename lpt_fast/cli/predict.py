r"""`lpt-fast predict`: texts from a file or standard input to labels with probabilities.

Every format has one line a row and gives back what went in. In tsv a tab, a line break or a
backslash inside a cell is written as in JSON (`\t`, `\n`, `\\`); so is, in tsv and jsonl,
whatever else a program may take for the end of a line.
"""

from __future__ import annotations

import json
from typing import TextIO

from ..tasks.files import decoded
from ..tasks.messages import Origin, sentence
from .arguments import PredictArguments
from .data import read_rows, text_columns_of
from .inference import Classifier
from .outputs import check_file, whole_file

STDIN = "standard input"
# What str.splitlines takes for the end of a line. (Those below the space JSON escapes itself.)
_WIDE = {ord(c): json.dumps(c)[1:-1] for c in "\x85\u2028\u2029"}
_CELL = {ord(c): json.dumps(c)[1:-1] for c in "\\\t\n\r\v\f\x1c\x1d\x1e"} | _WIDE


def read_texts(
    args: PredictArguments, stdin: TextIO, formulation
) -> tuple[dict[str, list[str]], Origin]:
    """The texts to label, as {column: list}, and where they come from.

    Standard input holds one text a line, in UTF-8; for pairs, two with a tab between.

    Raises:
        ValueError: no text at all, an empty line, or one without the second text of a pair.
    """
    task = formulation.task
    columns = (
        text_columns_of(task, args.text_column) if args.text_column else formulation.text_columns
    )
    if args.input_file != "-":
        return read_rows(args.input_file, "test", task, columns, label_column=None)[1:]
    names = list(task.text_columns) if task else columns
    # Its bytes: as text, other encodings pass as halves of characters, which no tokenizer takes.
    raw = stdin.buffer.read() if hasattr(stdin, "buffer") else stdin.read().encode()
    text = decoded(raw, STDIN).removesuffix("\n")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not text.strip():
        raise ValueError("Standard input held no text; give one text a line, or --input_file.")
    for number, line in enumerate(lines, 1):
        if not line.strip():  # to leave it out would shift the labels of all that follow
            raise ValueError(
                f"Line {number} of standard input is empty, expected one text a line; take it out."
            )
    origin = Origin(STDIN)
    if len(names) == 1:
        return {names[0]: lines}, origin
    parts = [line.split("\t") for line in lines]
    for number, part in enumerate(parts, 1):
        if len(part) != 2:
            raise ValueError(
                f"Line {number} of standard input has {len(part)} tab-separated texts, expected 2 "
                f"({', '.join(names)})."
            )
    return {name: [part[i] for part in parts] for i, name in enumerate(names)}, origin


def predict(args: PredictArguments, stdin: TextIO, stdout: TextIO) -> None:
    """Labels every text. A file is written as a whole or not at all."""
    if args.output_file != "-":
        check_file(args.output_file, "--output_file")
    classifier = Classifier.of(args)
    texts, origin = read_texts(args, stdin, classifier.formulation)
    taken = {*_header({}, classifier.labels), "probabilities"} & set(texts)
    if taken:
        raise ValueError(
            sentence(
                origin.source,
                f"the text column {taken.pop()!r}",
                "another name, for the output has a column of that name",
                "rename it and give --text_column",
            )
        )
    predictions = list(classifier.predict(texts, args.output_file != "-", origin))
    if args.output_file == "-":
        if hasattr(stdout, "reconfigure"):  # Whatever the terminal's language.
            stdout.reconfigure(encoding="utf-8", newline="\n")
        _write(stdout, args.output_format, texts, classifier.labels, predictions)
        return
    with whole_file(args.output_file) as out:
        _write(out, args.output_format, texts, classifier.labels, predictions)


def _header(texts: dict, labels: list[str]) -> list[str]:
    return [*texts, "label", "probability", *(f"p({name})" for name in labels)]


def _line(cells: list[str]) -> str:
    return "\t".join(cell.translate(_CELL) for cell in cells) + "\n"


def _write(out: TextIO, kind: str, texts: dict, labels: list[str], predictions: list[dict]) -> None:
    rows = zip(*texts.values(), strict=True)
    if kind == "tsv":
        out.write(_line(_header(texts, labels)))
    for row, p in zip(rows, predictions, strict=True):
        if kind == "jsonl":
            line = json.dumps({**dict(zip(texts, row, strict=True)), **p}, ensure_ascii=False)
            out.write(line.translate(_WIDE) + "\n")
            continue
        numbers = [f"{p['probabilities'][name]:.4f}" for name in labels]
        out.write(_line([*row, p["label"], f"{p['probability']:.4f}", *numbers]))
