"""The user's collator, with rows of a cache in place of the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers import DataCollatorWithPadding

from ..cache import ActivationCache
from ..cache.rows import TextRules
from ..method.cached_call import CACHED
from ..method.readout import READOUT
from .cached_dataset import TEXT, PendingBatch, ReadAhead
from .projections import Projections

IGNORED = -100  # labels that losses leave out


@dataclass(frozen=True)
class LabelRules:
    """How labels of a model lie.

    Attributes:
        names: of the labels, as Trainer knows them.
        token_level: whether they are one a token, [B, S].
        places: whether they are places in the padded text (question answering).
        readout: whether the one token that has a label is said to the model.
        causal: whether a token's label is what the token before it predicts.
    """

    names: tuple[str, ...]
    token_level: bool
    places: bool
    readout: bool
    causal: bool


class WithReadout:
    """The user's collator, and which token of each text is read, where there is one.

    Args:
        collator: gives a mapping of tensors.
        causal: as of LabelRules.
    """

    def __init__(self, collator: Callable, causal: bool):
        self.collator, self.causal = collator, causal

    def __call__(self, examples: list):
        """The collator's batch, with `readout` where each text has one label."""
        batch = self.collator(examples)
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if isinstance(ids, Tensor):
            place = find_readout(batch.get("labels"), mask_of(batch), self.causal)
            if place is not None:
                batch[READOUT] = place
        return batch


class Padding:
    """What DataCollatorWithPadding gives for texts as lists of numbers, made at once: tokenizers
    walk through every number in Python, which takes a tenth of a step from the cache.

    Args:
        stock: the collator, which is asked for everything else.
    """

    def __init__(self, stock: DataCollatorWithPadding):
        self.stock = stock

    @staticmethod
    def fits(collator) -> bool:
        """Whether this collator pads as this class does."""
        return (
            type(collator) is DataCollatorWithPadding
            and collator.padding in (True, "longest")
            and collator.pad_to_multiple_of is None
            and collator.return_tensors == "pt"
        )

    def __call__(self, examples: list):
        """The batch of the stock collator."""
        batch = pad(examples, self.stock.tokenizer)
        if batch is None:
            return self.stock(examples)
        for name in ("label", "label_ids"):
            if name in batch:
                batch["labels"] = batch.pop(name)
        return batch


def pad(examples: list, tokenizer) -> dict[str, Tensor] | None:
    """Texts and numbers of examples as tensors, int64 [B, S] and [B], as `tokenizer.pad` gives
    them with `return_tensors="pt"`; None for examples that hold anything else.
    """
    first = examples[0]
    fills = {
        "input_ids": tokenizer.pad_token_id,
        "attention_mask": 0,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
    }
    if not isinstance(first, Mapping) or not isinstance(first.get("input_ids"), list):
        return None
    names = list(first)
    if fills["input_ids"] is None or any(list(e) != names for e in examples):
        return None
    lengths = np.array([len(e["input_ids"]) for e in examples])
    shape = (len(examples), int(lengths.max()))
    place = np.arange(shape[1])
    if tokenizer.padding_side == "left":
        mask = place >= shape[1] - lengths[:, None]
    else:
        mask = place < lengths[:, None]
    batch = {}
    for name in names:
        values = [e[name] for e in examples]
        if name in fills:
            if any(type(v) is not list or len(v) != n for v, n in zip(values, lengths)):  # noqa: B905
                return None
            full = np.full(shape, fills[name], np.int64)
            full[mask] = np.fromiter(chain.from_iterable(values), np.int64, int(lengths.sum()))
            batch[name] = torch.from_numpy(full)
        elif all(type(v) in (int, float, bool) for v in values):
            batch[name] = torch.tensor(values)
        else:
            return None
    if "attention_mask" not in batch and "attention_mask" in tokenizer.model_input_names:
        batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
    return batch


