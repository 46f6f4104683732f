"""Key -> row: all rows of an open cache, in memory (40 bytes a row, and the token ids)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .shard import Tables


class KeyTable:
    """128-bit keys, sorted, with the number of the row that each names.

    Args:
        keys: uint64 [N, 2]; of equal keys the first row counts.
    """

    def __init__(self, keys: np.ndarray):
        keys = np.ascontiguousarray(keys, np.uint64).reshape(-1, 2)
        order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0]))
        self._high, self._low = keys[order, 0], keys[order, 1]
        self._row = order.astype(np.int64)

    def __len__(self) -> int:
        return len(self._row)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Row of each key, int64 [B]; -1 where there is none."""
        high, low = np.ascontiguousarray(keys[:, 0]), keys[:, 1]
        found = np.full(len(keys), -1, dtype=np.int64)
        if len(self) == 0:
            return found
        place = np.searchsorted(self._high, high)
        open_ = np.arange(len(keys))
        # Two keys share their first half by accident once in 2^64 pairs: the loop runs once.
        while len(open_):
            open_ = open_[place[open_] < len(self)]
            open_ = open_[self._high[place[open_]] == high[open_]]
            match = self._low[place[open_]] == low[open_]
            found[open_[match]] = self._row[place[open_[match]]]
            open_ = open_[~match]
            place[open_] += 1
        return found


@dataclass(frozen=True, eq=False)
class RowTable:
    """Where every row of a cache is.

    Attributes:
        names: of the shards.
        shard: int32 [N], number of each row's shard.
        offset: int64 [N], byte in the shard where its hidden states begin.
        length: int64 [N], tokens.
        hash: uint64 [N], xxh3_64 of its bytes.
        key: uint64 [N, 2].
        token: int64 [N], first token of each row in the arrays of tokens.
        input_ids: integers [T] of all rows.
        token_type_ids, position_ids: int32 [T], -1 in rows without them; None where no row has
            them.
        token_scale: float32 [T] of 8-bit stores.
    """

    names: list[str]
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    hash: np.ndarray
    key: np.ndarray
    token: np.ndarray
    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    position_ids: np.ndarray | None
    token_scale: np.ndarray | None

    def __len__(self) -> int:
        return len(self.length)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @classmethod
    def of(cls, shards: list[tuple[str, Tables]]) -> RowTable:
        """Of shards in this order; rows are numbered through."""

        def joined(parts: list[np.ndarray], dtype) -> np.ndarray:
            return np.concatenate(parts) if parts else np.zeros(0, dtype)

        def optional(name: str) -> np.ndarray | None:
            parts = [getattr(t, name) for _, t in shards]
            if all(part is None for part in parts):
                return None
            return np.concatenate(
                [
                    np.full(t.layout.tokens, -1, np.int32) if part is None else part
                    for part, (_, t) in zip(parts, shards, strict=True)
                ]
            )

        offsets = []
        for _, tables in shards:
            before = np.concatenate([[0], tables.lengths.cumsum()[:-1]])
            offsets.append(tables.layout.hidden_offset + before * tables.layout.token_bytes)
        length = joined([t.lengths for _, t in shards], np.int64)
        return cls(
            names=[name for name, _ in shards],
            shard=np.repeat(
                np.arange(len(shards), dtype=np.int32), [len(t.lengths) for _, t in shards]
            ),
            offset=joined(offsets, np.int64),
            length=length,
            hash=joined([t.row_hash for _, t in shards], np.uint64),
            key=joined([t.row_key for _, t in shards], np.uint64).reshape(-1, 2),
            token=np.concatenate([[0], length.cumsum()])[:-1],
            input_ids=joined([t.input_ids for _, t in shards], np.uint16),
            token_type_ids=optional("token_type_ids"),
            position_ids=optional("position_ids"),
            token_scale=(
                np.concatenate([t.token_scale for _, t in shards])
                if shards and shards[0][1].token_scale is not None
                else None
            ),
        )

    def tokens_of(self, rows: np.ndarray) -> np.ndarray:
        """Places in the arrays of tokens of all tokens of `rows`, int64 [T]."""
        lengths = self.length[rows]
        ends = lengths.cumsum()
        shift = np.repeat(self.token[rows] - (ends - lengths), lengths)
        return np.arange(len(shift)) + shift
