"""Queries, keys and values of text rows in the first layer above the insertion, held in memory.

Those rows are constants, as the rows of a cache are, and so is what layer k+1 projects them to
(DESIGN section 4): computed once for a data set, a step only looks them up, for 6 D^2 operations a
token less. They take three times the memory of fp32 rows (with grouped heads less).
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from ..backbone.families import get_layers
from ..cache import ActivationCache
from ..cache.index import KeyTable
from ..cache.planner import amount, held_limit
from ..method.cached_call import rows_dtype
from ..packed.held import HeldRows, kind_of
from ..packed.stack import first_updated, project_first, why_padded
from ..packing import PackedBatch

logger = logging.getLogger(__name__)

TEXTS = 64  # that are projected together


class Projections:
    """What layer k+1 projects the texts of a data set to.

    Args:
        late: the LatePrompt, whose active adapter says k and m.
        cache: of layer k, on the CPU.
        keys: uint64 [N, 2], of texts that it has.
        limit: bytes that may be taken; None: any number.

    Raises:
        ValueError: it would be of no use, or take more; says why.
        CacheError: as of `ActivationCache.read`.
    """

    def __init__(self, late, cache: ActivationCache, keys: np.ndarray, limit: int | None = None):
        order = np.sort(np.unique(keys, axis=0, return_index=True)[1])
        keys = keys[order]  # each once, in their order: the same sums in every run
        rows = cache.find(keys)
        lengths = cache.lengths[rows]
        reason = why_not(late, int(lengths.max(initial=0)))
        if reason is not None:
            raise ValueError(
                f"Projections are of no use, expected layers that run packed on them: {reason}."
            )
        self._keys = KeyTable(keys)
        ends = lengths.cumsum()
        self._begins = torch.from_numpy(ends - lengths)
        self.bytes, self.kind, tables = 0, (), None
        for first in range(0, len(rows), TEXTS):
            own = slice(first, first + TEXTS)
            made, kind = _project(late, cache, rows[own])
            if tables is None:
                self.bytes = int(ends[-1]) * sum(x[0].nbytes for x in made)
                if limit is not None and self.bytes > limit:
                    raise ValueError(
                        f"Projections of {len(rows):,} texts take {self.bytes:,} bytes, expected "
                        f"at most {limit:,}; they are computed in every step then."
                    )
                self.kind = kind
                tables = [x.new_empty(int(ends[-1]), x.shape[1]) for x in made]
            place = slice(int(self._begins[first]), int(ends[own][-1]))
            for table, part in zip(tables, made, strict=True):
                table[place] = part
        self.tables = tuple(tables or ())

    def of(self, keys: np.ndarray) -> HeldRows | None:
        """Those of a batch's texts, uint64 [B, 2]; None where one is not held."""
        found = self._keys.find(keys)
        if (found < 0).any():
            return None
        return HeldRows(self.tables, self._begins[torch.from_numpy(found)], self.kind)


def why_not(late, longest: int) -> str | None:
    """Why projections are of no use to a model in training, in words; None: they are.

    Args:
        late: the LatePrompt.
        longest: most tokens of a text.
    """
    config = late.active_config
    k, m = config.insertion_layer, config.num_virtual_tokens
    if late.upper == "padded":
        return "upper is 'padded'"
    if len(get_layers(late.backbone, late.family)) - k < 2:
        return f"layer {k + 1} is the last one, which needs none where a head reads one token"
    return why_padded(late.backbone, late.family, k, longest + m, True)


def hold(
    late, cache: ActivationCache, keys: np.ndarray, args, wanted: bool | None
) -> Projections | None:
    """Projections of the training texts of LPTTrainer; None where they are not held.

    Args:
        late, cache, keys: as of Projections.
        args: TrainingArguments.
        wanted: True: whatever they take; False: never; None: where they are of use and there is
            room.

    Raises:
        ValueError: they were asked for and cannot be held.
    """
    # (Worker processes make batches without: what is held stays in this one.)
    workers, compiles = args.dataloader_num_workers, args.torch_compile
    here = args.device.type == "cpu" and not compiles and not workers
    # (One of several processes sees a part of the texts in an epoch, and would hold all.)
    if wanted is False or (wanted is None and not (here and args.world_size == 1)):
        return None
    if not here:
        raise ValueError(
            f"`hold_projections` is True on {args.device.type!r} with torch_compile={compiles} and "
            f"dataloader_num_workers={workers}, expected the CPU without them; leave it out."
        )
    try:
        held = Projections(late, cache, keys, held_limit() if wanted is None else None)
    except ValueError as error:
        if wanted:
            raise
        logger.info("%s", error)
        return None
    logger.info("Projections of the training texts are held: %s.", amount(held.bytes))
    return held


@torch.no_grad()
def _project(late, cache, rows: np.ndarray) -> tuple[tuple[Tensor, ...], tuple]:
    config = late.active_config
    k, m = config.insertion_layer, config.num_virtual_tokens
    batch: PackedBatch = cache.read(rows, dtype=rows_dtype(late, k))
    positions = None
    if late.family.takes_positions:
        _, place = batch.places
        positions = (place if batch.position_ids is None else batch.position_ids) + m
    updates = late.updates(late.active_adapters[0])
    made = project_first(late.computing(k), late.family, k, batch.hidden, positions, updates)
    updated = first_updated(late.backbone, late.family, k, updates)
    return made, kind_of(batch.hidden, m, updated)
