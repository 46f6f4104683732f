"""`lpt-fast predict`: texts from a file or standard input to labels with probabilities."""

from __future__ import annotations

import json
from typing import TextIO

from .arguments import PredictArguments
from .data import read_rows, text_columns_of
from .inference import Classifier
from .outputs import check_file, whole_file


def read_texts(args: PredictArguments, stdin: TextIO, formulation) -> dict[str, list[str]]:
    """The texts to label, as {column: list}.

    Standard input holds one text a line; for pairs, two with a tab between.

    Raises:
        ValueError: no text at all, or a line without the second text of a pair.
    """
    task = formulation.task
    columns = (
        text_columns_of(task, args.text_column) if args.text_column else formulation.text_columns
    )
    if args.input_file != "-":
        return read_rows(args.input_file, "test", task, columns, label_column=None)[1]
    names = list(task.text_columns) if task else columns
    lines = [line.rstrip("\r\n") for line in stdin]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError("Standard input held no text; give one text a line, or --input_file.")
    for number, line in enumerate(lines, 1):
        if not line.strip():  # to leave it out would shift the labels of all that follow
            raise ValueError(
                f"Line {number} of standard input is empty, expected one text a line; take it out."
            )
    if len(names) == 1:
        return {names[0]: lines}
    parts = [line.split("\t") for line in lines]
    for number, part in enumerate(parts, 1):
        if len(part) != 2:
            raise ValueError(
                f"Line {number} of standard input has {len(part)} tab-separated texts, expected 2 "
                f"({', '.join(names)})."
            )
    return {name: [part[i] for part in parts] for i, name in enumerate(names)}


def predict(args: PredictArguments, stdin: TextIO, stdout: TextIO) -> None:
    """Labels every text. A file is written as a whole or not at all."""
    if args.output_file != "-":
        check_file(args.output_file, "--output_file")
    classifier = Classifier(
        args.adapter,
        args.model,
        args.max_length,
        args.per_device_eval_batch_size,
        args.use_cpu,
    )
    texts = read_texts(args, stdin, classifier.formulation)
    predictions = list(classifier.predict(texts, progress=args.output_file != "-"))
    if args.output_file == "-":
        _write(stdout, args.output_format, texts, classifier.labels, predictions)
        return
    with whole_file(args.output_file) as out:
        _write(out, args.output_format, texts, classifier.labels, predictions)


def _write(out: TextIO, kind: str, texts: dict, labels: list[str], predictions: list[dict]) -> None:
    rows = zip(*texts.values(), strict=True)
    if kind == "tsv":
        header = [*texts, "label", "probability", *(f"p({name})" for name in labels)]
        out.write("\t".join(header) + "\n")
    for row, p in zip(rows, predictions, strict=True):
        if kind == "jsonl":
            out.write(
                json.dumps({**dict(zip(texts, row, strict=True)), **p}, ensure_ascii=False) + "\n"
            )
            continue
        # A tab or a line break in a text would shift the columns.
        cells = [" ".join(text.split()) for text in row]
        numbers = [f"{p['probabilities'][name]:.4f}" for name in labels]
        out.write("\t".join([*cells, p["label"], f"{p['probability']:.4f}", *numbers]) + "\n")
