"""The texts of a tokenised data set as rows of a cache: checked, without padding, with their keys.

A row's key is blake2b over all that its hidden states depend on beside the model: token ids, token
types and positions. Texts that were added, moved or repeated keep their rows; another template or
tokenisation makes other ids and so other keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn
from torch.utils.data import IterableDataset

from ..backbone.families import Family
from ..method.context import parameter_names
from .errors import CacheError
from .shard import KEY_BYTES


@dataclass(frozen=True, eq=False)
class Text:
    """One text, tokenised: int32 [n] each, token types and positions only where they differ from
    what the model takes by itself.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray | None = None
    position_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def kind(self) -> int:
        """Which fields it has; texts of one shard have the same. Bit 0: types, bit 1: positions."""
        return (self.token_type_ids is not None) + 2 * (self.position_ids is not None)

    @property
    def key(self) -> bytes:
        """128 bits; equal for equal texts alone."""
        state = hashlib.blake2b(digest_size=KEY_BYTES, person=b"lpt_fast row 1")
        for name, values in (("i", self.input_ids), ("t", self.token_type_ids)):
            if values is not None:
                state.update(f"{name}{len(values)}:".encode())
                state.update(values.astype("<i4", copy=False).tobytes())
        if self.position_ids is not None:
            state.update(f"p{len(self.position_ids)}:".encode())
            state.update(self.position_ids.astype("<i4", copy=False).tobytes())
        return state.digest()


@dataclass(frozen=True)
class TextRules:
    """What a backbone says of the texts that it takes.

    Attributes:
        vocab_size: ids are below it; None: not known.
        max_length: most tokens of a text; None: no limit.
        zero_types: whether token types that are all zero are what the model takes by itself.
        takes_types: whether the model has token types at all.
        types, positions: token types and position ids are below it; None: not known, or no limit.
    """

    vocab_size: int | None = None
    max_length: int | None = None
    zero_types: bool = True
    takes_types: bool = True
    types: int | None = None
    positions: int | None = None

    @classmethod
    def of(cls, backbone: nn.Module, family: Family) -> TextRules:
        """Of a backbone. Decoders take token types for further words (GPT-2), which zero is too."""
        config = backbone.config
        words = getattr(config, "vocab_size", None)
        places = None if family.takes_positions else family.max_length(config)
        if places is not None:  # its own positions may begin later, a text's need not
            places = config.max_position_embeddings
        return cls(
            vocab_size=words,
            max_length=family.max_length(config),
            zero_types=not family.causal,
            takes_types="token_type_ids" in parameter_names(type(backbone).forward),
            types=words if family.causal else getattr(config, "type_vocab_size", 0) or None,
            positions=places,
        )


def _integers(row: int, name: str, values) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iu":
        got = f"{array.dtype} of the shape {list(array.shape)}"
        raise CacheError(
            f"Row {row} of the data set has `{name}` that are {got}, expected a list of one or "
            "more whole numbers; tokenise the texts one by one, without return_tensors."
        )
    return array


def _says_nothing(example: Mapping, name: str, value: int) -> bool:
    """Whether a field is a plain list of one number alone, as long as the ids. Most masks and token
    types are, and to find it out costs a tenth of making an array.
    """
    values, ids = example.get(name), example["input_ids"]
    return (
        type(values) is list
        and type(ids) is list
        and len(values) == len(ids)
        and values.count(value) == len(values)
    )


