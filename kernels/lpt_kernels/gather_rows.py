"""The kernels of gather.py: which rows, and their copies."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import example_of, load_rows


# Sizes of a batch change from step to step: specialised on, they would compile again and again.
@triton.jit(do_not_specialize=["N", "E", "B", "total"])
def source_rows_fwd_kernel(
    index_ptr,  # int [B]
    spans_ptr,  # int [E + 1], the store's cu_seqlens
    given_ptr,  # int32 [B + 1] or None, the batch's cu_seqlens by the caller
    source_ptr,  # int64 [B]
    cu_seqlens_ptr,  # int32 [B + 1], or None where given
    report_ptr,  # int64 [2]: rows in total, and 1 if nothing was wrong
    N,
    E,
    B,
    total,  # -1: not known
    BLOCKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Row of the cache that each text row comes from, int64, a block of rows a program."""
    # One program walks over the batch, for each example's place depends on all before it.
    rows = tl.full((), 0, tl.int64)
    wrongs = tl.full((), 0, tl.int32)
    for block in range(BLOCKS):
        b = block * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
        mask = b < B
        index = tl.load(index_ptr + b, mask=mask, other=0).to(tl.int64)
        known = mask & (index >= 0) & (index < E)
        start = tl.load(spans_ptr + index, mask=known, other=0).to(tl.int64)
        end = tl.load(spans_ptr + index + 1, mask=known, other=0).to(tl.int64)
        right = known & (start >= 0) & (start <= end) & (end <= N)
        upto = rows + tl.cumsum(end - start, 0)
        if given_ptr is not None:
            right = right & (tl.load(given_ptr + b + 1, mask=mask, other=0) == upto)
        else:
            tl.store(cu_seqlens_ptr + b + 1, upto.to(tl.int32), mask=mask)
        tl.store(source_ptr + b, start, mask=mask)
        rows += tl.sum(end - start, 0)
        wrongs += tl.sum((mask & ~right).to(tl.int32), 0)
    if given_ptr is not None:
        wrongs += (tl.load(given_ptr) != 0).to(tl.int32)
    else:
        tl.store(cu_seqlens_ptr, 0)
    wrongs += ((total >= 0) & (rows != total)).to(tl.int32)
    tl.store(report_ptr, rows)
    tl.store(report_ptr + 1, (wrongs == 0).to(tl.int64))


@triton.jit(do_not_specialize=["N", "T", "B", "m"])
def gather_rows_fwd_kernel(
    x_ptr,  # [N, D]
    token_scale_ptr,  # fp32 [N] or None
    channel_scale_ptr,  # fp32 [D] or None
    source_ptr,  # int64 [B], each example's first row of x
    cu_seqlens_ptr,  # int32 [B + 1]
    out_ptr,  # [T + B m, D]
    stride_xn,
    stride_ot,
    N,
    T,
    B,
    m,
    D,
    STORE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Text rows of a cache to their places behind m free rows, dequantised on the way."""
    # Tiles of text rows, not of examples: one long example is no slower than many short ones.
    # Columns run fastest, so that a source row is read by neighbours at the same time.
    tiles_d = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0)
    t = (tile // tiles_d) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    column = (tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    row_mask = t < T
    column_mask = column < D

    example = example_of(cu_seqlens_ptr, t, B, STEPS)
    first = tl.load(cu_seqlens_ptr + example)
    source = tl.load(source_ptr + example) + (t - first)  # int64
    inside = row_mask & (source >= 0) & (source < N)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    scales = (token_scale_ptr, channel_scale_ptr)
    # [BLOCK_T, BLOCK_D]
    x = load_rows(x_ptr, source, column, inside, column_mask, stride_xn, *scales, dtype, STORE)
    target = t.to(tl.int64) + m * (example.to(tl.int64) + 1)
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(out_ptr + target[:, None] * stride_ot + column[None, :], x, mask=mask)
