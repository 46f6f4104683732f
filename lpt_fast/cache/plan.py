"""What a build will do: which texts are missing, in which shards, and how much disk they take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .folder import Folder
from .identity import Place
from .rows import DatasetKeys
from .shard import BOUNDARY, QUANTISED
from .state import State

SHARD_BYTES = 256 * 2**20
HEADER_BYTES = 1024  # that the header of a shard takes at most, and a few more


@dataclass(eq=False)
class Target:
    """A cache to fill: its state, and which texts of the data set it lacks, bool [N]."""

    place: Place
    state: State
    missing: np.ndarray | None = None

    @property
    def folder(self) -> Folder:
        return self.state.folder

    def find_missing(self, keys: DatasetKeys) -> np.ndarray:
        """First of equal texts only."""
        self.missing = keys.first & (self.state.key_table().find(keys.keys) < 0)
        return self.missing


def shard_tokens(token_bytes: int, total: int, world: int, limit: int) -> int:
    """Tokens of a shard: as many as the limit on bytes lets in; where several processes share the
    work, at least four shards each, so that they finish together.
    """
    tokens = max(1, limit // token_bytes)
    return tokens if world == 1 else max(1, min(tokens, -(-total // (4 * world))))


def plan_shards(keys: DatasetKeys, wanted: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Cuts the wanted texts into shards: rows of the data set, longest first (what does not fit in
    memory shows at once), of one kind each. The same texts give the same shards in any order.

    Args:
        keys: of the data set.
        wanted: bool [N].
        tokens: of a shard, at most (one text at least).
    """
    rows = np.flatnonzero(wanted)
    order = np.lexsort(
        (keys.keys[rows, 1], keys.keys[rows, 0], -keys.lengths[rows], keys.kinds[rows])
    )
    rows = rows[order]
    shards, start, size = [], 0, 0
    for i, row in enumerate(rows.tolist()):
        length = int(keys.lengths[row])
        new_kind = i > start and keys.kinds[row] != keys.kinds[rows[start]]
        if i > start and (size + length > tokens or new_kind):
            shards.append(rows[start:i])
            start, size = i, 0
        size += length
    if start < len(rows):
        shards.append(rows[start:])
    return shards


def bytes_needed(target: Target, keys: DatasetKeys, shard_bytes: int = SHARD_BYTES) -> int:
    """An upper bound of what the missing rows take on the disk."""
    identity = target.folder.identity
    width = identity.token_bytes
    per_token = width + 4 + 2 * (identity.store in QUANTISED)
    lengths = keys.lengths[target.missing]
    kinds = keys.kinds[target.missing]
    extra = 4 * int((lengths * ((kinds & 1) + (kinds >> 1))).sum())
    # Two shards one after another hold more than one may; a kind begins a new one.
    shards = min(len(lengths), 2 * int(lengths.sum()) * width // shard_bytes + 4)
    head = BOUNDARY + HEADER_BYTES + 4 * identity.width * (identity.store == "int8c")
    return int(lengths.sum()) * per_token + extra + 28 * len(lengths) + shards * head
