"""Text rows of a call without padding, from the text or from a cache, with room for prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..packed.held import HeldRows
from ..packed.plan import Plan
from ..packing import PackedBatch
from .context import attended


@dataclass
class Rows:
    """Text rows laid out with room for the prompts, and where they come from.

    Attributes:
        buffer: [T + B m, D], prompt rows not filled yet.
        plan: of the batch.
        cu_seqlens: int32 [B + 1] of the text rows.
        shape: (B, S) of the padded form.
        padded_form: makes `flat`, `tokens` and `positions`, which few heads look at.
        held: projections of the text rows (packed/held.py), or None.
    """

    buffer: Tensor
    plan: Plan
    cu_seqlens: Tensor
    shape: tuple[int, int]
    padded_form: Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]
    held: HeldRows | None = None

    @cached_property
    def _padded_form(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.padded_form()

    @property
    def flat(self) -> Tensor:
        """int64 [T], the place of each text row in the padded form [B S]."""
        return self._padded_form[0]

    @property
    def tokens(self) -> Tensor | None:
        """bool [B, S], or None: all."""
        return self._padded_form[1]

    @property
    def positions(self) -> Tensor | None:
        """int64 [B, S] or [1, S], or None: the columns."""
        return self._padded_form[2]

    @classmethod
    def of_text(cls, hidden: Tensor, tokens: Tensor | None, positions, m: int) -> Rows:
        """From padded hidden states [B, S, D]."""
        B, S, D = hidden.shape
        device = hidden.device
        mask = attended(tokens, B, S, device)
        lengths = mask.sum(1)
        cu_seqlens = torch.zeros(B + 1, dtype=torch.int32, device=device)
        cu_seqlens[1:] = lengths.cumsum(0)
        flat = mask.flatten().nonzero()[:, 0]  # (A GPU is waited for here: T is not known.)
        longest = S if hidden.is_cuda else int(lengths.max())
        plan = Plan(cu_seqlens, longest, m, len(flat) + B * m)
        source = flat.new_zeros(plan.rows)
        source[plan.text_rows] = flat
        buffer = hidden.reshape(-1, D).index_select(0, source)
        return cls(buffer, plan, cu_seqlens, (B, S), lambda: (flat, tokens, positions))

    @classmethod
    def of_batch(cls, batch: PackedBatch, dtype: torch.dtype, m: int) -> Rows:
        """From hidden states of a cache; in place where the batch has room for m rows."""
        B, S, T = len(batch), batch.max_seqlen, batch.num_tokens
        plan = Plan(batch.cu_seqlens, S, m, T + B * m)
        hidden = batch.hidden
        if batch.room == m:
            # An alias: the batch itself stays a constant when its free rows get a gradient.
            buffer = hidden.to(dtype).detach()
        else:
            buffer = hidden.new_empty(plan.rows, hidden.shape[1], dtype=dtype)
            buffer.index_copy_(0, plan.text_rows, batch.text().to(dtype))

        def padded_form():
            text, place = batch.places
            positions = None if batch.position_ids is None else batch.pad(batch.position_ids)
            return text * S + place, batch.mask(), positions

        return cls(buffer, plan, batch.cu_seqlens, (B, S), padded_form, batch.held)

    def padded(self, rows: Tensor) -> Tensor:
        """Text rows of [N, D] in their padded places, [B, S, D]; zeros elsewhere."""
        B, S = self.shape
        out = rows.new_zeros(B * S, rows.shape[1])
        text = rows.index_select(0, self.plan.text_rows)
        return out.index_copy(0, self.flat, text).view(B, S, -1)

    def rotary_positions(self) -> Tensor:
        """int64 [N]: the prompt takes the places of the first m tokens, the text moves up by m."""
        B, S = self.shape
        plan, m = self.plan, self.plan.m
        if self.positions is None:
            return plan.places_in_text
        own = self.positions.expand(B, S).reshape(-1).index_select(0, self.flat)  # [T]
        out = own.new_empty(plan.rows)
        out[plan.text_rows] = own + m
        first = own[plan.text_starts]
        place = torch.arange(m, device=plan.device)
        out[plan.prompt_rows] = (first[:, None] + place).flatten()
        return out


def tokens_of(late, inputs: dict) -> tuple[Tensor | None, Tensor | None]:
    """The tokens of a call's texts, bool [B, S], None: all; and their positions, int64 [B, S] or
    [1, S], None: the columns.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    tokens = None if mask is None else mask.bool()
    if positions is None and tokens is not None and late.family.takes_positions:
        # Columns from the first token's on, as the model's own code turns them: over a hole in
        # the mask too.
        column = torch.arange(tokens.shape[1], device=tokens.device)
        positions = column - tokens.int().argmax(1, keepdim=True)
    return tokens, positions
