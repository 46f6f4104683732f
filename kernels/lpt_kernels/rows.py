"""Which row goes where: the arithmetic of a batch with prompt rows, shared by all insert kernels.

Text rows are counted by t in 0..T, example by example (`cu_seqlens`). Optional tensors say more:

insert_at [B]       the position before which the prompt stands (None: the example's first row)
readable_start [B]  the t of the first row that a prompt may be made from (None: all rows)
readable_count [B]  how many of them there are, one after another
order [T]           the position of row t (None: t itself); padded batches whose mask has holes use
                    it to count the readable rows first
source_start [B]    the row of a cache where the example begins (None: `hidden` is the batch itself)

An output holds the m prompt rows of example b at insert_at[b] + b m, and the row at position q at
q + b m, or q + (b + 1) m when it stands behind the prompt. Prompt rows are also counted through,
p = b m + j; a pooling bin is the interval of t that p is made from.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def destination(t, b, mask, m, insert_at_ptr, order_ptr):
    """Output row of text row t. t, b int32 [BLOCK_T] -> int64 [BLOCK_T]."""
    position = t
    if order_ptr is not None:
        position = tl.load(order_ptr + t, mask=mask, other=0)
    row = position.to(tl.int64) + b.to(tl.int64) * m
    if insert_at_ptr is None:
        row += m
    else:
        row += tl.where(position >= tl.load(insert_at_ptr + b, mask=mask, other=0), m, 0)
    return row


@triton.jit
def source(
    t,
    b,
    mask,
    m,
    cu_seqlens_ptr,
    insert_at_ptr,
    order_ptr,
    source_start_ptr,
    IN_PLACE: tl.constexpr,
):
    """Where text row t is read: in the output (IN_PLACE), a cache or `hidden`. int64 [BLOCK_T]."""
    if IN_PLACE:
        row = destination(t, b, mask, m, insert_at_ptr, order_ptr)
    elif source_start_ptr is not None:
        start = tl.load(source_start_ptr + b, mask=mask, other=0).to(tl.int64)
        row = start + (t - tl.load(cu_seqlens_ptr + b, mask=mask, other=0))
    elif order_ptr is not None:
        row = tl.load(order_ptr + t, mask=mask, other=0).to(tl.int64)
    else:
        row = t.to(tl.int64)
    return row


@triton.jit
def prompt_start(b, mask, m, cu_seqlens_ptr, insert_at_ptr):
    """Output row of the first prompt row of example b. int64 of b's shape."""
    if insert_at_ptr is None:
        at = tl.load(cu_seqlens_ptr + b, mask=mask, other=0)
    else:
        at = tl.load(insert_at_ptr + b, mask=mask, other=0)
    return at.to(tl.int64) + b.to(tl.int64) * m


@triton.jit
def readable(b, mask, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr):
    """First readable t and number of readable rows (at least 1) of example b, int32."""
    if readable_start_ptr is None:
        start = tl.load(cu_seqlens_ptr + b, mask=mask, other=0)
        count = tl.load(cu_seqlens_ptr + b + 1, mask=mask, other=1) - start
    else:
        start = tl.load(readable_start_ptr + b, mask=mask, other=0)
        count = tl.load(readable_count_ptr + b, mask=mask, other=1)
    return start, tl.maximum(count, 1)


@triton.jit
def pooling_bin(p, mask, m, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr):
    """The interval of t that prompt row p pools: floor(j n / m) .. ceil((j + 1) n / m) of the
    readable rows, as torch.nn.AdaptiveAvgPool1d. p int32 [BLOCK_P] -> begin, end int32 [BLOCK_P],
    empty where masked.
    """
    b = p // m
    j = (p % m).to(tl.int64)
    start, n = readable(b, mask, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
    begin = start + (j * n // m).to(tl.int32)
    end = start + (((j + 1) * n + m - 1) // m).to(tl.int32)
    return begin, tl.where(mask, end, begin)


@triton.jit
def prompt_rows_of(
    first, end, b_first, b_last, m, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr
):
    """The prompt rows p_low .. p_high that pool any of the text rows first .. end.

    Scalars; b_first and b_last are the examples of the rows `first` and `end` - 1. From
    begin_j < t + 1 <= end_j follows j >= floor(rank m / n) and j < ceil((rank + 1) m / n).
    """
    start, n = readable(b_first, True, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
    rank = tl.minimum(tl.maximum(first - start, 0), n).to(tl.int64)
    p_low = b_first * m + (rank * m // n).to(tl.int32)
    start, n = readable(b_last, True, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
    rank = tl.minimum(tl.maximum(end - start, 0), n).to(tl.int64)
    p_high = b_last * m + ((rank * m + n - 1) // n).to(tl.int32)
    return p_low, p_high


@triton.jit
def bottleneck(
    p,  # [BLOCK_P], rows of z
    mask,
    c,  # [BLOCK_R], channels
    R,
    m,
    z_ptr,
    left_ptr,
    b_down_ptr,
    cu_seqlens_ptr,
    readable_start_ptr,
    readable_count_ptr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """W_d h + b_d of npg, of each bin for appg and mppg, fp32 [BLOCK_P, BLOCK_R].

    A bin that goes on in further tiles of TILE text rows has its first tile's share in z and each
    later tile's in `left` [tiles, R]; at most one bin goes on over any border, for neighbouring
    bins share one row at most. Shares are added (appg) or compared (mppg).
    """
    inside = mask[:, None] & (c < R)[None, :]
    row = p.to(tl.int64)[:, None]
    z = tl.load(z_ptr + row * R + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if KIND != "npg":
        begin, end = pooling_bin(p, mask, m, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
        tile = begin // TILE
        span = tl.where(mask, (end - 1) // TILE - tile, 0)
        for s in range(1, tl.max(span, axis=0) + 1):
            more = inside & (s <= span)[:, None]
            at = (tile + s).to(tl.int64)[:, None] * R + c[None, :]
            if KIND == "appg":
                z += tl.load(left_ptr + at, mask=more, other=0.0)
            else:
                share = tl.load(left_ptr + at, mask=more, other=float("-inf"))
                share = share.to(tl.float32)
                z = tl.where((share > z) | (share != share), share, z)
    bias = tl.load(b_down_ptr + c, mask=c < R, other=0.0).to(tl.float32)
    return tl.where(inside, z + bias[None, :], 0.0)
