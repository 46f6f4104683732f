"""TaskSpec: a task as data. Which columns hold the text, the template, a word for each label."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .messages import shown, some

METRICS = ("accuracy", "f1", "matthews_correlation")
MASK_FIELD = "mask"


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """Split a template into (literal text, name of the field after it or None at the end) pairs.

    Raises:
        ValueError: unbalanced braces, `{}` without a name, or a conversion or format such as
            `{text!r}`.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"got the template {template!r}, which cannot be parsed ({error}), expected fields "
            "like {text} and {mask}: write a literal brace twice, as {{ or }}"
        ) from error
    for _, name, spec, conversion in parsed:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise ValueError(
                f"got the field {{{name}}} with a format, an index or no plain name in the "
                f"template {template!r}, expected a column name: write it as {{column}}"
            )
    return [(literal, name) for literal, name, _, _ in parsed]


@dataclass(frozen=True)
class TaskSpec:
    """One classification task as a cloze.

    Args:
        name: short name, for messages and folders.
        text_columns: canonical names of the one or two text columns.
        template: text with each `{column}` once and `{mask}` once, for masked models.
        label_words: label -> the one word that stands for it, in the order of the class ids.
        metric: the headline figure: "accuracy", "f1" or "matthews_correlation".
        decoder_template: text with each `{column}` once, for causal models: the label word is the
            next token after its end. None: the task has no causal form.
        hub_name: "owner/name" or "builder/config" on the Hugging Face hub, or None.
        hub_columns: names of `text_columns` on the hub, in the same order, where they differ.
        hub_label_ids: integer label on the hub -> label, or None.

    Raises:
        ValueError: any of the above does not hold.
    """

    name: str
    text_columns: tuple[str, ...]
    template: str
    label_words: Mapping[str, str] = field(hash=False)
    metric: str = "accuracy"
    decoder_template: str | None = None
    hub_name: str | None = None
    hub_columns: tuple[str, ...] = ()
    hub_label_ids: Mapping[int, str] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        where = f"task {self.name!r}"
        columns = self.text_columns
        # Own copies, and plain dicts: a spec travels to the workers of Dataset.map and DataLoader.
        object.__setattr__(self, "label_words", dict(self.label_words))
        if self.hub_label_ids is not None:
            object.__setattr__(self, "hub_label_ids", dict(self.hub_label_ids))
        if len(columns) not in (1, 2) or len(set(columns)) != len(columns):
            raise ValueError(
                f"{where}: got text_columns {list(columns)}, expected one or two different column "
                "names: join further columns into one in the data"
            )
        for column in columns:
            if not column.isidentifier() or column == MASK_FIELD:
                raise ValueError(
                    f"{where}: got the text column {column!r}, expected a plain name other than "
                    f"{MASK_FIELD!r} (letters, digits, underscores): rename the column"
                )
        if self.hub_columns and len(self.hub_columns) != len(columns):
            raise ValueError(
                f"{where}: got hub_columns {self.hub_columns}, expected one for each text column"
                ": name every column"
            )
        self._check_template("template", self.template, masks=1)
        if self.decoder_template is not None:
            self._check_template("decoder_template", self.decoder_template, masks=0)
            if self.decoder_template.endswith((" ", "\t")):
                # BPE glues the space to the word after it: "was" + " great", not "was " + "great".
                raise ValueError(
                    f"{where}: got the decoder_template {self.decoder_template!r}, expected no "
                    "space at its end because the space belongs to the label word: remove it"
                )
        if len(self.label_words) < 2:
            raise ValueError(
                f"{where}: got {len(self.label_words)} label word(s), expected two or more: give "
                "every label its word under label_words"
            )
        for label, word in self.label_words.items():
            if not word or word != word.strip():
                raise ValueError(
                    f"{where}: got the label word {word!r} for label {label!r}, expected a word "
                    "without spaces around it: the leading space is added where the template has it"
                )
        if self.metric not in METRICS:
            raise ValueError(
                f"{where}: got metric {self.metric!r}, expected one of {', '.join(METRICS)}: "
                "choose one of them (all are computed)"
            )

    def _check_template(self, key: str, template: str, masks: int) -> None:
        where = f"task {self.name!r}"
        try:
            fields = [name for _, name in template_parts(template) if name is not None]
        except ValueError as error:
            raise ValueError(f"{where}, {key}: {error}") from error
        if fields.count(MASK_FIELD) != masks:
            expected = "exactly one" if masks else "none (the label word follows its end)"
            way_out = "put {mask} where the label word belongs" if masks else "remove {mask}"
            raise ValueError(
                f"{where}: got {fields.count(MASK_FIELD)} {{mask}} in the {key} {template!r}, "
                f"expected {expected}: {way_out}"
            )
        unknown = [f for f in fields if f != MASK_FIELD and f not in self.text_columns]
        if unknown:
            raise ValueError(
                f"{where}: got the field {{{unknown[0]}}} in the {key}, expected only the columns "
                f"{list(self.text_columns)}: correct it or add it to text_columns"
            )
        for column in self.text_columns:
            if fields.count(column) != 1:
                raise ValueError(
                    f"{where}: got {{{column}}} {fields.count(column)} times in the {key} "
                    f"{template!r}, expected once: use every text column exactly once"
                )

    @property
    def labels(self) -> list[str]:
        """The labels in the order of their class ids."""
        return list(self.label_words)

    def resolve_columns(self, available: Iterable[str]) -> dict[str, str]:
        """Map each canonical text column to its name in the data (its own or the hub's).

        Raises:
            ValueError: a column is there under neither name.
        """
        available = list(available)
        # All by one naming: QNLI's hub column "sentence" must not mix with another's "sentence1".
        for names in (self.text_columns, self.hub_columns):
            if names and all(name in available for name in names):
                return dict(zip(self.text_columns, names, strict=True))
        known = " or ".join(str(list(n)) for n in (self.text_columns, self.hub_columns) if n)
        raise ValueError(
            f"task {self.name!r}: got the columns {some(available)}, expected {known}: rename "
            "the columns"
        )

    def fields(self, example: Mapping[str, Any]) -> dict[str, str]:
        """The texts of one example by canonical column name.

        Raises:
            ValueError: a column is missing or its value is no string.
        """
        texts = {}
        for column, actual in self.resolve_columns(example).items():
            if not isinstance(example[actual], str):
                got = f"{shown(example[actual])} in column {actual!r}"
                raise ValueError(
                    f"task {self.name!r}: got {got}, expected a string: fill or drop such rows"
                )
            texts[column] = example[actual]
        return texts
