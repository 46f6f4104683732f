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
    j = p % m
    start, n = readable(b, mask, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
    # j n // m, taken apart so that it fits 32 bits: a GPU divides wider numbers by a function call.
    whole = n // m
    rest = n % m
    begin = start + j * whole + j * rest // m
    end = start + (j + 1) * whole + ((j + 1) * rest + m - 1) // m
    return begin, tl.where(mask, end, begin)


@triton.jit
def examples_of(cu_seqlens_ptr, t_first, B, BLOCK_T: tl.constexpr):
    """The example of each of the text rows t_first .. t_first + BLOCK_T, int32 [BLOCK_T]; beyond
    the last row the last one. Every example has a row.

    Two looks at cu_seqlens whatever B is, where a binary search would take a dozen of loads each of
    which waits for the one before.
    """
    # How many examples end before the first row; their ends are looked at 1,024 at a time.
    ended = tl.zeros((1024,), dtype=tl.int32)
    for b_first in range(0, B, 1024):
        b = b_first + tl.arange(0, 1024)
        end = tl.load(cu_seqlens_ptr + 1 + b, mask=b < B, other=0x7FFFFFFF)
        ended += (end <= t_first).to(tl.int32)
    first = tl.sum(ended, axis=0)
    # Beyond it at most one more for each row.
    b = first + tl.arange(0, BLOCK_T)
    end = tl.load(cu_seqlens_ptr + 1 + b, mask=b < B, other=0x7FFFFFFF)
    t = t_first + tl.arange(0, BLOCK_T)
    further = tl.sum((end[None, :] <= t[:, None]).to(tl.int32), axis=1)
    return tl.minimum(first + further, B - 1)


@triton.jit
def pooled(
    p,  # [BLOCK_P], prompt rows
    mask,
    c,  # [BLOCK_R], channels
    R,
    m,
    h_ptr,  # [T, R]
    cu_seqlens_ptr,
    readable_start_ptr,
    readable_count_ptr,
    KIND: tl.constexpr,
):
    """Mean (appg) or maximum (mppg) of each bin's rows of h, fp32 [BLOCK_P, BLOCK_R], and the row
    that has the maximum, the first of equals; NaN counts as the greatest.
    """
    begin, end = pooling_bin(p, mask, m, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
    arg = tl.zeros((p.shape[0], c.shape[0]), dtype=tl.int32) + begin[:, None]
    if KIND == "appg":
        value = tl.zeros((p.shape[0], c.shape[0]), dtype=tl.float32)
    else:
        value = tl.full((p.shape[0], c.shape[0]), float("-inf"), dtype=tl.float32)
    for s in range(0, tl.max(end - begin, axis=0)):
        at = begin + s
        valid = (at < end)[:, None] & (c < R)[None, :]
        x = tl.load(h_ptr + at.to(tl.int64)[:, None] * R + c[None, :], mask=valid, other=0.0)
        x = x.to(tl.float32)
        if KIND == "appg":
            value += x
        else:
            better = valid & ((x > value) | ((x != x) & (value == value)))
            value = tl.where(better, x, value)
            arg = tl.where(better, at[:, None], arg)
    if KIND == "appg":
        value = value / tl.maximum(end - begin, 1).to(tl.float32)[:, None]
    return value, arg
