"""Where the prompt rows stand among the padded text rows, in the padded form of the method.

The m prompt rows go directly before the first token of each example: at the left edge of a
right-padded row, between padding and text of a left-padded one. Then relative positions, sliding
windows and rotary angles between prompt and text do not depend on how much padding the batch
happens to need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def check(condition: Tensor, message: Callable[[], str]) -> None:
    """Raises ValueError(message()) unless all of `condition` hold.

    On CUDA it is a device assert: looking at the result would make the host wait in every step. A
    model that is exported has no such checks.
    """
    if torch.compiler.is_exporting():
        return
    if condition.is_cuda:
        torch._assert_async(
            condition.all(), "lpt_fast: wrong attention_mask, labels or context_lengths"
        )
    elif not condition.all():
        raise ValueError(message())


@dataclass(frozen=True)
class PromptLayout:
    """Positions of prompt and text rows.

    Attributes:
        m: prompt rows per example.
        starts: int64 [B], index of each example's first token; None when it is 0 for all (no left
            padding), which makes insertion a plain concatenation.
    """

    m: int
    starts: Tensor | None

    @classmethod
    def from_mask(cls, mask: Tensor | None, m: int) -> PromptLayout:
        """mask: bool [B, S], which positions hold tokens; None means all."""
        if mask is None:
            return cls(m, None)
        starts = mask.int().argmax(dim=1)
        # Looking costs nothing on the CPU; on a GPU it would stall the stream, and a graph cannot
        # look. The general way is right anyway.
        looks = not mask.is_cuda and not torch.compiler.is_compiling()
        if looks and not starts.any():
            return cls(m, None)
        return cls(m, starts)

    def _sources(self, length: int) -> Tensor:
        """For each of the m + S rows, the row of [prompt; text] that goes there. int64
        [B, m + S].
        """
        row = torch.arange(length + self.m, device=self.starts.device)
        start = self.starts[:, None]
        return torch.where(
            row < start, row + self.m, torch.where(row < start + self.m, row - start, row)
        )

    def insert(self, prompt: Tensor, text: Tensor) -> Tensor:
        """prompt [B, m, ...] and text [B, S, ...] -> [B, m + S, ...]."""
        joined = torch.cat((prompt, text), dim=1)
        if self.starts is None:
            return joined
        index = self._sources(text.shape[1])
        index = index.view(*index.shape, *[1] * (joined.dim() - 2)).expand_as(joined)
        return joined.gather(1, index)

    def strip(self, rows: Tensor) -> Tensor:
        """[B, m + S, D] -> the text rows [B, S, D]."""
        if self.starts is None:
            return rows[:, self.m :]
        place = torch.arange(rows.shape[1] - self.m, device=rows.device)
        index = torch.where(place < self.starts[:, None], place, place + self.m)
        return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))

    def extend_mask(self, mask: Tensor | None) -> Tensor | None:
        """The attention mask with m ones where the prompt stands: [B, S] -> [B, m + S]."""
        if mask is None:
            return None
        return self.insert(mask.new_ones(mask.shape[0], self.m), mask)

    def extend_positions(self, positions: Tensor | None, batch: int) -> Tensor | None:
        """Positions for rotary layers: the prompt takes those of the first m tokens, the text moves
        up by m.

        positions: int64 [B or 1, S] -> [B, m + S]. None stays None: counting from the left edge is
        then right, for the prompt stands directly before the text.
        """
        if positions is None:
            return None
        positions = positions.expand(batch, -1)
        place = torch.arange(positions.shape[1], device=positions.device)
        if self.starts is None:
            first, text = positions[:, :1], positions + self.m
        else:
            start = self.starts[:, None]
            first = positions.gather(1, start)
            text = torch.where(place < start, positions, positions + self.m)
        return self.insert(first + torch.arange(self.m, device=positions.device), text)