class CachedCollator:
    """Makes batches of the items of a CachedDataset: the user's, with rows in place of the text.

    Args:
        collator: the user's; gets the examples as from the data set itself.
        cache: of the rows.
        ahead: reads them; in the worker processes of a DataLoader they are read at once.
        text: rules of the model's texts.
        labels: how the labels lie.
        how: `room` and `dtype`, as for `ActivationCache.read`.
        projections: of the texts, or None.
    """

    def __init__(
        self,
        collator: Callable,
        cache: ActivationCache,
        ahead: ReadAhead,
        text: TextRules,
        labels: LabelRules,
        how: dict,
        projections: Projections | None = None,
    ):
        self.collator, self.cache, self.ahead = collator, cache, ahead
        self.text, self.labels, self.how = text, labels, how
        self.projections = projections
        self._own: ActivationCache | None = None

    def __getstate__(self) -> dict:
        # To worker processes that are not forks of this one; they do not read ahead, and what is
        # held stays here.
        return {**self.__dict__, "ahead": None, "_own": None, "projections": None}

    def __call__(self, items: list) -> dict:
        """`cached_hidden` and what the user's collator gives beside the text.

        Raises:
            ValueError: text that is not that of the rows, labels of padding.
            CacheError: as of `ActivationCache.read`.
        """
        keys = np.stack([key for key, _ in items])
        batch = self.collator([example for _, example in items])
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"The data collator gave {got}, expected a mapping with `input_ids` as a tensor "
                "[B, S], which are compared with the cache's; leave the text in the batch, or "
                "train without activation_cache."
            )
        cache, ahead = self.cache, self.ahead
        if get_worker_info() is not None:
            # A fork shares files, locks and a GPU with its parent, so each worker has its own.
            self._own = self._own or cache.reopen()
            cache, ahead = self._own, None
        rows = cache.find(keys)
        if (rows < 0).any():
            cache.read(keys)  # says what is missing
        mask = mask_of(batch)
        self._check_text(batch, mask, cache, rows)
        lengths = cache.lengths[rows]
        out = {CACHED: None}
        out.update((name, value) for name, value in batch.items() if name not in TEXT)
        self._align(out, mask, lengths)
        if self.labels.readout and READOUT not in out:
            place = find_readout(batch.get("labels"), mask, self.labels.causal)
            if place is not None:
                out[READOUT] = place
        if ahead is None:
            out[CACHED] = cache.read(rows, **self.how)
            return out
        out[CACHED] = batch = ahead.read(cache, rows, **self.how)
        held = None if self.projections is None else self.projections.of(keys)
        if isinstance(batch, PendingBatch):
            batch.held = held
        else:
            out[CACHED] = replace(batch, held=held)
        return out

    def _check_text(self, batch: Mapping, mask: Tensor, cache, rows: np.ndarray) -> None:
        """Raises ValueError unless the batch's text is, token by token, what the rows are of."""
        table = cache.table
        tokens = table.tokens_of(rows)
        none = {"input_ids": -1, "position_ids": -1}
        if self.text.takes_types:
            none["token_type_ids"] = 0 if self.text.zero_types else -1

        def equal(name: str) -> bool:
            given, kept = batch.get(name), getattr(table, name)
            if isinstance(given, Tensor) and given.shape != mask.shape:
                return False
            # A number stands for all tokens of texts without such ids.
            given = given[mask].numpy() if isinstance(given, Tensor) else none[name]
            kept = none[name] if kept is None else kept[tokens].astype(np.int64)
            return bool(np.all(given == np.where(kept == -1, none[name], kept)))

        same = mask.dim() == 2 and len(mask) == len(rows)
        same = same and np.array_equal(mask.sum(1).numpy(), table.length[rows])
        if not (same and all(map(equal, none))):
            raise ValueError(
                "The data collator (or the data set, when it was read again) gave other token ids, "
                "types, positions or masks than those that the cached rows were computed from, "
                "expected the same; a collator or data set that changes text, as masking at random "
                "does, must train without activation_cache."
            )

    def _align(self, out: dict, mask: Tensor, lengths: np.ndarray) -> None:
        """Brings what the collator gave for each token into the form of the cache's batches, which
        are padded on the right to the longest text.
        """
        width = int(lengths.max())
        right = torch.arange(mask.shape[1]) < torch.from_numpy(lengths)[:, None]
        padded_right = bool((right == mask).all())
        if self.labels.places and not padded_right:
            raise ValueError(
                "The data collator pads on the left and the labels are places in the text, "
                "expected padding on the right, where places count without it; set "
                "tokenizer.padding_side = 'right'."
            )
        if not self.labels.token_level:
            return
        for name, value in out.items():
            if not isinstance(value, Tensor) or value.shape[:2] != mask.shape:
                continue
            is_label = name in self.labels.names
            if is_label and bool((value[~mask] != IGNORED).any()):
                raise ValueError(
                    f"The data collator gave padding the `{name}` {int(value[~mask].max())}, "
                    f"expected {IGNORED}, which losses leave out: a cache holds no hidden states "
                    "of padding. Fill labels as DataCollatorForTokenClassification does."
                )
            if padded_right:
                out[name] = value[:, :width].contiguous()  # models call view() on labels
                continue
            shape = (len(value), width, *value.shape[2:])
            out[name] = value.new_full(shape, IGNORED if is_label else 0)
            out[name][right[:, :width]] = value[mask]


def mask_of(batch: Mapping) -> Tensor:
    """Which places of a collated batch hold tokens, bool [B, S]."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(batch["input_ids"].shape, dtype=torch.bool)
    return mask.bool()


def find_readout(labels, mask: Tensor, causal: bool) -> Tensor | None:
    """Which token of each text the model has to read, counted without padding, int64 [B]; None
    unless each text has exactly one label.

    Args:
        labels: of the batch; int64 [B, S], or something else, which has no such token.
        mask: where tokens are, bool [B, S].
        causal: whether it is the token before the one that has the label.
    """
    if not isinstance(labels, Tensor) or mask.dim() != 2 or labels.shape != mask.shape:
        return None
    given = labels != IGNORED
    if not bool((given.sum(1) == 1).all()):
        return None
    column = given.int().argmax(1, keepdim=True)
    place = (mask.long().cumsum(1) - 1).gather(1, column)[:, 0] - int(causal)
    if not bool(mask.gather(1, column).all()) or bool((place < 0).any()):
        return None
    return place
