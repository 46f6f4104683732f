"""Data from files, folders or the hub as `datasets.Dataset`, with labels checked and encoded.

Files are read by `datasets`, so that nothing is cached (a changed file is read anew), the text
"null" or "NA" stays text, and stray quotes in TSV stay what they are (`files`).
Rows in messages are counted from 1; a header is not a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .spec import TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset

# `datasets` once knew these without an owner; the hub has them under their owners' names.
_BUILDERS = {"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}
_SPLIT_NAMES = (("validation", "dev", "valid", "val"), ("train", "training"), ("test",))


def read_split(
    source: str | Path,
    *,
    split: str | None = None,
    text_columns: TaskSpec | str | Sequence[str] | None = None,
    label_column: str | None = "label",
    max_samples: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Read one split.

    Args:
        source: a .csv, .tsv, .json, .jsonl or .parquet file; a folder of such files named after
            their splits, or one written by `Dataset.save_to_disk`; a hub name: "owner/name",
            "owner/name/config", or "glue/sst2".
        split: which split of a folder or hub dataset; None: "train". "dev" and "validation" find
            each other in folders. A single file is one split, whatever this says.
        text_columns: columns that must be there and filled: names, or a task, whose canonical or
            hub names then do. In single-text data an empty text is missing; of a pair one may be
            empty (some of QQP's are). None: not checked.
        label_column: column that must be there and filled; None for data without labels.
        max_samples: keep a random sample of this many rows (order kept); None: all.
        seed: of that sample.

    Returns:
        the rows, with all their columns. CSV and TSV give strings.

    Raises:
        FileNotFoundError: no such file, split file or hub dataset.
        ValueError: unknown kind of file, no rows, no such column, a row without text or label, or
            text that cannot be parsed.
    """
    import numpy as np

    dataset = _load(source, split)
    if len(dataset) == 0:
        raise ValueError(
            f"{source}: got no rows, expected one or more: check that the file holds data after "
            "its header"
        )
    columns = _text_column_names(source, text_columns, dataset.column_names)
    for column in [*columns, *([label_column] if label_column else [])]:
        if column not in dataset.column_names:
            raise ValueError(
                f"{source}: got no column {column!r}, expected it among {dataset.column_names}: "
                "correct the name or the header"
            )
    _check_texts(source, dataset, columns)
    if label_column:
        label_keys(dataset, label_column, source=str(source))
    if max_samples is not None:
        if max_samples < 1:
            raise ValueError(
                f"got max_samples={max_samples}, expected 1 or more, or None for all rows: raise it"
            )
        if max_samples < len(dataset):
            rows = np.random.default_rng(seed).permutation(len(dataset))[:max_samples]
            dataset = dataset.select(np.sort(rows).tolist())
    return dataset


def label_names(
    dataset: Dataset, label_column: str = "label", label_ids: Mapping[int, str] | None = None
) -> list[str]:
    """The labels that make up the classes, in a stable order: the class ids are their places.

    A ClassLabel column gives its own names in its own order; other labels are sorted, as numbers
    where all of them are whole numbers. With `label_ids` (integer -> name) its order holds.

    Raises:
        ValueError: no such column, or a row without a label.
    """
    if label_ids is not None:
        return [label_ids[i] for i in sorted(label_ids)]
    keys = set(label_keys(dataset, label_column))
    names = getattr(dataset.features[label_column], "names", None)
    if names:
        return list(names)
    try:
        # ("1", "+1" and "01" are labels of their own: by their spelling, for a set has no order.)
        return sorted(keys, key=lambda key: (int(key), key))
    except ValueError:
        return sorted(keys)


def encode_labels(
    dataset: Dataset,
    label_column: str,
    names: Sequence[str],
    label_ids: Mapping[int, str] | None = None,
) -> Dataset:
    """Add the integer column "labels" [N]: the place of each row's label in `names`.

    Labels are compared as text, so 1 and "1" are the same label.

    Args:
        names: of the training data (`label_names`) or the task (`TaskSpec.labels`).
        label_ids: integer in the data -> name (`TaskSpec.hub_label_ids`), for hub data.

    Raises:
        ValueError: a label that is not in `names`, a row without a label, or another column of
            the name "labels".
    """
    if "labels" in dataset.column_names and label_column != "labels":
        raise ValueError(
            "got data that has a column 'labels' already, expected that name to be free: rename "
            "or remove it"
        )
    place = {str(name): i for i, name in enumerate(names)}
    ids = []
    for row, key in enumerate(label_keys(dataset, label_column, label_ids), start=1):
        if key not in place:
            raise ValueError(
                f"got the label {key!r} in row {row}, expected one of {list(place)}: correct the "
                "row, or train with data that has this label"
            )
        ids.append(place[key])
    if label_column == "labels":
        dataset = dataset.remove_columns("labels")
    return dataset.add_column("labels", ids)


