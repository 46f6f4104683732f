"""From labelled rows to model inputs: one place for training, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..tasks import TaskSpec, encode_cloze, encode_texts, label_word_ids
from ..tasks.cloze import TextFault
from ..tasks.messages import Origin, sentence, shown, with_source
from ..train.collators import pad

RUN_FILE = "lpt_run.json"
ROW = "lpt_fast:row"  # column: number of the row where it comes from


@dataclass
class Formulation:
    """How texts become inputs and outputs become labels. Saved beside the adapter, so that
    prediction does the same.

    Attributes:
        labels: names of the classes, in the order of their ids.
        text_columns: one or two columns; None: the task's own, by their canonical or hub names.
        label_column: column of the label.
        max_length: most tokens of an example.
        cloze: a causal or masked model predicts label words, instead of a head classes.
        causal: the model is a decoder.
        task: TaskSpec with template and label words; needed for cloze.
        model: name or folder of the base model.
        method: what was trained.
        dtype: of the base model, by name.
    """

    labels: list[str]
    text_columns: list[str] | None
    label_column: str
    max_length: int
    cloze: bool
    causal: bool
    task: TaskSpec | None
    model: str
    method: str = "lpt"
    dtype: str = "float32"

    def to_json(self) -> dict[str, Any]:
        out = asdict(self) | {"task": None}
        if self.task is not None:
            task = asdict(self.task)
            task["label_words"] = dict(self.task.label_words)
            ids = self.task.hub_label_ids
            task["hub_label_ids"] = None if ids is None else {str(k): v for k, v in ids.items()}
            out["task"] = task
        return out

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Formulation:
        content = dict(content)
        task = content.get("task")
        if task is not None:
            task = dict(
                task,
                text_columns=tuple(task["text_columns"]),
                hub_columns=tuple(task["hub_columns"]),
            )
            if task["hub_label_ids"] is not None:
                task["hub_label_ids"] = {int(k): v for k, v in task["hub_label_ids"].items()}
            content["task"] = TaskSpec(**task)
        return cls(**content)

    @property
    def template(self) -> str | None:
        if self.task is None:
            return None
        return self.task.decoder_template if self.causal else self.task.template

    def word_ids(self, tokenizer) -> list[int]:
        """Token ids of the label words, in the order of `labels`."""
        return label_word_ids(
            tokenizer, {n: self.task.label_words[n] for n in self.labels}, self.template
        )

    def encode(
        self,
        tokenizer,
        rows: Mapping[str, Sequence],
        labels: Sequence[int] | None,
        origin: Origin | None = None,
    ) -> list[dict]:
        """Inputs of a model, one dict an example, not padded.

        Args:
            tokenizer: of the base model.
            rows: text column -> values, as `read_rows` gives them.
            labels: class ids, or None for prediction.
            origin: of the rows, for messages.

        Returns:
            input_ids, attention_mask, (token_type_ids), and `labels`: the class id, or for cloze
            the label word's id at its place and -100 elsewhere; for cloze also `readout`, the
            position whose logits count, and for causal models `context_lengths`.

        Raises:
            ValueError: a text that the tokenizer makes no token of (such as a zero-width space), or
                one that holds the mask token; names its row.
        """
        origin = origin or Origin()
        if not self.cloze:
            encoded = encode_texts(tokenizer, list(rows), rows, self.max_length)
            size = len(encoded["input_ids"])
            special = tokenizer.num_special_tokens_to_add(pair=len(rows) > 1)
            for i, ids in enumerate(encoded["input_ids"]):
                if len(ids) <= special:
                    raise _no_token(origin, i, [values[i] for values in rows.values()])
            examples = [{key: values[i] for key, values in encoded.items()} for i in range(size)]
            for i, example in enumerate(examples):
                if labels is not None:
                    example["labels"] = labels[i]
            return examples
        words = self.word_ids(tokenizer)
        examples = []
        for values in zip(*rows.values(), strict=True):
            row = dict(zip(rows, values, strict=True))
            # (Beside the template's own tokens, so each is asked alone; letters have one always.)
            if not any(c.isalnum() for text in values for c in text) and not any(
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in values
            ):
                raise _no_token(origin, len(examples), values)
            # A causal model needs a place for the answer behind the context.
            room = self.max_length - 1 if self.causal else self.max_length
            try:
                example = encode_cloze(tokenizer, self.task, row, room, decoder=self.causal)
            except TextFault as error:
                where = f"{origin.row(len(examples))}: {error}"
                raise ValueError(with_source(origin.source, where)) from None
            length = len(example["input_ids"])
            example["readout"] = length - 1 if self.causal else example.pop("mask_position")
            if labels is not None:
                word = words[labels[len(examples)]]
                target = [-100] * length
                if self.causal:
                    for key, extra in (
                        ("input_ids", word),
                        ("attention_mask", 1),
                        ("token_type_ids", 0),
                    ):
                        if key in example:
                            example[key] = [*example[key], extra]
                    target.append(word)
                else:
                    target[example["readout"]] = word
                example["labels"] = target
            examples.append(example)
        return examples


def _no_token(origin: Origin, index: int, texts: Sequence[str]) -> ValueError:
    got = f"a text without a token ({shown(' '.join(texts))}) in {origin.row(index)}"
    return ValueError(sentence(origin.source, got, "one token or more", "fill or drop the row"))


class Collator:
    """Pads a list of examples of `Formulation.encode` to a batch of tensors.

    Args:
        tokenizer: says with what and on which side to pad.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        texts = [{name: e[name] for name in names if name in e} for e in examples]
        batch = pad(texts, self.tokenizer)
        if batch is None:
            batch = dict(self.tokenizer.pad(texts, padding=True, return_tensors="pt"))
        length = batch["input_ids"].shape[1]
        left = self.tokenizer.padding_side == "left"
        if "labels" in examples[0]:
            labels = [e["labels"] for e in examples]
            if isinstance(labels[0], list):
                filled = [[-100] * (length - len(row)) for row in labels]
                labels = [
                    [*pad, *row] if left else [*row, *pad]
                    for pad, row in zip(filled, labels, strict=True)
                ]
            batch["labels"] = torch.tensor(labels)
        if "context_lengths" in examples[0]:
            batch["context_lengths"] = torch.tensor([e["context_lengths"] for e in examples])
        return batch