def to_text(row: int, example: Mapping, rules: TextRules) -> Text:
    """One example of a tokenised data set. Padding (attention_mask 0) is left out.

    Args:
        row: its number, for messages.
        example: `input_ids` [n], optionally `attention_mask`, `token_type_ids`, `position_ids`.
        rules: of the backbone.

    Raises:
        CacheError: no ids, ids that the model does not have, a mask with holes, a text that is
            longer than the model takes.
    """
    if not isinstance(example, Mapping) or "input_ids" not in example:
        names = sorted(map(str, example)) if isinstance(example, Mapping) else type(example)
        raise CacheError(
            f"Row {row} of the data set has no `input_ids`, got {names}; tokenise the texts first."
        )
    fields = {}
    for name in ("input_ids", "token_type_ids", "position_ids"):
        if example.get(name) is None:
            continue
        if name == "token_type_ids" and rules.zero_types and _says_nothing(example, name, 0):
            continue
        fields[name] = _integers(row, name, example[name])
    length = len(fields["input_ids"])
    mask = example.get("attention_mask")
    if mask is not None and _says_nothing(example, "attention_mask", 1):
        mask = None
    if mask is not None:
        mask = _integers(row, "attention_mask", mask)
        fields["attention_mask"] = mask
    for name, values in fields.items():
        if len(values) != length:
            raise CacheError(
                f"Row {row} of the data set has {len(values)} `{name}` for {length} tokens, "
                "expected one each."
            )
    if mask is not None:
        kept = np.flatnonzero(fields.pop("attention_mask"))
        if len(kept) == 0 or kept[-1] - kept[0] + 1 != len(kept):
            raise CacheError(
                f"Row {row} of the data set has an `attention_mask` "
                f"{'without a 1' if len(kept) == 0 else 'with holes'}, expected the tokens of one "
                "text in one piece; leave padding to the left or the right."
            )
        if len(kept) < length:
            fields = {name: values[kept] for name, values in fields.items()}
    ids = fields["input_ids"]
    top = 2**31 if rules.vocab_size is None else rules.vocab_size
    if ids.min() < 0 or ids.max() >= top:
        raise CacheError(
            f"Row {row} of the data set has the token id "
            f"{ids.min() if ids.min() < 0 else ids.max()}, expected 0 .. {top - 1}; it was "
            "tokenised for another model."
        )
    if rules.max_length is not None and len(ids) > rules.max_length:
        raise CacheError(
            f"Row {row} of the data set has {len(ids)} tokens, expected at most "
            f"{rules.max_length}, which the model takes; tokenise with truncation=True."
        )
    types = fields.get("token_type_ids")
    if types is not None and (not rules.takes_types or (rules.zero_types and not types.any())):
        fields["token_type_ids"] = None
    for name, limit in (("token_type_ids", rules.types), ("position_ids", rules.positions)):
        values = fields.get(name)
        limit = 2**31 if limit is None else limit
        if values is not None and (values.min() < 0 or values.max() >= limit):
            raise CacheError(
                f"Row {row} of the data set has the `{name}` "
                f"{values.min() if values.min() < 0 else values.max()}, expected 0 .. {limit - 1}; "
                "they were made for another model."
            )
    return Text(**{n: None if v is None else v.astype(np.int32) for n, v in fields.items()})


def iterate(dataset) -> Iterator[Mapping]:
    """The examples of a data set in order, whichever kind it is."""
    if isinstance(dataset, Mapping) or not isinstance(dataset, Sequence):
        stream = isinstance(dataset, IterableDataset)  # whose `__getitem__` only raises
        if stream or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise CacheError(
                f"The data set is a {type(dataset).__name__}, expected one with a length whose "
                "rows can be taken by number (a datasets.Dataset, a list of dicts); make a list "
                "of it."
            )
        if isinstance(dataset, Mapping):
            raise CacheError(
                "The data set is a mapping, expected rows; give one split of a DatasetDict, or a "
                "list of dicts."
            )
    for i in range(len(dataset)):
        yield dataset[i]


@dataclass(frozen=True, eq=False)
class DatasetKeys:
    """The rows of a data set, text by text.

    Attributes:
        keys: uint64 [N, 2].
        lengths: int64 [N], tokens.
        kinds: int8 [N], see Text.kind.
    """

    keys: np.ndarray
    lengths: np.ndarray
    kinds: np.ndarray

    @cached_property
    def first(self) -> np.ndarray:
        """Whether each text is the first of those that are equal to it, bool [N]."""
        first = np.zeros(len(self), bool)
        first[np.unique(self.keys, axis=0, return_index=True)[1]] = True
        return first

    def __len__(self) -> int:
        return len(self.keys)


def read_keys(dataset, rules: TextRules) -> DatasetKeys:
    """The keys of a tokenised data set.

    Raises:
        CacheError: a row that is no text for this model (see `to_text`), or no rows.
    """
    keys, lengths, kinds = bytearray(), [], []
    for row, example in enumerate(iterate(dataset)):
        text = to_text(row, example, rules)
        keys += text.key
        lengths.append(len(text))
        kinds.append(text.kind)
    if not lengths:
        raise CacheError("The data set has no rows, expected at least one text.")
    array = np.frombuffer(bytes(keys), np.uint64).reshape(-1, 2)
    return DatasetKeys(array, np.array(lengths, np.int64), np.array(kinds, np.int8))


def as_keys(keys) -> np.ndarray:
    """Keys given as a list of 16 bytes each, or uint64 [B, 2], as uint64 [B, 2]."""
    if isinstance(keys, np.ndarray):
        if keys.dtype == np.uint64 and keys.ndim == 2 and keys.shape[1] == 2:
            return keys
    elif isinstance(keys, list | tuple) and all(
        isinstance(key, bytes) and len(key) == KEY_BYTES for key in keys
    ):
        return np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)
    raise CacheError(
        f"Keys must be {KEY_BYTES} bytes each or uint64 [B, 2], got {type(keys).__name__}."
    )