def label_keys(
    dataset: Dataset,
    label_column: str,
    label_ids: Mapping[int, str] | None = None,
    source: str = "data",
) -> list[str]:
    """Each row's label as text: [N] names.

    Raises:
        ValueError: no such column, or a row without a label.
    """
    if label_column not in dataset.column_names:
        raise ValueError(
            f"{source}: got no column {label_column!r}, expected it among "
            f"{dataset.column_names}: correct the name"
        )
    feature = dataset.features[label_column]
    names = getattr(feature, "names", None)
    keys = []
    for row, value in enumerate(dataset[label_column], start=1):
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # An integer column with gaps comes as floats.
        # value != value: NaN. A negative ClassLabel: the hub's mark for hidden test labels.
        missing = value is None or value != value or (isinstance(value, str) and not value.strip())
        if missing or (names and isinstance(value, int) and value < 0):
            raise ValueError(
                f"{source}: got no label ({value!r}) in row {row} of column {label_column!r}, "
                "expected one in every row: fill or drop the row, or choose a labelled split"
            )
        if label_ids is not None and isinstance(value, int) and value in label_ids:
            keys.append(label_ids[value])
        elif names and isinstance(value, int):
            keys.append(names[value])
        else:
            keys.append(str(value))
    return keys


def _text_column_names(
    source: str | Path, text_columns: TaskSpec | str | Sequence[str] | None, available: list[str]
) -> list[str]:
    if isinstance(text_columns, TaskSpec):
        try:
            return list(text_columns.resolve_columns(available).values())
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    if isinstance(text_columns, str):
        return [text_columns]
    return list(text_columns or ())


def _check_texts(source: str | Path, dataset: Dataset, columns: list[str]) -> None:
    if not columns:
        return
    for row, texts in enumerate(zip(*(dataset[c] for c in columns), strict=True), start=1):
        for column, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                raise ValueError(
                    f"{source}: got {text!r} in row {row} of column {column!r}, expected text: "
                    "fill or drop the row"
                )
        if not any(text.strip() for text in texts):
            raise ValueError(
                f"{source}: got an empty text in row {row} of column {columns[0]!r}, expected "
                "some: fill or drop the row"
            )


def _load(source: str | Path, split: str | None) -> Dataset:
    from .files import KNOWN_SUFFIXES, read_file

    path = Path(source).expanduser()
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        return _load_folder(path, split or "train")
    parts = str(source).split("/")
    is_hub = isinstance(source, str) and len(parts) in (2, 3) and all(parts) and parts[0] != ".."
    if not is_hub or path.suffix.lower() in KNOWN_SUFFIXES or str(source).startswith((".", "~")):
        raise FileNotFoundError(
            f"got {str(source)!r}, which does not exist, expected a file, a folder or a hub name "
            "like 'glue/sst2': check the path"
        )
    return _load_hub(str(source), split or "train")


def _load_folder(folder: Path, split: str) -> Dataset:
    from .files import KNOWN_SUFFIXES, read_file

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        from datasets import DatasetDict, load_from_disk

        saved = load_from_disk(str(folder))
        if not isinstance(saved, DatasetDict):
            # One data set is one split; to give it for another would test on the training rows.
            if split != "train":
                raise FileNotFoundError(
                    f"{folder}: got one data set without splits, expected a split {split!r}: save "
                    "a DatasetDict, or give the files of the splits"
                )
            return saved
        if split not in saved:
            raise FileNotFoundError(
                f"{folder}: got no split {split!r}, expected one of {list(saved)}: choose one"
            )
        return saved[split]
    names = next((group for group in _SPLIT_NAMES if split in group), ())
    for name in (split, *names):
        found = [folder / f"{name}{suffix}" for suffix in KNOWN_SUFFIXES]
        found = [path for path in found if path.is_file()]
        if len(found) > 1:
            raise ValueError(
                f"{folder}: got {[path.name for path in found]} for split {split!r}, expected one "
                "file: give the path of the one you mean"
            )
        if found:
            return read_file(found[0])
    raise FileNotFoundError(
        f"{folder}: got no file for split {split!r}, expected {split} with one of "
        f"{', '.join(KNOWN_SUFFIXES)}: rename the file or give its path"
    )


def _load_hub(name: str, split: str) -> Dataset:
    from datasets import load_dataset

    first, second, *config = name.split("/")
    if first in _BUILDERS and not config:
        path, config = _BUILDERS[first], [second]
    else:
        path = f"{first}/{second}"
    try:
        return load_dataset(path, *config, split=split)
    except ValueError as error:
        if "split" not in str(error):
            raise
        raise FileNotFoundError(
            f"{name}: got no split {split!r}: {' '.join(str(error).split())}"
        ) from error
    except OSError as error:  # Not found, no connection, offline: all of them are OSErrors.
        raise FileNotFoundError(
            f"got {name!r}, which is neither a file nor a folder here nor reachable on the hub "
            f"({type(error).__name__}), expected an existing one: check name and connection"
        ) from error