def load_tokenizer(name: str):
    """The tokenizer of a model, with a pad token.

    Decoders come without one; theirs is then the end token, which changes nothing, for the
    attention mask says what is padding.

    Raises:
        ValueError: for a model that cannot be found, or a tokenizer with neither a pad nor an end
            token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load("tokenizer", name, error)) from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer of {name} has neither a pad token nor an end token to pad with; "
                "set one in its tokenizer_config.json (`pad_token`)."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def cannot_load(what: str, name: str, error: Exception) -> str:
    """One sentence for the several that transformers prints when it finds nothing."""
    first = next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
    where = "" if Path(name).exists() else " (there is no such local folder, and the hub gave none)"
    return f"Cannot load the {what} of {name!r}{where}: {first}"


def checked_max_length(asked: int | None, limit: int, model: str, tokenizer) -> int:
    """Most tokens of an example: what was asked for, else 128 or what the model takes.

    Args:
        asked: `--max_length`, or None.
        limit: what the model takes.
        model: its name, for messages.
        tokenizer: of the model.

    Raises:
        ValueError: more than the model takes, or no room for text.
    """
    if asked is not None and asked > limit:
        raise ValueError(
            f"`--max_length` is {asked}, but {model} takes {limit} tokens; give at most {limit}."
        )
    least = tokenizer.num_special_tokens_to_add(pair=False) + 1
    if asked is not None and asked < least:
        raise ValueError(
            f"`--max_length` is {asked}, which leaves no room for text beside the special tokens; "
            f"give at least {least}."
        )
    return asked or min(128, limit)


def text_columns_of(task: TaskSpec | None, text_column: str | None) -> list[str] | None:
    """The text columns as given, with a comma between two; None where a task names them; else
    'text'.

    Raises:
        ValueError: not as many columns as the task's template has texts.
    """
    if text_column is None:
        return None if task else ["text"]
    names = [name.strip() for name in text_column.split(",")]
    if task and len(names) != len(task.text_columns):
        raise ValueError(
            f"`--text_column` names {len(names)} column(s), got {text_column!r}; the task "
            f"{task.name!r} has {len(task.text_columns)}: {', '.join(task.text_columns)}."
        )
    return names


def read_rows(
    source: str,
    split: str,
    task: TaskSpec | None,
    text_columns: list[str] | None,
    label_column: str | None,
    max_samples: int | None = None,
    seed: int = 0,
):
    """One split of the data, checked.

    Args:
        source, split, max_samples, seed: as for `lpt_fast.tasks.read_split`.
        task: its canonical or hub columns count where `text_columns` is None.
        text_columns: names of the text columns.
        label_column: None for data without labels.

    Returns:
        The `datasets.Dataset` with the column ROW, its texts as {canonical column: list of str},
        and where its rows come from.
    """
    from ..tasks import read_split
    from ..tasks.readers import origin_of, sample_rows

    dataset = read_split(
        source,
        split=split,
        text_columns=text_columns or task,
        label_column=label_column,
    )
    dataset = dataset.add_column(ROW, list(range(1, len(dataset) + 1)))
    dataset = sample_rows(dataset, max_samples, seed)
    origin = origin_of(source, split).at(dataset[ROW])
    return dataset, texts_of(dataset, task, text_columns), origin


def texts_of(
    dataset, task: TaskSpec | None, text_columns: list[str] | None
) -> dict[str, list[str]]:
    """The texts of a data set as {canonical column: list of str}."""
    if task is None:
        return {name: list(dataset[name]) for name in text_columns}
    if text_columns is None:
        found = task.resolve_columns(dataset.column_names)
    else:
        found = dict(zip(task.text_columns, text_columns, strict=True))
    return {canonical: list(dataset[name]) for canonical, name in found.items()}
