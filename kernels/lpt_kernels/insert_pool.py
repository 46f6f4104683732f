"""Pooling of projected text rows h [T, R] to the bottleneck's units u [B m, R] (appg: means, mppg:
maxima), and back. h is small and still in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import relu, round_to
from .insert_tiles import COUNTS, bias_of
from .rows import destination, examples_of, pooled, pooling_bin, readable


@triton.jit(do_not_specialize=COUNTS)
def pool_fwd_kernel(
    u_ptr,  # [rows, R]; rows = B m
    arg_ptr,  # int32 [rows, R] (mppg)
    h_ptr,  # [T, R]
    b_down_ptr,  # [R]
    cu_seqlens_ptr,
    readable_start_ptr,
    readable_count_ptr,
    rows,
    m,
    R,
    KIND: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """u = relu(Pool(h) + b_d) and where the maxima are. Grid: ceil(rows / BLOCK_P) x R blocks."""
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = row < rows
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    z, arg = pooled(
        row, mask, c, R, m, h_ptr, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr, KIND
    )
    u = round_to(relu(z + bias_of(b_down_ptr, c, R, dtype)[None, :]), dtype)
    at = row.to(tl.int64)[:, None] * R + c[None, :]
    inside = mask[:, None] & (c < R)[None, :]
    tl.store(u_ptr + at, u, mask=inside)
    if KIND == "mppg":
        tl.store(arg_ptr + at, arg, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def pools_bwd_kernel(
    d_h_ptr,  # [T, R]
    place_ptr,  # int32 [T]
    dz_ptr,  # [B m, R]
    arg_ptr,  # int32 [B m, R] (mppg)
    cu_seqlens_ptr,
    insert_at_ptr,
    readable_start_ptr,
    readable_count_ptr,
    order_ptr,
    T,
    B,
    m,
    R,
    KIND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Gradient of each text row's own down-projection, and where the row is in the output (-1: the
    generator did not read it).

    appg: the mean's share of each bin that holds the row; mppg: of the bins and channels whose
    maximum it is. Grid: ceil(T / BLOCK_T) x ceil(R / BLOCK_R).
    """
    t_first = tl.program_id(0) * BLOCK_T
    t = t_first + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = t < T
    b = examples_of(cu_seqlens_ptr, t_first, B, BLOCK_T)
    start, n = readable(b, mask, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
    rank = (t - start).to(tl.int64)
    useful = mask & (rank >= 0) & (rank < n)
    rank = tl.where(useful, rank, 0)
    j_low = (rank * m // n).to(tl.int32)
    j_high = (((rank + 1) * m + n - 1) // n).to(tl.int32)
    d_h = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    bins = tl.where(useful, j_high - j_low, 0)
    for s in range(0, tl.max(bins, axis=0)):
        valid = useful & (s < bins)
        p = b * m + j_low + s
        inside = valid[:, None] & (c < R)[None, :]
        at = p.to(tl.int64)[:, None] * R + c[None, :]
        dz = tl.load(dz_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if KIND == "appg":
            begin, end = pooling_bin(
                p, valid, m, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr
            )
            d_h += dz / tl.maximum(end - begin, 1).to(tl.float32)[:, None]
        else:
            arg = tl.load(arg_ptr + at, mask=inside, other=-1)
            d_h += tl.where(arg == t[:, None], dz, 0.0)
    at = t.to(tl.int64)[:, None] * R + c[None, :]
    inside = mask[:, None] & (c < R)[None, :]
    tl.store(d_h_ptr + at, round_to(d_h, d_h_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        place = destination(t, b, mask, m, insert_at_ptr, order_ptr).to(tl.int32)
        tl.store(place_ptr + t, tl.where(useful, place, -1), mask=mask)
