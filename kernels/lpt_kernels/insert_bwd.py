"""Backward kernels of the fused prompt insertion.

They read the prompt rows of the incoming gradient and, where the generator read text, the text rows
of the packed output (which the layers above keep anyway, so that the input can be freed). Sums over
rows go to partial sums in fp32 that are added in a fixed order, never through atomics: two runs are
equal to the bit. In order: dz of the prompt rows, the gradient of W_u, what dz means for the
down-projection of each text row (d_h), the gradient of W_d, and that of the text.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, keep_scale, round_to
from .rows import (
    destination,
    examples_of,
    pooling_bin,
    prompt_start,
    readable,
    source,
)

# Numbers that change from batch to batch; a variant of the machine code for each would be waste.
COUNTS = ("T", "B", "rows", "count", "splits", "chunk")


@triton.jit
def prompt_grad(grad_ptr, place, p, d, mask, D, stride_gt, seed_ptr, p_drop, DROP: tl.constexpr):
    """Gradient of prompt rows behind their dropout, fp32 [BLOCK_P, BLOCK_D].

    place: output rows int64, p: prompt rows counted through, int64, mask: [BLOCK_P, BLOCK_D].
    """
    g = tl.load(grad_ptr + place[:, None] * stride_gt + d[None, :], mask=mask, other=0.0)
    if DROP:
        g = g.to(tl.float32) * keep_scale(seed_ptr, p[:, None], d[None, :], D, p_drop)
    return g


@triton.jit(do_not_specialize=COUNTS)
def static_bwd_kernel(
    grad_ptr,  # [T + B m, D]
    d_prompt_ptr,  # fp32 [splits, m, D] (SHARED) or [B, m, D]
    seed_ptr,
    cu_seqlens_ptr,
    insert_at_ptr,
    B,
    m,
    D,
    stride_gt,
    p_drop,
    chunk,
    SHARED: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of given prompts. Grid: m x ceil(D / BLOCK_D) x splits of `chunk` examples."""
    j = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(2) * chunk
    end = tl.minimum(first + chunk, B)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for b_first in range(first, end, BLOCK_B):
        b = b_first + tl.arange(0, BLOCK_B)
        mask = b < end
        place = prompt_start(b, mask, m, cu_seqlens_ptr, insert_at_ptr) + j
        p = b.to(tl.int64) * m + j
        inside = mask[:, None] & (d < D)[None, :]
        g = prompt_grad(grad_ptr, place, p, d, inside, D, stride_gt, seed_ptr, p_drop, DROP)
        g = g.to(tl.float32)
        if SHARED:
            total += tl.sum(g, axis=0)
        else:
            tl.store(d_prompt_ptr + p[:, None] * D + d[None, :], g, mask=inside)
    if SHARED:
        at = (tl.program_id(2).to(tl.int64) * m + j) * D + d
        tl.store(d_prompt_ptr + at, total, mask=d < D)


