"""Texts that `python -m bench train` trains on, and their batches.

Real ones from a folder; on a machine without texts or without a tokenizer, token ids at random with
lengths like those of a real task (bench/shapes.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import Source, batches
from ..shapes import QUANTILES, length_at

DRAWN_ROWS, DRAWN_CLASSES, DRAWN_VOCAB = 4096, 2, 30522
_FIRST_WORD = 1000  # ids below it are special or never used in WordPiece


@dataclass(frozen=True)
class Texts:
    """Tokenised texts with class numbers.

    Attributes:
        examples: input_ids and more of each, not padded.
        labels: int64 [N].
        classes: how many there are.
        origin: where they come from, in words.
        pad_id: token id of padding.
        tokenizer: that made them, or None.
    """

    examples: list[dict]
    labels: Tensor
    classes: int
    origin: str
    pad_id: int = 0
    tokenizer: object = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 [N]."""
        return np.array([len(example["input_ids"]) for example in self.examples])

    def take(self, rows: Sequence[int]) -> list[dict]:
        return [self.examples[row] for row in rows]

    def collate(self, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Inputs of a model with labels, padded on the right to the longest of `rows`."""
        chosen = self.take(rows)
        lengths = np.array([len(example["input_ids"]) for example in chosen])
        mask = np.arange(lengths.max()) < lengths[:, None]
        inputs = {"attention_mask": mask.astype(np.int64)}
        for name, fill in (("input_ids", self.pad_id), ("token_type_ids", 0)):
            if name in chosen[0]:
                inputs[name] = np.full(mask.shape, fill, np.int64)
                inputs[name][mask] = np.concatenate([example[name] for example in chosen])
        moved = {name: torch.from_numpy(value) for name, value in inputs.items()}
        moved["labels"] = self.labels[torch.as_tensor(rows)]
        return {name: value.to(device, non_blocking=True) for name, value in moved.items()}


def real_texts(source: Source, task: str, rows: int | None = None, split: str = "train") -> Texts:
    """Labelled texts of a task's file; of more than `rows`, some spread over it."""
    examples, names = source.labelled(task, split, rows)
    known = sorted({*names, *_labels_of(source.data / task / "train.tsv")})
    labels = torch.tensor([known.index(name) for name in names])
    pad = source.tokenizer.pad_token_id or 0
    return Texts(examples, labels, len(known), f"{task}/{split}.tsv", pad, source.tokenizer)


def _labels_of(path: Path) -> set[str]:
    """Of the whole file, so that splits and parts of them number them alike."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return {line.rsplit("\t", 1)[1] for line in lines}


def drawn_texts(task: str, rows: int | None = None, seed: int = 0) -> Texts:
    """Random token ids and labels in texts as long as those of a task."""
    if task not in QUANTILES:
        raise ValueError(
            f"`--task` must be one of {', '.join(QUANTILES)} without --data, got {task!r}."
        )
    draw = random.Random(f"{task} {seed}")
    ids, examples = np.random.default_rng(seed), []
    for _ in range(rows or DRAWN_ROWS):
        length = length_at(task, draw.random())
        examples.append({"input_ids": ids.integers(_FIRST_WORD, DRAWN_VOCAB, length).tolist()})
    labels = torch.from_numpy(ids.integers(0, DRAWN_CLASSES, len(examples)))
    origin = f"random token ids, lengths drawn as those of {task}"
    return Texts(examples, labels, DRAWN_CLASSES, origin)


def plan_batches(
    lengths: np.ndarray, count: int, size: int, tokens: int | None = None, seed: int = 0
) -> list[np.ndarray]:
    """The first `count` batches of epochs in random order, all of them whole.

    Args:
        lengths: tokens of each text.
        count: batches.
        size: texts of a batch.
        tokens: instead, a batch ends where the next text would make more real tokens than this.
        seed: of the first epoch; the others follow.
    """
    if tokens is None and size > len(lengths):
        raise ValueError(f"`--batch_size` is {size}, more than the {len(lengths)} texts there are.")
    if tokens is not None and tokens < lengths.max():
        raise ValueError(
            f"`--batch_tokens` is {tokens}, less than the longest text's {lengths.max()}."
        )
    chosen: list[np.ndarray] = []
    epoch = seed
    while len(chosen) < count:
        if tokens is None:
            epoch_batches = batches(len(lengths), size, epoch)
            chosen += [rows for rows in epoch_batches if len(rows) == size]
        else:
            chosen += _by_tokens(lengths, tokens, epoch)
        epoch += 1
    return chosen[:count]


def _by_tokens(lengths: np.ndarray, tokens: int, seed: int) -> list[np.ndarray]:
    """An epoch; where all texts together are fewer tokens than asked for, they come again."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    again = math.ceil(tokens / lengths.sum())
    order = np.concatenate([order] * again)
    out, begin, have = [], 0, 0
    for i, row in enumerate(order):
        if have + lengths[row] > tokens:
            out.append(order[begin:i])
            begin, have = i, 0
        have += lengths[row]
    return out or [order[begin:]]


def padding_ratio(lengths: np.ndarray, chosen: list[np.ndarray]) -> float:
    """Places of padded batches over real tokens."""
    places = sum(len(rows) * int(lengths[rows].max()) for rows in chosen)
    return places / sum(int(lengths[rows].sum()) for rows in chosen)
