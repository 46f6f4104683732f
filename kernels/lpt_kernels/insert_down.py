"""The down-projection W_d of the text, which is copied to its place on the way.

Forward: every text row is read once; npg makes u = relu(W_d x + b_d) of one row an example, appg
and mppg h = W_d x of every row, for insert_pool.py. Backward: dW_d from the text rows of the packed
output (which the layers above keep anyway, so that the input can be freed), as partial sums in fp32
that are added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, load_rows, relu, round_to
from .insert_tiles import COUNTS, bias_of, copy_tile
from .rows import destination, examples_of, readable, source


@triton.jit(do_not_specialize=COUNTS)
def npg_down_fwd_kernel(
    x_ptr,  # [T, D], a cache, or the output itself
    out_ptr,  # [T + B m, D]
    u_ptr,  # [B, R]
    w_down_ptr,  # [R, D]
    b_down_ptr,  # [R]
    cu_seqlens_ptr,
    insert_at_ptr,
    readable_start_ptr,
    readable_count_ptr,
    order_ptr,
    source_start_ptr,
    token_scale_ptr,
    channel_scale_ptr,
    T,
    B,
    m,
    D,
    R,
    stride_xt,
    down_tiles,
    LAST: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PRECISION: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """u of the first (LAST: last) readable row of each example; the other programs copy.

    Grid: ceil(B / BLOCK_B) ceil(R / BLOCK_R) + ceil(T / BLOCK_T) programs. The few that project
    come first, so that the copy hides them.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tile = tl.program_id(0)
    if tile < down_tiles:
        blocks = tl.cdiv(R, BLOCK_R)
        b = (tile // blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
        c = (tile % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = b < B
        t, n = readable(b, mask, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
        if LAST:
            t += n - 1
        row = source(
            t, b, mask, m, cu_seqlens_ptr, insert_at_ptr, order_ptr, source_start_ptr, IN_PLACE
        )
        u = tl.zeros((BLOCK_B, BLOCK_R), dtype=tl.float32)
        for d_first in range(0, D, BLOCK_D):
            d = d_first + tl.arange(0, BLOCK_D)
            x = load_rows(
                x_ptr,
                row,
                d,
                mask,
                d < D,
                stride_xt,
                token_scale_ptr,
                channel_scale_ptr,
                dtype,
                STORE,
            )
            w = tl.load(
                w_down_ptr + c[None, :].to(tl.int64) * D + d[:, None],
                mask=(c < R)[None, :] & (d < D)[:, None],
                other=0.0,
            )
            u = dot(x, w, u, dtype, PRECISION)
        u = round_to(relu(u + bias_of(b_down_ptr, c, R, dtype)[None, :]), dtype)
        u_at = b.to(tl.int64)[:, None] * R + c[None, :]
        tl.store(u_ptr + u_at, u, mask=mask[:, None] & (c < R)[None, :])
    else:
        copy_tile(
            tile - down_tiles,
            x_ptr,
            out_ptr,
            cu_seqlens_ptr,
            insert_at_ptr,
            order_ptr,
            source_start_ptr,
            token_scale_ptr,
            channel_scale_ptr,
            T,
            B,
            m,
            D,
            stride_xt,
            STORE,
            BLOCK_T,
            BLOCK_D,
        )


@triton.jit(do_not_specialize=COUNTS)
def pools_down_fwd_kernel(
    x_ptr,  # [T, D], a cache, or the output itself
    out_ptr,  # [T + B m, D]
    h_ptr,  # [T, R]
    w_down_ptr,  # [R, D]
    cu_seqlens_ptr,
    insert_at_ptr,
    order_ptr,
    source_start_ptr,
    token_scale_ptr,
    channel_scale_ptr,
    T,
    B,
    m,
    D,
    R,
    stride_xt,
    IN_PLACE: tl.constexpr,
    PRECISION: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """h = W_d x of every row; copies the rows on the way.

    Grid: ceil(T / BLOCK_T) x ceil(R / BLOCK_R) programs; the first column of programs copies.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tile = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = t < T
    b = examples_of(cu_seqlens_ptr, tile * BLOCK_T, B, BLOCK_T)
    place = destination(t, b, mask, m, insert_at_ptr, order_ptr)
    row = source(
        t, b, mask, m, cu_seqlens_ptr, insert_at_ptr, order_ptr, source_start_ptr, IN_PLACE
    )
    copied = t < tl.where(tl.program_id(1) == 0, T, 0)
    h = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for d_first in range(0, D, BLOCK_D):
        d = d_first + tl.arange(0, BLOCK_D)
        x = load_rows(
            x_ptr,
            row,
            d,
            mask,
            d < D,
            stride_xt,
            token_scale_ptr,
            channel_scale_ptr,
            dtype,
            STORE,
        )
        w = tl.load(
            w_down_ptr + c[None, :].to(tl.int64) * D + d[:, None],
            mask=(c < R)[None, :] & (d < D)[:, None],
            other=0.0,
        )
        h = dot(x, w, h, dtype, PRECISION)
        if not IN_PLACE:
            # Read again, from the L2 cache: rows that both a product and a store take lie in one
            # buffer less than the product's other factor, and Triton (3.6, 3.9) fills it again
            # while tensor cores still read it (targets.py looks for that).
            y = load_rows(
                x_ptr,
                row,
                d,
                copied,
                d < D,
                stride_xt,
                token_scale_ptr,
                channel_scale_ptr,
                dtype,
                STORE,
                True,
            )
            inside = copied[:, None] & (d < D)[None, :]
            tl.store(out_ptr + place[:, None] * D + d[None, :], y, mask=inside)
    h_at = t.to(tl.int64)[:, None] * R + c[None, :]
    tl.store(h_ptr + h_at, round_to(h, dtype), mask=mask[:, None] & (c < R)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def read_rows_kernel(
    place_ptr,  # int32 [B]
    cu_seqlens_ptr,
    insert_at_ptr,
    readable_start_ptr,
    readable_count_ptr,
    order_ptr,
    B,
    m,
    LAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The output row of the text row that npg has read, for each example."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = b < B
    t, n = readable(b, mask, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
    if LAST:
        t += n - 1
    place = destination(t, b, mask, m, insert_at_ptr, order_ptr)
    tl.store(place_ptr + b, place.to(tl.int32), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def down_bwd_kernel(
    out_ptr,  # [T + B m, D], the text rows are read
    d_w_ptr,  # fp32 [splits, R, D]
    d_h_ptr,  # [count, R]
    place_ptr,  # int32 [count]
    count,
    D,
    R,
    stride_split,
    chunk,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dW_d = sum over rows of d_h^T x.

    Grid: D blocks x R blocks x splits of `chunk` rows; count is T, or B for npg.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    end = tl.minimum((split + 1) * chunk, count)
    d_w = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for first in range(split * chunk, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        place = tl.load(place_ptr + t, mask=t < end, other=-1)
        # Rows that may not be read can hold anything, and 0 NaN is not 0.
        x = tl.load(
            out_ptr + place.to(tl.int64)[:, None] * D + d[None, :],
            mask=(place >= 0)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        d_h = tl.load(
            d_h_ptr + t.to(tl.int64)[:, None] * R + c[None, :],
            mask=(t < end)[:, None] & (c < R)[None, :],
            other=0.0,
        )
        d_w = dot(tl.trans(d_h), x, d_w, dtype, PRECISION)
    base = d_w_ptr + split.to(tl.int64) * stride_split
    inside = (c < R)[:, None] & (d < D)[None, :]
    tl.store(base + c.to(tl.int64)[:, None] * D + d[None, :], d_w, mask=inside)
