"""Data from files, folders or the hub as `datasets.Dataset`, with labels checked and encoded.

Nothing is cached (a changed file is read anew), the text "null" or "NA" stays text, and stray
quotes in TSV stay what they are (`files`). What a label is: `labels`.
Rows in messages are counted from 1; a header is not a row. Where rows are lines of a file, the
line stands beside it, as an editor counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .labels import RULE, NoLabel, label_text
from .messages import Origin, sentence, shown, some, with_source
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
        the rows, with all their columns (but those that `datasets` has no type for). CSV and TSV
        give strings.

    Raises:
        FileNotFoundError: no such file, split file or hub dataset.
        ValueError: unknown kind of file, no rows, no such column, a row without text or label, a
            label that is none (see `labels`), or text that cannot be parsed.
    """
    dataset, unfit, origin = _load(source, split)
    available = [*dataset.column_names, *unfit]
    if not available or not (unfit or len(dataset)):
        raise ValueError(
            sentence(
                origin.source,
                "no rows",
                "one or more",
                "check that the file holds data after its header",
            )
        )
    columns = _text_column_names(origin.source, text_columns, available)
    for column in [*columns, *([label_column] if label_column else [])]:
        if column not in available:
            raise _no_column(origin, column, available)
        if column in unfit:
            raise ValueError(
                sentence(
                    origin.source,
                    unfit[column],
                    "values of one plain kind",
                    "make them alike, or name another column",
                )
            )
    _check_texts(origin, dataset, columns)
    if label_column:
        label_keys(dataset, label_column, origin=origin)
    return sample_rows(dataset, max_samples, seed)


def sample_rows(dataset: Dataset, max_samples: int | None, seed: int) -> Dataset:
    """A random sample of `max_samples` rows in their order; None: all.

    Raises:
        ValueError: max_samples below 1.
    """
    import numpy as np

    if max_samples is not None:
        if max_samples < 1:
            raise ValueError(
                f"got max_samples={max_samples}, expected 1 or more, or None for all rows: raise it"
            )
        if max_samples < len(dataset):
            rows = np.random.default_rng(seed).permutation(len(dataset))[:max_samples]
            dataset = dataset.select(np.sort(rows).tolist())
    return dataset


def origin_of(source: str | Path, split: str | None = None) -> Origin:
    """Where the rows of `read_split(source, split=split)` come from: the file, where it is one.

    Raises:
        FileNotFoundError, ValueError: a folder without one file for the split.
    """
    from .files import line_of

    path = Path(source).expanduser()
    if path.is_dir() and not _is_saved(path):
        path = _split_file(path, split or "train")
    if path.is_file():
        return Origin(str(path), line=lambda row: line_of(path, row))
    return Origin(str(source))


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
    origin: Origin | None = None,
) -> Dataset:
    """Add the integer column "labels" [N]: the place of each row's label in `names`.

    Labels are compared as text, so 1 and "1" are the same label.

    Args:
        names: of the training data (`label_names`) or the task (`TaskSpec.labels`).
        label_ids: integer in the data -> name (`TaskSpec.hub_label_ids`), for hub data.
        origin: of the rows, for messages.

    Raises:
        ValueError: a label that is not in `names`, two names that are one label, a row without a
            label, or another column of the name "labels".
    """
    origin = origin or Origin()
    if "labels" in dataset.column_names and label_column != "labels":
        raise ValueError(
            sentence(
                origin.source,
                f"a column 'labels' already beside {shown(label_column)}",
                "that name to be free",
                "rename or remove it",
            )
        )
    names = [str(name) for name in names]
    place = {_name_key(name): i for i, name in enumerate(names)}
    if len(place) < len(names):
        raise ValueError(
            sentence(
                origin.source,
                f"the class names {some(names)}",
                "a different label for each (spaces around one, and .0, do not count)",
                "rename one",
            )
        )
    ids = []
    for row, key in enumerate(label_keys(dataset, label_column, label_ids, origin)):
        if key not in place:
            raise ValueError(
                sentence(
                    origin.source,
                    f"the label {shown(key)} in {origin.row(row)}",
                    f"one of {some(names)}",
                    "correct the row, or train with data that has this label",
                )
            )
        ids.append(place[key])
    if label_column == "labels":
        dataset = dataset.remove_columns("labels")
    return dataset.add_column("labels", ids)


