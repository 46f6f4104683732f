"""Where the rows of a packed batch with prompts stand: made once a batch, used by every layer.

A packed batch holds T text rows of B texts and m prompt rows before each: N = T + B m rows in all,
text b in rows start[b] .. start[b] + length[b], its prompt first. (In a batch of several adapters m
may differ from text to text.) Linear layers, norms and
activations never need more. Attention works text by text; where no variable-length kernel serves,
texts of like length are gathered into padded groups for it, and for it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

# A group ends where its next text would be shorter than this share of its longest one.
LIKE = 0.75
# Rows of the group that a GPU has are a multiple of this.
ALIGNED = 8


@dataclass(frozen=True)
class Group:
    """Texts of like length, padded on the right to the longest.

    Attributes:
        texts: how many.
        size: rows of the longest, S; on a GPU that or a few more.
        first: where the group's places begin, counted in padded places before it.
        lengths: int64 [G], rows of each text; None: all have S.
        numbers: slice of `Plan.order` that holds the texts' numbers.
    """

    texts: int
    size: int
    first: int
    lengths: Tensor | None
    numbers: slice

    @property
    def places(self) -> int:
        return self.texts * self.size

    def hidden(self, limit: Tensor | None = None) -> Tensor | None:
        """Which keys of each text may not be seen, bool [G, S]; None: all may.

        Args:
            limit: int64 [G], how many of each text's rows; default: all that it has.
        """
        limit = self.lengths if limit is None else limit
        if limit is None:
            return None
        return torch.arange(self.size, device=limit.device) >= limit[:, None]


class Plan:
    """Places of the rows of one packed batch with m prompt rows before each text.

    Args:
        cu_seqlens: int32 [B + 1] of the text rows alone.
        max_seqlen: tokens of the longest text.
        m: prompt rows of each text, one number for all or a list of B.
        rows: N = T + B m, known from the shape of the batch.

    Attributes:
        m: one number where it is the same for all, else int64 [B].
        most: the largest.
        even: whether it is the same for all.
        token_ends: the given cu_seqlens.

    On the CPU texts are sorted into groups; on a GPU, where looking at lengths would make the host
    wait, there is one.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, m: int | list[int], rows: int):
        self.rows, self.longest = rows, max_seqlen
        self.texts = len(cu_seqlens) - 1
        self.device = cu_seqlens.device
        self._several = several = [m] if isinstance(m, int) else m
        self.most = max(several)
        self.even = len(set(several)) == 1
        self.m = self.most if self.even else torch.tensor(m, device=self.device)
        self.size = max_seqlen + self.most
        if not self.sorted:
            # A GPU's products of other sizes read their numbers one by one.
            self.size = -(-self.size // ALIGNED) * ALIGNED
        self.token_ends = cu_seqlens
        # 0, 1, 2 ...: made once, for each launch of a small kernel costs as much as a large one's.
        self._count = torch.arange(max(rows, self.size, self.texts + 1), device=self.device)
        # int64 [B + 1], prompts included.
        if self.even:
            self._ends = torch.add(cu_seqlens, self._count[: self.texts + 1], alpha=self.m)
        else:
            self._ends = cu_seqlens + torch.cat((self._count[:1], self.m.cumsum(0)))
        self.starts = self._ends[:-1]

    @cached_property
    def text_starts(self) -> Tensor:
        """int64 [B], counted among text rows alone."""
        return self.token_ends[:-1].long()

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [B], rows of each text and its prompt."""
        return self._ends.diff()

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [B + 1], prompts included: what variable-length kernels take."""
        return self._ends.to(torch.int32)

    @cached_property
    def prompt_rows(self) -> Tensor:
        """int64 [B m], text by text."""
        if self.even:
            return (self.starts[:, None] + self._count[: self.most]).flatten()
        # (How many there are is known here: a GPU is not waited for.)
        place = torch.tensor([i for own in self._several for i in range(own)], device=self.device)
        return self.starts.repeat_interleave(self.m, output_size=len(place)) + place

    @cached_property
    def text_rows(self) -> Tensor:
        """int64 [T], the rows that hold text."""
        prompts = self.texts * self.m if self.even else len(self.prompt_rows)
        row = self._count[: self.rows - prompts]
        text = torch.searchsorted(self.text_starts, row, right=True)  # counted from 1
        return row + (text * self.m if self.even else self.m.cumsum(0)[text - 1])

    @cached_property
    def places_in_text(self) -> Tensor:
        """int64 [N], where in its text each row stands, counted from its first prompt row."""
        return self._count[: self.rows] - self.starts[self._text_of_row]

    @cached_property
    def _text_of_row(self) -> Tensor:
        """int64 [N], the number of each row's text."""
        return torch.searchsorted(self._ends[1:], self._count[: self.rows], right=True)

    def readout_rows(self, place: Tensor | None) -> Tensor:
        """int64 [B], the row of the token at `place` of each text; None: the first token."""
        rows = self.starts + self.m  # (a number or [B])
        return rows if place is None else rows + place

    # -- padded groups -----------------------------------------------------------------------------

    @cached_property
    def _host(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Texts sorted from long to short, and the cuts between groups."""
        lengths = self.lengths.numpy()
        order = np.argsort(-lengths, kind="stable")
        cuts, begin = [], 0
        for i in range(1, len(order)):
            if lengths[order[i]] < LIKE * lengths[order[begin]]:
                cuts.append((begin, i))
                begin = i
        return order, [*cuts, (begin, len(order))]

    @cached_property
    def order(self) -> Tensor:
        """int64 [B], the texts' numbers in the order of the groups."""
        if not self.sorted:
            return self._count[: self.texts]
        return torch.from_numpy(self._host[0])

    @cached_property
    def inverse_order(self) -> Tensor:
        """int64 [B], where in `order` each text is."""
        return torch.empty_like(self.order).scatter_(0, self.order, self._count[: self.texts])

    @cached_property
    def groups(self) -> list[Group]:
        if not self.sorted:
            return [Group(self.texts, self.size, 0, self.lengths, slice(0, self.texts))]
        groups, first = [], 0
        sorted_lengths = self.lengths[self.order]
        for begin, end in self._host[1]:
            own = sorted_lengths[begin:end]
            size = int(own[0])
            equal = int(own[-1]) == size
            group = Group(end - begin, size, first, None if equal else own, slice(begin, end))
            groups.append(group)
            first += group.places
        return groups

    @property
    def places(self) -> int:
        """Padded places of all groups."""
        return self.groups[-1].first + self.groups[-1].places

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each padded place its group's first place, the group's size, its text (number in the
        batch) and its row in the text; int64 [places].
        """
        first, size, text, row = [], [], [], []
        for group in self.groups:
            place = torch.arange(group.places, device=self.device)
            first.append(torch.full_like(place, group.first))
            size.append(torch.full_like(place, group.size))
            text.append(self.order[group.numbers].repeat_interleave(group.size))
            row.append(place % group.size)
        return tuple(torch.cat(x) for x in (first, size, text, row))

    @cached_property
    def _row_at(self) -> Tensor:
        """int64 [B, S], of one group of all texts in their order: the row at each place; one of
        another text, or none, at padding.
        """
        return self.starts[:, None] + self._count[: self.size]

    @cached_property
    def hidden(self) -> Tensor:
        """`Group.hidden` of that group, bool [B, S]."""
        return self._row_at >= self._ends[1:, None]

    @property
    def sorted(self) -> bool:
        """Whether texts stand in groups in another order than that of the batch."""
        return self.device.type == "cpu"

    @cached_property
    def to_places(self) -> Tensor:
        """int64 [places], the packed row at each padded place; padding repeats the text's own first
        row, so that nothing of another text is ever near.
        """
        if not self.sorted:
            return torch.where(self.hidden, self.starts[:, None], self._row_at).flatten()
        _, _, text, row = self._places
        start = self.starts[text]
        return torch.where(row < self.lengths[text], start + row, start)

    @cached_property
    def targets(self) -> Tensor:
        """int64 [places], as `to_places`; padding goes to a row behind the last."""
        _, _, text, row = self._places
        return torch.where(row < self.lengths[text], self.starts[text] + row, self.rows)

    def from_places(self, x: Tensor) -> Tensor:
        """[places, D] -> [N, D]; what stands at padding is dropped."""
        return x.index_select(0, self.to_rows)

    @cached_property
    def to_rows(self) -> Tensor:
        """int64 [N], the padded place of each packed row."""
        if not self.sorted:
            padding = torch.sub(self.starts, self._count[: self.texts], alpha=self.size)  # negative
            return self._count[: self.rows] - padding[self._text_of_row]
        place = torch.arange(len(self.targets), device=self.device)
        # Padding writes to a row that is cut off.
        return place.new_empty(self.rows + 1).scatter_(0, self.targets, place)[:-1]

    @cached_property
    def padding(self) -> Tensor | None:
        """bool [places], which are padding; None: none is."""
        if all(group.lengths is None for group in self.groups):
            return None
        _, _, text, row = self._places
        return row >= self.lengths[text]

    def heads(self, count: int) -> HeadPlaces:
        """The same places for rows that are cut into heads."""
        cache = self.__dict__.setdefault("_heads", {})
        if count not in cache:
            cache[count] = HeadPlaces(self, count)
        return cache[count]


class HeadPlaces:
    """Padded places of rows cut into H heads, heads before rows: a group is [G, H, S, d].

    Then products of queries, keys and values are batches of small contiguous matrices, and one
    gather both pads and transposes.
    """

    def __init__(self, plan: Plan, count: int):
        first, size, text, row = plan._places
        self.count = count
        rank = plan.inverse_order[text]  # counted through all groups
        begin = torch.cat(
            [
                torch.full((g.places,), g.numbers.start, device=plan.device, dtype=torch.int64)
                for g in plan.groups
            ]
        )
        head = torch.arange(count, device=plan.device)
        # [places, H]: where (text, head, row) goes among the heads' places.
        place = (first * count)[:, None] + ((rank - begin) * count * size)[:, None]
        place = place + head * size[:, None] + row[:, None]
        source = plan.to_places[:, None] * count + head
        flat = place.flatten()
        self.to_places = torch.empty_like(flat).scatter_(0, flat, source.flatten())
        self.to_rows = place[plan.to_rows].flatten()
        self.padding = None
        if plan.padding is not None and plan.sorted:
            self.padding = place[plan.padding].flatten()
        elif plan.padding is not None:
            # (How many there are is not known without waiting for the device.)
            mask = plan.padding[:, None].expand(-1, count).flatten()
            self.padding = torch.empty_like(mask).scatter_(0, flat, mask)
        self.slices = [slice(g.first * count, (g.first + g.places) * count) for g in plan.groups]

    def clear_padding(self, x: Tensor) -> Tensor:
        """x [H places, d] with zeros at padding, in place."""
        if self.padding is None:
            return x
        if self.padding.dtype == torch.bool:
            return x.masked_fill_(self.padding[:, None], 0)
        return x.index_fill_(0, self.padding, 0)
