"""The user's collator, with rows of a cache in place of the text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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
_CHANGED = (
    "The data collator (or the data set, when it was read again) gave other token ids, types, "
    "positions or masks than those that the cached rows were computed from, expected the same; a "
    "collator or data set that changes text, as masking at random does, must train without "
    "activation_cache."
)


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


@dataclass
class Flat:
    """Texts one after another, without padding, and what else examples hold.

    Attributes:
        names: of all, in the order of the examples.
        lengths: int64 [B].
        texts: of TEXT, int64 [T] each; without attention_mask where all of it is one.
        numbers: one a text, [B] each.
    """

    names: list[str]
    lengths: np.ndarray
    texts: dict[str, np.ndarray]
    numbers: dict[str, Tensor]


def flat(examples: list, names: Collection[str] | None = None) -> Flat | None:
    """Texts as lists of numbers, and numbers, of examples; None for examples that hold anything
    else.

    Args:
        examples: dictionaries with the same names.
        names: those that count; None: all.
    """
    first = examples[0]
    # (Trainer takes columns away from dictionaries alone.)
    if not isinstance(first, Mapping if names is None else dict):
        return None
    if type(first.get("input_ids")) is not list:
        return None
    kind, keys = type(first), first.keys()
    if any(type(e) is not kind or e.keys() != keys for e in examples):
        return None
    lengths = np.array([len(e["input_ids"]) for e in examples])
    sizes, total = lengths.tolist(), int(lengths.sum())
    found = Flat([n for n in first if names is None or n in names], lengths, {}, {})
    for name in found.names:
        values = [e[name] for e in examples]
        if name in _FLAT:
            if any(type(v) is not list or len(v) != n for v, n in zip(values, sizes)):  # noqa: B905
                return None
            if name == "attention_mask" and all(v.count(1) == len(v) for v in values):
                continue
            if name == "token_type_ids" and not any(map(any, values)):
                found.texts[name] = np.zeros(total, np.int64)
                continue
            found.texts[name] = np.fromiter(chain.from_iterable(values), np.int64, total)
        elif all(type(v) in (int, float, bool) for v in values):
            found.numbers[name] = torch.tensor(values)
        else:
            return None
    return found


_FLAT = ("input_ids", "attention_mask", "token_type_ids")  # as tokenizers pad them


class Padding:
    """What DataCollatorWithPadding gives for texts as lists of numbers, made at once: tokenizers
    walk through every number in Python, which takes a tenth of a step from the cache.

    Args:
        stock: the collator, which is asked for everything else.
        names: columns of the examples that it gets; None: all.
    """

    def __init__(self, stock: DataCollatorWithPadding, names: Collection[str] | None = None):
        self.stock, self.names = stock, names

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
        return self.stock(examples) if batch is None else _renamed(batch)

    def flat(self, examples: list) -> tuple[Flat, dict[str, Tensor]] | None:
        """The batch without padding, and what is no text of it; None where tokens are masked out,
        or examples hold other things than numbers.
        """
        tokenizer = self.stock.tokenizer
        found = flat(examples, self.names)
        if found is None or tokenizer.pad_token_id is None:
            return None
        if "attention_mask" not in (*found.names, *tokenizer.model_input_names):
            return None  # the model sees padding
        if "attention_mask" in found.texts or any(name in found.numbers for name in TEXT):
            return None
        return found, _renamed(found.numbers)


def _renamed(batch: dict) -> dict:
    """As DataCollatorWithPadding names labels."""
    for name in ("label", "label_ids"):
        if name in batch:
            batch["labels"] = batch.pop(name)
    return batch


def pad(examples: list, tokenizer) -> dict[str, Tensor] | None:
    """Texts and numbers of examples as tensors, int64 [B, S] and [B], as `tokenizer.pad` gives
    them with `return_tensors="pt"`; None for examples that hold anything else.
    """
    fills = {
        "input_ids": tokenizer.pad_token_id,
        "attention_mask": 0,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
    }
    found = None if fills["input_ids"] is None else flat(examples)
    if found is None:
        return None
    lengths = found.lengths
    shape = (len(examples), int(lengths.max()))
    place = np.arange(shape[1])
    if tokenizer.padding_side == "left":
        mask = place >= shape[1] - lengths[:, None]
    else:
        mask = place < lengths[:, None]
    batch = {}
    for name in found.names:
        if name in found.numbers:
            batch[name] = found.numbers[name]
            continue
        full = np.full(shape, fills[name], np.int64)
        full[mask] = found.texts.get(name, 1)
        batch[name] = torch.from_numpy(full)
    if "attention_mask" not in batch and "attention_mask" in tokenizer.model_input_names:
        batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
    return batch


class CachedCollator:
    """Makes batches of the items of a CachedDataset: the user's, with rows in place of the text.

    Args:
        collator: the user's; gets the examples as from the data set itself.
        quick: gives what the collator gives, without padding, where that is known; or None.
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
        quick: Padding | None = None,
    ):
        self.collator, self.cache, self.ahead, self.quick = collator, cache, ahead, quick
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
        examples = [example for _, example in items]
        cache, ahead = self.cache, self.ahead
        if get_worker_info() is not None:
            # A fork shares files, locks and a GPU with its parent, so each worker has its own.
            self._own = self._own or cache.reopen()
            cache, ahead = self._own, None
        rows = cache.find(keys)
        if (rows < 0).any():
            cache.read(keys)  # says what is missing
        # (Places in the text are counted with padding on the left, which is refused.)
        quick = None if self.quick is None or self.labels.places else self.quick.flat(examples)
        out = {CACHED: None}
        if quick is not None:
            texts, numbers = quick
            self._check_text(texts.lengths, texts.texts, cache, rows)
            out.update((name, value) for name, value in numbers.items() if name not in TEXT)
        else:
            out.update(self._collated(examples, cache, rows))
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

    def _collated(self, examples: list, cache, rows: np.ndarray) -> dict:
        """What the user's collator gives beside the text, in the form of the cache's batches."""
        batch = self.collator(examples)
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"The data collator gave {got}, expected a mapping with `input_ids` as a tensor "
                "[B, S], which are compared with the cache's; leave the text in the batch, or "
                "train without activation_cache."
            )
        mask = mask_of(batch)
        if mask.dim() != 2 or len(mask) != len(rows):
            raise ValueError(_CHANGED)
        texts = {}
        for name in ("input_ids", "token_type_ids", "position_ids"):
            value = batch.get(name)
            if isinstance(value, Tensor):
                # (Ids in another form are those of no text.)
                texts[name] = value[mask].numpy() if value.shape == mask.shape else None
        self._check_text(mask.sum(1).numpy(), texts, cache, rows)
        out = {name: value for name, value in batch.items() if name not in TEXT}
        self._align(out, mask, cache.lengths[rows])
        if self.labels.readout and READOUT not in out:
            place = find_readout(batch.get("labels"), mask, self.labels.causal)
            if place is not None:
                out[READOUT] = place
        return out

    def _check_text(self, lengths: np.ndarray, texts: Mapping, cache, rows: np.ndarray) -> None:
        """Raises ValueError unless texts are, token by token, what the rows are of.

        Args:
            lengths: of each text.
            texts: of TEXT, one number a token, [T]; None: in no form that can be.
        """
        table = cache.table
        none = {"input_ids": -1, "position_ids": -1}
        if self.text.takes_types:
            none["token_type_ids"] = 0 if self.text.zero_types else -1
        same = np.array_equal(lengths, table.length[rows])
        tokens = table.tokens_of(rows) if same else None
        for name, missing in none.items():
            # A number stands for all tokens of texts without such ids.
            given, kept = texts.get(name, missing), getattr(table, name)
            if not same or given is None:
                raise ValueError(_CHANGED)
            kept = missing if kept is None else kept[tokens].astype(np.int64)
            same = bool(np.all(given == np.where(kept == -1, missing, kept)))
        if not same:
            raise ValueError(_CHANGED)

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