def label_keys(
    dataset: Dataset,
    label_column: str,
    label_ids: Mapping[int, str] | None = None,
    origin: Origin | None = None,
) -> list[str]:
    """Each row's label as text, by the rule of `labels`: [N] names.

    Raises:
        ValueError: no such column, a row without a label, or one that is none.
    """
    origin = origin or Origin()
    if label_column not in dataset.column_names:
        raise _no_column(origin, label_column, dataset.column_names)
    names = getattr(dataset.features[label_column], "names", None)
    given = {str(number): name for number, name in (label_ids or {}).items()}
    keys = []
    for row, value in enumerate(dataset[label_column]):
        try:
            # A negative ClassLabel: the hub's mark for hidden test labels.
            if names and isinstance(value, int) and value < 0:
                raise NoLabel(f"no label ({value})", missing=True)
            key = label_text(value)
        except NoLabel as error:
            column = f"in {origin.row(row, label_column)}"
            wanted = "one in every row" if error.missing else RULE
            way_out = "give each class a name or a whole number"
            if error.missing:
                way_out = "fill or drop the row, or choose a labelled split"
            raise ValueError(
                sentence(origin.source, f"{error} {column}", wanted, way_out)
            ) from None
        if key in given and key not in given.values():
            keys.append(given[key])
        else:
            keys.append(_name_key(names[value]) if names else key)
    return keys


def _name_key(name: str) -> str:
    """How the label of this class reads in data."""
    try:
        return label_text(name)
    except NoLabel:  # A class of a hub dataset may have any name.
        return name


def _no_column(origin: Origin, column: str, available: list[str]) -> ValueError:
    return ValueError(
        sentence(
            origin.source,
            f"no column {shown(column)}",
            f"it among {some(available)}",
            "correct the name or the header",
        )
    )


def _text_column_names(
    source: str, text_columns: TaskSpec | str | Sequence[str] | None, available: list[str]
) -> list[str]:
    if isinstance(text_columns, TaskSpec):
        try:
            return list(text_columns.resolve_columns(available).values())
        except ValueError as error:
            raise ValueError(with_source(source, str(error))) from error
    if isinstance(text_columns, str):
        return [text_columns]
    return list(text_columns or ())


def _check_texts(origin: Origin, dataset: Dataset, columns: list[str]) -> None:
    if not columns:
        return
    for row, texts in enumerate(zip(*(dataset[c] for c in columns), strict=True)):
        wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is None and any(text.strip() for text in texts):
            continue
        got, column = ("an empty text", 0) if wrong is None else (shown(texts[wrong]), wrong)
        raise ValueError(
            sentence(
                origin.source,
                f"{got} in {origin.row(row, columns[column])}",
                "text",
                "fill or drop the row",
            )
        )


def _load(source: str | Path, split: str | None) -> tuple[Dataset, dict[str, str], Origin]:
    from .files import KNOWN_SUFFIXES, read_file

    origin, path = origin_of(source, split), Path(source).expanduser()
    if path.is_file() or (path.is_dir() and not _is_saved(path)):
        return *read_file(Path(origin.source)), origin
    if path.is_dir():
        return _load_saved(path, split or "train"), {}, origin
    parts = str(source).split("/")
    is_hub = isinstance(source, str) and len(parts) in (2, 3) and all(parts) and parts[0] != ".."
    if not is_hub or path.suffix.lower() in KNOWN_SUFFIXES or str(source).startswith((".", "~")):
        raise FileNotFoundError(
            f"got {str(source)!r}, which does not exist, expected a file, a folder or a hub name "
            "like 'glue/sst2': check the path"
        )
    return _load_hub(str(source), split or "train"), {}, origin


def _is_saved(folder: Path) -> bool:
    """Written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _load_saved(folder: Path, split: str) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(folder))
    if not isinstance(saved, DatasetDict):
        # One data set is one split; to give it for another would test on the training rows.
        if split != "train":
            raise FileNotFoundError(
                sentence(
                    folder,
                    "one data set without splits",
                    f"a split {split!r}",
                    "save a DatasetDict, or give the files of the splits",
                )
            )
        return saved
    if split not in saved:
        raise FileNotFoundError(
            sentence(folder, f"no split {split!r}", f"one of {some(saved)}", "choose one")
        )
    return saved[split]


def _split_file(folder: Path, split: str) -> Path:
    from .files import KNOWN_SUFFIXES

    names = next((group for group in _SPLIT_NAMES if split in group), ())
    for name in (split, *names):
        found = [folder / f"{name}{suffix}" for suffix in KNOWN_SUFFIXES]
        found = [path for path in found if path.is_file()]
        if len(found) > 1:
            raise ValueError(
                sentence(
                    folder,
                    f"{some(path.name for path in found)} for split {split!r}",
                    "one file",
                    "give the path of the one you mean",
                )
            )
        if found:
            return found[0]
    raise FileNotFoundError(
        sentence(
            folder,
            f"no file for split {split!r}",
            f"{split} with one of {', '.join(KNOWN_SUFFIXES)}",
            "rename the file or give its path",
        )
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
            sentence(name, f"no split {split!r} ({error})", "one that it has", "choose another")
        ) from error
    except OSError as error:  # Not found, no connection, offline: all of them are OSErrors.
        raise FileNotFoundError(
            f"got {name!r}, which is neither a file nor a folder here nor reachable on the hub "
            f"({type(error).__name__}), expected an existing one: check name and connection"
        ) from error
