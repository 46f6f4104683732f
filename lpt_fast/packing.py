"""PackedBatch: hidden states of several texts one after another, without padding. A leaf: imports
torch only.

The only place that asks a tensor for a number: everybody else reads B, T and `max_seqlen` here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """What layer k gave for B texts, packed.

    Attributes:
        hidden: [T + B room, D]. Text b stands in rows cu_seqlens[b] + (b + 1) room ..
            cu_seqlens[b+1] + (b + 1) room. The `room` rows before it are free for its prompt
            (`lpt_fast.insertion.insert_prompt_` fills them) and hold nothing of meaning.
        cu_seqlens: int32 [B + 1], text rows alone, from 0 to T; no text is empty.
        max_seqlen: tokens of the longest text (0 for no texts).
        room: free rows before each text.
        input_ids, token_type_ids, position_ids: int64 [T] or None, what the texts were. Heads that
            look for the last token or the end token read the ids.
        layer: k, the layer whose output this is; None: not known, and not checked.
        identity: of the cache that it comes from (lpt_fast.cache.identity), or None: not from a
            cache.
        store, compute_dtype: of that cache: how rows are kept and what they were computed in.
        guard: called with the LatePrompt and this batch before it is used, raises where another
            model made the batch; None: not checked.
        held: what the layer above makes of the text rows, where that is known
            (lpt_fast.packed.held.HeldRows), or None.
    """

    hidden: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    room: int = 0
    input_ids: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    layer: int | None = None
    identity: str | None = None
    store: str | None = None
    compute_dtype: str | None = None
    guard: Callable[[object, PackedBatch], None] | None = None
    held: object | None = None

    def __post_init__(self):
        rows = self.hidden.shape[0] if self.hidden.dim() == 2 else None
        if rows is None or self.cu_seqlens.dim() != 1 or rows < len(self) * self.room:
            raise ValueError(
                f"`hidden` has the shape {list(self.hidden.shape)} and `cu_seqlens` "
                f"{list(self.cu_seqlens.shape)}, expected [T + B room, D] and [B + 1] with room = "
                f"{self.room}; pack() makes them from padded hidden states."
            )
        for name in ("input_ids", "token_type_ids", "position_ids"):
            value = getattr(self, name)
            if value is not None and value.shape != (self.num_tokens,):
                raise ValueError(
                    f"`{name}` has the shape {list(value.shape)}, expected [{self.num_tokens}], "
                    "one entry a text row; leave out padding and free rows."
                )

    def __len__(self) -> int:
        """B, the number of texts."""
        return len(self.cu_seqlens) - 1

    @property
    def num_tokens(self) -> int:
        """T, the number of text rows."""
        return self.hidden.shape[0] - len(self) * self.room

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, int32 [B]."""
        return self.cu_seqlens.diff()

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """For each text row its text and its place in it, int64 [T]."""
        row = torch.arange(self.num_tokens, device=self.cu_seqlens.device)
        start = self.cu_seqlens[:-1].long()
        text = torch.searchsorted(start, row, right=True) - 1
        return text, row - start[text]

    def text(self) -> Tensor:
        """The text rows alone, [T, D]; `hidden` itself where it has no free rows."""
        if self.room == 0:
            return self.hidden
        text, _ = self.places
        row = torch.arange(self.num_tokens, device=text.device)
        return self.hidden.index_select(0, row + (text + 1) * self.room)

    def mask(self) -> Tensor:
        """The tokens in the padded form, bool [B, S], S = max_seqlen, padded on the right."""
        place = torch.arange(self.max_seqlen, device=self.cu_seqlens.device)
        return place < self.lengths[:, None]

    def pad(self, values: Tensor, fill: float = 0) -> Tensor:
        """One value a text row [T, ...] -> [B, S, ...], padded on the right with `fill`."""
        text, place = self.places
        out = values.new_full((len(self) * self.max_seqlen, *values.shape[1:]), fill)
        out = out.index_copy(0, text * self.max_seqlen + place, values)
        return out.view(len(self), self.max_seqlen, *values.shape[1:])

    def padded(self) -> Tensor:
        """The hidden states as models take them, [B, S, D] with zeros for padding."""
        return self.pad(self.text())

    def select(self, texts: Tensor) -> PackedBatch:
        """Some of the texts, int64 [n], in that order, without free rows."""
        texts = texts.to(self.cu_seqlens.device)
        lengths = self.lengths.index_select(0, texts)
        ends = self.cu_seqlens.new_zeros(len(texts) + 1)
        ends[1:] = lengths.cumsum(0)
        shift = self.cu_seqlens[:-1].index_select(0, texts) - ends[:-1]
        rows = shift.repeat_interleave(lengths) + torch.arange(int(ends[-1]), device=shift.device)
        own = {
            name: value[rows]
            for name in ("input_ids", "token_type_ids", "position_ids")
            if (value := getattr(self, name)) is not None
        }
        held = self.held
        if held is not None:
            held = replace(held, begins=held.begins[texts])
        longest = int(lengths.max()) if len(lengths) else 0
        place = {"cu_seqlens": ends, "max_seqlen": longest, "room": 0, "held": held}
        return replace(self, hidden=self.text().index_select(0, rows), **place, **own)

    def to(self, *args, **kwargs) -> PackedBatch:
        """As `torch.Tensor.to`; a dtype goes to the hidden states alone."""
        hidden = self.hidden.to(*args, **kwargs)
        blocking = {"non_blocking": kwargs.get("non_blocking", False)}
        return self._map(lambda x: x.to(hidden.device, **blocking), hidden=hidden)

    def pin_memory(self) -> PackedBatch:
        """As `torch.Tensor.pin_memory`, which torch's DataLoader calls."""
        return self._map(Tensor.pin_memory, hidden=self.hidden.pin_memory())

    def _map(self, change, **done) -> PackedBatch:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name not in done:
                done[field.name] = change(value)
        return replace(self, **done)


def pack(hidden: Tensor, attention_mask: Tensor | None = None, **more) -> PackedBatch:
    """Padded hidden states without their padding.

    Args:
        hidden: [B, S, D].
        attention_mask: [B, S], nonzero where there is a token; None: all.
        more: further attributes of the batch; `input_ids` and its like may be padded, [B, S].

    Raises:
        ValueError: a mask of another shape, or a text without a token.
    """
    if hidden.dim() != 3:
        raise ValueError(f"`hidden` must have the shape [B, S, D], got {list(hidden.shape)}.")
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if attention_mask is not None:
        if attention_mask.shape != hidden.shape[:2]:
            raise ValueError(
                f"`attention_mask` must have the shape {list(hidden.shape[:2])} of the hidden "
                f"states, got {list(attention_mask.shape)}."
            )
        mask = attention_mask.to(hidden.device).bool()
    lengths = mask.sum(1)
    longest = int(lengths.max().item()) if len(lengths) else 0
    if len(lengths) and int(lengths.min().item()) < 1:
        raise ValueError("`attention_mask` has a row without a token, expected at least one each.")
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=hidden.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    more = {
        name: value[mask] if isinstance(value, Tensor) and value.dim() == 2 else value
        for name, value in more.items()
    }
    return PackedBatch(hidden[mask], cu_seqlens, longest, **more)
