"""The rows of a task that `lpt-fast train` reads, with class ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..tasks import (
    TaskSpec,
    encode_labels,
    few_shot_split,
    label_names,
    load_task,
)
from ..tasks.messages import Origin, sentence, some
from .arguments import TrainArguments
from .data import (
    ROW,
    read_rows,
    text_columns_of,
    texts_of,
)


@dataclass
class Split:
    """Rows of one split, with class ids."""

    texts: dict[str, list[str]]
    labels: list[int]
    origin: Origin | None = None


@dataclass
class Data:
    """Rows of all splits with what they have in common."""

    train: Split
    validation: Split | None
    test: Split | None
    labels: list[str]
    task: TaskSpec | None
    text_columns: list[str] | None


def read_data(args: TrainArguments) -> Data:
    """Reads and checks all splits before anything expensive starts."""
    task = load_task(args.task) if args.task else None
    columns = text_columns_of(task, args.text_column)

    def read(source, split, max_samples):
        rows, _, origin = read_rows(
            source, split, task, columns, args.label_column, max_samples, args.seed
        )
        return rows, origin

    full, origin = read(
        args.train_file or args.dataset, "train", None if args.few_shot else args.max_train_samples
    )
    ids = task.hub_label_ids if task else None
    names = list(task.labels) if task else label_names(full, args.label_column, ids)
    if len(names) < 2:
        raise ValueError(
            sentence(
                origin.source,
                f"{len(names)} label ({some(names)}) in the training data",
                "at least 2 to tell apart",
                f"check the column {args.label_column!r}",
            )
        )

    def split_of(rows, origin) -> Split:
        origin = origin.at(rows[ROW])
        encoded = encode_labels(rows, args.label_column, names, ids, origin)
        return Split(texts_of(rows, task, columns), list(encoded["labels"]), origin)

    def other(file, split):
        if file:
            return split_of(*read(file, split, args.max_eval_samples))
        if args.dataset and not args.train_file and not Path(args.dataset).is_file():
            # Test splits of hub data sets often have no labels, so only folders' are read.
            if split == "test" and not Path(args.dataset).is_dir():
                return None
            try:
                return split_of(*read(args.dataset, split, args.max_eval_samples))
            except FileNotFoundError:
                return None
        return None

    validation, test = other(args.validation_file, "validation"), other(args.test_file, "test")
    if args.few_shot:
        few, dev = few_shot_split(full, args.few_shot, args.seed, args.label_column)
        train, validation = split_of(few, origin), split_of(dev, origin)
    else:
        train = split_of(full, origin)
    return Data(train, validation, test, names, task, columns)
