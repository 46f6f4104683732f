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
from .all_tasks import Classifiers
from .arguments import PredictArguments
from .data import read_rows, text_columns_of
from .inference import Classifier
from .outputs import check_file, check_folder, whole_file

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
    if args.activation_cache is not None:
        check_folder(args.activation_cache, "--activation_cache")
    size = args.per_device_eval_batch_size
    how = (args.model, args.max_length, size, args.use_cpu, args.compute_dtype)
    single = len(args.adapter) == 1
    alone = single and args.activation_cache is None
    if alone:
        classifier = Classifier(args.adapter[0], *how)
        formulation = classifier.formulation
    else:
        classifier = Classifiers(args.adapter, *how, args.activation_cache)
        formulation = classifier.formulation_of_all(bool(args.text_column))
    texts, origin = read_texts(args, stdin, formulation)
    labels = formulation.labels if single else classifier.names
    taken = {*_header({}, labels, single), *(["probabilities"] if single else ["tasks"])}
    if taken & set(texts):
        raise ValueError(
            sentence(
                origin.source,
                f"the text column {(taken & set(texts)).pop()!r}",
                "another name, for the output has a column of that name",
                "rename it and give --text_column",
            )
        )
    found = classifier.predict(texts, args.output_file != "-", origin)
    if not alone:
        by_row = zip(*found.values(), strict=True)
        found = (row[0] if single else dict(zip(labels, row, strict=True)) for row in by_row)
    predictions = list(found)
    write = (stdout, args.output_format, texts, labels, predictions, single)
    if args.output_file == "-":
        if hasattr(stdout, "reconfigure"):  # Whatever the terminal's language.
            stdout.reconfigure(encoding="utf-8", newline="\n")
        _write(*write)
        return
    with whole_file(args.output_file) as out:
        _write(out, *write[1:])


def _header(texts: dict, labels: list[str], single: bool = True) -> list[str]:
    """Columns of a tsv file; `labels` of the one task, or the names of several."""
    if single:
        return [*texts, "label", "probability", *(f"p({name})" for name in labels)]
    return [*texts, *labels, *(f"p({name})" for name in labels)]


def _line(cells: list[str]) -> str:
    return "\t".join(cell.translate(_CELL) for cell in cells) + "\n"


def _write(
    out: TextIO,
    kind: str,
    texts: dict,
    labels: list[str],
    predictions: list[dict],
    single: bool = True,
) -> None:
    rows = zip(*texts.values(), strict=True)
    if kind == "tsv":
        out.write(_line(_header(texts, labels, single)))
    for row, p in zip(rows, predictions, strict=True):
        if kind == "jsonl":
            found = p if single else {"tasks": p}
            line = json.dumps({**dict(zip(texts, row, strict=True)), **found}, ensure_ascii=False)
            out.write(line.translate(_WIDE) + "\n")
            continue
        if single:
            cells = [p["label"], p["probability"], *(p["probabilities"][name] for name in labels)]
        else:
            cells = [*(p[name]["label"] for name in labels)]
            cells += [p[name]["probability"] for name in labels]
        out.write(_line([*row, *(c if isinstance(c, str) else f"{c:.4f}" for c in cells)]))
