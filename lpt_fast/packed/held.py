"""Queries, keys and values of text rows in the first layer above the insertion, where somebody
holds them: a step looks them up instead of computing them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import autocast_dtype
from .plan import Plan


@dataclass(frozen=True)
class HeldRows:
    """What is held of the texts of a batch.

    Attributes:
        tables: queries, keys and values of all texts that are held, [T, H d], [T, Hk d], [T, Hk d].
        begins: int64 [B], where in them each text of the batch begins.
        kind: in what it was computed (`kind_of`).
    """

    tables: tuple[Tensor, ...]
    begins: Tensor
    kind: tuple

    def fits(self, rows: Tensor, m: int, updated: bool = False) -> bool:
        """Whether layer k+1 would make the same of these rows [N, D], with m prompt rows a text;
        `updated`: where updates change what it makes (`first_updated`).
        """
        return self.kind == kind_of(rows, m, updated)

    def take(self, plan: Plan) -> list[Tensor]:
        """[N, ...] each, in fresh memory; at prompt rows anything."""
        shift = self.begins - plan.starts - plan.m
        index = torch.arange(plan.rows, device=shift.device) + shift.repeat_interleave(
            plan.lengths, output_size=plan.rows
        )
        # (The prompt of the first text would stand before the table, a filler text behind it.)
        index.clamp_(0, len(self.tables[0]) - 1)
        return [table.index_select(0, index) for table in self.tables]


def kind_of(rows: Tensor, m: int, updated: bool = False) -> tuple:
    """Rotary positions of a text are moved up by its prompt, so m counts too; with updates, what is
    held are the frozen products before them.
    """
    return rows.device, rows.dtype, autocast_dtype(rows), m, updated