@triton.jit(do_not_specialize=COUNTS)
def up_bwd_kernel(
    grad_ptr,  # [T + B m, D]
    dz_ptr,  # [rows, R] where there is one split, else fp32 [splits, rows, R]
    place_ptr,  # int32 [rows], written
    u_ptr,
    w_up_ptr,
    seed_ptr,
    cu_seqlens_ptr,
    insert_at_ptr,
    rows,
    m,
    D,
    R,
    stride_gt,
    p_drop,
    parts,
    part_width,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dz = W_u^T dP. Grid: ceil(rows / BLOCK_P) x ceil(R / BLOCK_R) x splits: `parts` of
    `part_width` columns of D, for npg those of each of the m prompt rows. With one split (WHOLE)
    the ReLU's mask is applied here, else in `dz_bwd_kernel`. Notes on the way in which row of the
    output each row's prompt is, or begins (npg).
    """
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = row < rows
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    d_begin = (split % parts) * part_width
    d_end = tl.minimum(d_begin + part_width, D)
    w_first = d_begin.to(tl.int64) * 0
    if KIND == "npg":
        b = row
        j = row * 0 + split // parts
        w_first += (split // parts).to(tl.int64) * D
    else:
        b = row // m
        j = row % m
    start = prompt_start(b, mask, m, cu_seqlens_ptr, insert_at_ptr)
    place = start + j
    if (split == 0) & (tl.program_id(1) == 0):
        noted = start if KIND == "npg" else place
        tl.store(place_ptr + row, noted.to(tl.int32), mask=mask)
    p = b.to(tl.int64) * m + j
    dz = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
    for d_first in range(d_begin, d_end, BLOCK_D):
        d = d_first + tl.arange(0, BLOCK_D)
        inside = mask[:, None] & (d < d_end)[None, :]
        g = prompt_grad(grad_ptr, place, p, d, inside, D, stride_gt, seed_ptr, p_drop, DROP)
        w = tl.load(
            w_up_ptr + (w_first + d)[:, None] * R + c[None, :],
            mask=(d < d_end)[:, None] & (c < R)[None, :],
            other=0.0,
        )
        dz = dot(g, w, dz, dtype, PRECISION)
    inside = mask[:, None] & (c < R)[None, :]
    if WHOLE:
        u = tl.load(u_ptr + row.to(tl.int64)[:, None] * R + c[None, :], mask=inside, other=0.0)
        dz = round_to(tl.where(u <= 0, 0.0, dz), dtype)
        tl.store(dz_ptr + row.to(tl.int64)[:, None] * R + c[None, :], dz, mask=inside)
    else:
        at = (split.to(tl.int64) * rows + row)[:, None] * R + c[None, :]
        tl.store(dz_ptr + at, dz, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def dz_bwd_kernel(
    partial_ptr,  # fp32 [splits, rows, R]
    dz_ptr,  # [rows, R]
    u_ptr,
    rows,
    R,
    splits,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partial sums added in order, behind the ReLU. Grid: ceil(rows / BLOCK_P) x R blocks."""
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = row < rows
    inside = mask[:, None] & (c < R)[None, :]
    dz = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
    for split in range(0, splits):
        at = (tl.cast(split, tl.int64) * rows + row)[:, None] * R + c[None, :]
        dz += tl.load(partial_ptr + at, mask=inside, other=0.0)
    u = tl.load(u_ptr + row.to(tl.int64)[:, None] * R + c[None, :], mask=inside, other=0.0)
    dz = round_to(tl.where(u <= 0, 0.0, dz), dz_ptr.dtype.element_ty)
    tl.store(dz_ptr + row.to(tl.int64)[:, None] * R + c[None, :], dz, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def up_bwd_weight_kernel(
    grad_ptr,  # [T + B m, D]
    d_w_ptr,  # fp32 [splits, (N + 1) R + N] of which [N, R] here; N = D, npg: m D
    u_ptr,
    place_ptr,  # int32 [rows], of `up_bwd_kernel`
    seed_ptr,
    rows,
    m,
    D,
    R,
    stride_gt,
    stride_split,
    p_drop,
    chunk,
    KIND: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dW_u = sum over rows of dP^T u, and behind it db_u = sum of dP, [N].

    Grid: column blocks of N x ceil(R / BLOCK_R) x splits of `chunk` rows. The last rows come first:
    `up_bwd_kernel` has just read them.
    """
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    columns = tl.cdiv(D, BLOCK_D)
    block = tl.program_id(0)
    d = (block % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.num_programs(2) - 1 - tl.program_id(2)
    end = tl.minimum((split + 1) * chunk, rows)
    d_w = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
    # Sums by a product with a column of ones: see pools_down_fwd_kernel for what happens to rows
    # that both a product and something else take.
    ones = tl.zeros((BLOCK_P, 16), dtype=tl.float32) + tl.where(tl.arange(0, 16) == 0, 1.0, 0.0)
    d_b = tl.zeros((BLOCK_D, 16), dtype=tl.float32)
    for row_first in range(split * chunk, end, BLOCK_P):
        row = row_first + tl.arange(0, BLOCK_P)
        mask = row < end
        if KIND == "npg":
            b = row
            j = row * 0 + block // columns
        else:
            b = row // m
            j = row % m
        place = tl.load(place_ptr + row, mask=mask, other=0).to(tl.int64)
        if KIND == "npg":
            place += j
        p = b.to(tl.int64) * m + j
        inside = mask[:, None] & (d < D)[None, :]
        g = prompt_grad(grad_ptr, place, p, d, inside, D, stride_gt, seed_ptr, p_drop, DROP)
        u = tl.load(
            u_ptr + row.to(tl.int64)[:, None] * R + c[None, :],
            mask=mask[:, None] & (c < R)[None, :],
            other=0.0,
        )
        d_w = dot(tl.trans(g), u, d_w, dtype, PRECISION)
        d_b = dot(tl.trans(g), ones, d_b, dtype, PRECISION)
    w_row = d.to(tl.int64)
    N = D
    if KIND == "npg":
        w_row += (block // columns).to(tl.int64) * D
        N *= m
    base = d_w_ptr + split.to(tl.int64) * stride_split
    inside = (d < D)[:, None] & (c < R)[None, :]
    tl.store(base + w_row[:, None] * R + c[None, :], d_w, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(base + tl.cast(N, tl.int64) * R + w_row, tl.sum(d_b, axis=1), mask=d < D)


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


@triton.jit(do_not_specialize=COUNTS)
def hidden_bwd_kernel(
    grad_ptr,  # [T + B m, D]
    d_x_ptr,  # [rows of hidden, D]
    w_down_ptr,
    d_h_ptr,  # [count, R]
    cu_seqlens_ptr,
    insert_at_ptr,
    readable_start_ptr,
    readable_count_ptr,
    order_ptr,
    count,
    B,
    m,
    D,
    R,
    stride_gt,
    READ: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of hidden: that of its row in the output, plus W_d^T d_h where `d_h` is given.

    READ: of the one row of each example that npg has read (count = B), else of every text row
    (count = T). Grid: ceil(count / BLOCK_T) programs, each over whole rows.
    """
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    first = tl.program_id(0) * BLOCK_T
    i = first + tl.arange(0, BLOCK_T)
    mask = i < count
    if READ:
        b = i
        t, n = readable(b, mask, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
        if LAST:
            t += n - 1
    else:
        t = i
        b = examples_of(cu_seqlens_ptr, first, B, BLOCK_T)
    place = destination(t, b, mask, m, insert_at_ptr, order_ptr)
    row = source(t, b, mask, m, cu_seqlens_ptr, insert_at_ptr, order_ptr, None, False)
    c = tl.arange(0, BLOCK_R)
    at = i.to(tl.int64)[:, None] * R + c[None, :]
    if d_h_ptr is not None and ONE_R:
        d_h = tl.load(d_h_ptr + at, mask=mask[:, None] & (c < R)[None, :], other=0.0)
    for d_first in range(0, D, BLOCK_D):
        d = d_first + tl.arange(0, BLOCK_D)
        inside = mask[:, None] & (d < D)[None, :]
        g = tl.load(grad_ptr + place[:, None] * stride_gt + d[None, :], mask=inside, other=0.0)
        if d_h_ptr is not None:
            g = g.to(tl.float32)
            if ONE_R:
                w = tl.load(
                    w_down_ptr + c.to(tl.int64)[:, None] * D + d[None, :],
                    mask=(c < R)[:, None] & (d < D)[None, :],
                    other=0.0,
                )
                g = dot(d_h, w, g, dtype, PRECISION)
            else:
                for c_first in range(0, R, BLOCK_R):
                    k = c_first + c
                    part = tl.load(
                        d_h_ptr + c_first + at, mask=mask[:, None] & (k < R)[None, :], other=0.0
                    )
                    w = tl.load(
                        w_down_ptr + k.to(tl.int64)[:, None] * D + d[None, :],
                        mask=(k < R)[:, None] & (d < D)[None, :],
                        other=0.0,
                    )
                    g = dot(part, w, g, dtype, PRECISION)
            g = round_to(g, dtype)
        tl.store(d_x_ptr + row[:, None] * D + d[None, :], g, mask=inside)
