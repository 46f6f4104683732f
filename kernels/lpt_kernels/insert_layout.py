"""Where the rows of a batch are, as the insertion kernels take it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the rows of a batch are; see rows.py for the meaning of each tensor.

    Attributes:
        cu_seqlens: int32 [B+1].
        m: prompt rows per example.
        insert_at: int32 [B] or None.
        readable_start, readable_count: int32 [B], both or neither.
        order: int32 [T] or None.
        source_start: int64 [B] or None; given, `hidden` is a cache.
        token_scale, channel_scale: fp32, of a quantised cache ([rows of the cache], [D]).
        last: npg reads the last readable row instead of the first.
    """

    cu_seqlens: Tensor
    m: int
    insert_at: Tensor | None = None
    readable_start: Tensor | None = None
    readable_count: Tensor | None = None
    order: Tensor | None = None
    source_start: Tensor | None = None
    token_scale: Tensor | None = None
    channel_scale: Tensor | None = None
    last: bool = False

    @property
    def B(self) -> int:
        """Examples of the batch."""
        return self.cu_seqlens.shape[0] - 1

    def arguments(self, *names: str) -> dict[str, object]:
        """The kernel arguments of these tensors."""
        return {f"{name}_ptr": getattr(self, name) for name in names}


PLACES = ("cu_seqlens", "insert_at")
BINS = ("readable_start", "readable_count")
SOURCES = ("order", "source_start", "token_scale", "channel_scale")
