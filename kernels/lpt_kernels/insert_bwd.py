"""Backward kernels of the fused prompt insertion.

They read the prompt rows of the incoming gradient and, where the generator pooled text, the text
rows of the packed output (which the layers above keep anyway, so that the input can be freed).
Sums over rows go to partial sums in fp32, never through atomics: two runs are equal to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, example_of, keep_scale, relu, round_to
from .rows import (
    bottleneck,
    destination,
    pooling_bin,
    prompt_rows_of,
    prompt_start,
    readable,
    source,
)

# Numbers that change from batch to batch; a variant of the machine code for each would be waste.
COUNTS = ("T", "B", "rows")


@triton.jit
def prompt_grad(grad_ptr, place, p, d, mask, D, stride_gt, seed_ptr, p_drop, DROP: tl.constexpr):
    """Gradient of prompt rows behind their dropout, fp32 [BLOCK_P, BLOCK_D].

    place: output rows int64, p: prompt rows counted through, int64, mask: [BLOCK_P, BLOCK_D].
    """
    g = tl.load(grad_ptr + place[:, None] * stride_gt + d[None, :], mask=mask, other=0.0)
    g = g.to(tl.float32)
    if DROP:
        g *= keep_scale(seed_ptr, p[:, None], d[None, :], D, p_drop)
    return g


@triton.jit(do_not_specialize=COUNTS)
def static_bwd_kernel(
    grad_ptr,  # [T + B m, D]
    d_prompt_ptr,  # fp32 [m, D] (SHARED) or [B, m, D]
    seed_ptr,
    cu_seqlens_ptr,
    insert_at_ptr,
    B,
    m,
    D,
    stride_gt,
    p_drop,
    SHARED: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of given prompts. Grid: m x ceil(D / BLOCK_D) programs, each over all examples."""
    j = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for b_first in range(0, B, BLOCK_B):
        b = b_first + tl.arange(0, BLOCK_B)
        mask = b < B
        place = prompt_start(b, mask, m, cu_seqlens_ptr, insert_at_ptr) + j
        p = b.to(tl.int64) * m + j
        inside = mask[:, None] & (d < D)[None, :]
        g = prompt_grad(grad_ptr, place, p, d, inside, D, stride_gt, seed_ptr, p_drop, DROP)
        if SHARED:
            total += tl.sum(g, axis=0)
        else:
            tl.store(d_prompt_ptr + p[:, None] * D + d[None, :], g, mask=inside)
    if SHARED:
        tl.store(d_prompt_ptr + j.to(tl.int64) * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=COUNTS)
def up_bwd_kernel(
    grad_ptr,  # [T + B m, D]
    dz_ptr,  # npg: fp32 [splits, B, R], before the ReLU's mask; else [B m, R], behind it
    z_ptr,
    left_ptr,
    b_down_ptr,
    w_up_ptr,
    seed_ptr,
    cu_seqlens_ptr,
    insert_at_ptr,
    readable_start_ptr,
    readable_count_ptr,
    rows,
    m,
    D,
    R,
    stride_gt,
    p_drop,
    KIND: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    J: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dz = W_u^T dP. Grid: ceil(rows / BLOCK_P) x ceil(R / BLOCK_R) x (ceil(m / J) splits for npg,
    each over J prompt rows of every example; else 1).
    """
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = row < rows
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    if KIND == "npg":
        b = row
    else:
        b = row // m
    start = prompt_start(b, mask, m, cu_seqlens_ptr, insert_at_ptr)
    dz = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
    for i in range(0, J):
        if KIND == "npg":
            j = row * 0 + (split * J + i)
        else:
            j = row % m
        p = b.to(tl.int64) * m + j
        p_mask = mask & (j < m)
        for d_first in range(0, D, BLOCK_D):
            d = d_first + tl.arange(0, BLOCK_D)
            w_row = d.to(tl.int64)
            if KIND == "npg":
                w_row += (split * J + i).to(tl.int64) * D
            inside = p_mask[:, None] & (d < D)[None, :]
            g = prompt_grad(grad_ptr, start + j, p, d, inside, D, stride_gt, seed_ptr, p_drop, DROP)
            w = tl.load(
                w_up_ptr + w_row[:, None] * R + c[None, :],
                mask=(d < tl.where(split * J + i < m, D, 0))[:, None] & (c < R)[None, :],
                other=0.0,
            )
            dz = dot(g, w, dz, dtype, PRECISION)
    inside = mask[:, None] & (c < R)[None, :]
    if KIND == "npg":
        at = (split.to(tl.int64) * rows + row)[:, None] * R + c[None, :]
        tl.store(dz_ptr + at, dz, mask=inside)
    else:
        z = bottleneck(
            row,
            mask,
            c,
            R,
            m,
            z_ptr,
            left_ptr,
            b_down_ptr,
            cu_seqlens_ptr,
            readable_start_ptr,
            readable_count_ptr,
            KIND,
            TILE,
        )
        dz = tl.where(z <= 0, 0.0, dz)
        at = row.to(tl.int64)[:, None] * R + c[None, :]
        tl.store(dz_ptr + at, round_to(dz, dtype), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def up_bwd_weight_kernel(
    grad_ptr,  # [T + B m, D]
    d_w_ptr,  # fp32 [splits, D, R], npg: [m D, R]
    d_b_ptr,  # fp32 [splits, D], npg: [m D]
    z_ptr,
    left_ptr,
    b_down_ptr,
    seed_ptr,
    cu_seqlens_ptr,
    insert_at_ptr,
    readable_start_ptr,
    readable_count_ptr,
    rows,
    m,
    D,
    R,
    stride_gt,
    p_drop,
    KIND: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dW_u = sum over rows of dP^T relu(z), db_u = sum of dP. Grid: ceil(D / BLOCK_D) x
    ceil(R / BLOCK_R) x (m for npg, else splits of the rows).
    """
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    if KIND == "npg":
        first = 0
        step = BLOCK_P
    else:
        first = split * BLOCK_P
        step = tl.num_programs(2) * BLOCK_P
    d_w = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
    d_b = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for row_first in range(first, rows, step):
        row = row_first + tl.arange(0, BLOCK_P)
        mask = row < rows
        if KIND == "npg":
            b = row
            j = row * 0 + split
        else:
            b = row // m
            j = row % m
        place = prompt_start(b, mask, m, cu_seqlens_ptr, insert_at_ptr) + j
        p = b.to(tl.int64) * m + j
        inside = mask[:, None] & (d < D)[None, :]
        g = prompt_grad(grad_ptr, place, p, d, inside, D, stride_gt, seed_ptr, p_drop, DROP)
        z = bottleneck(
            row,
            mask,
            c,
            R,
            m,
            z_ptr,
            left_ptr,
            b_down_ptr,
            cu_seqlens_ptr,
            readable_start_ptr,
            readable_count_ptr,
            KIND,
            TILE,
        )
        d_w = dot(tl.trans(g), relu(z), d_w, dtype, PRECISION)
        d_b += tl.sum(g, axis=0)
    w_row = split.to(tl.int64) * D + d
    inside = (d < D)[:, None] & (c < R)[None, :]
    tl.store(d_w_ptr + w_row[:, None] * R + c[None, :], d_w, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(d_b_ptr + w_row, d_b, mask=d < D)


@triton.jit(do_not_specialize=COUNTS)
def npg_down_bwd_kernel(
    out_ptr,  # [T + B m, D], the text rows are read
    d_w_ptr,  # fp32 [R, D]
    d_b_ptr,  # fp32 [R]
    dz_ptr,  # fp32 [B, R], before the ReLU's mask
    z_ptr,
    b_down_ptr,
    cu_seqlens_ptr,
    insert_at_ptr,
    readable_start_ptr,
    readable_count_ptr,
    order_ptr,
    B,
    m,
    D,
    R,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dW_d = sum over examples of dz h^T, db_d = sum of dz. Grid: D blocks x R blocks."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    bias = tl.load(b_down_ptr + c, mask=c < R, other=0.0).to(tl.float32)
    d_w = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    d_b = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for b_first in range(0, B, BLOCK_B):
        b = b_first + tl.arange(0, BLOCK_B)
        mask = b < B
        inside = mask[:, None] & (c < R)[None, :]
        at = b.to(tl.int64)[:, None] * R + c[None, :]
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        dz = tl.load(dz_ptr + at, mask=inside, other=0.0)
        dz = tl.where(z <= 0, 0.0, dz)
        t, n = readable(b, mask, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
        if LAST:
            t += n - 1
        row = destination(t, b, mask, m, insert_at_ptr, order_ptr)
        x = tl.load(
            out_ptr + row[:, None] * D + d[None, :],
            mask=mask[:, None] & (d < D)[None, :],
            other=0.0,
        )
        d_w = dot(tl.trans(dz), x, d_w, dtype, PRECISION)
        d_b += tl.sum(dz, axis=0)
    inside = (c < R)[:, None] & (d < D)[None, :]
    tl.store(d_w_ptr + c.to(tl.int64)[:, None] * D + d[None, :], d_w, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(d_b_ptr + c, d_b, mask=c < R)


@triton.jit
def dz_of_tokens(
    t,  # [BLOCK_T]
    b,
    mask,
    c,  # [BLOCK_R]
    R,
    m,
    dz_ptr,
    arg_ptr,
    left_ptr,
    left_arg_ptr,
    z_ptr,
    cu_seqlens_ptr,
    readable_start_ptr,
    readable_count_ptr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradient of each row's own down-projection, fp32 [BLOCK_T, BLOCK_R].

    appg: the mean's share of each bin that holds the row; mppg: of the bins and channels whose
    maximum it is.
    """
    start, n = readable(b, mask, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
    rank = (t - start).to(tl.int64)
    useful = mask & (rank >= 0) & (rank < n)
    rank = tl.where(useful, rank, 0)
    j_low = (rank * m // n).to(tl.int32)
    j_high = (((rank + 1) * m + n - 1) // n).to(tl.int32)
    d_h = tl.zeros((t.shape[0], c.shape[0]), dtype=tl.float32)
    bins = tl.where(useful, j_high - j_low, 0)
    for s in range(0, tl.max(bins, axis=0)):
        valid = useful & (s < bins)
        p = b * m + j_low + s
        inside = valid[:, None] & (c < R)[None, :]
        at = p.to(tl.int64)[:, None] * R + c[None, :]
        dz = tl.load(dz_ptr + at, mask=inside, other=0.0).to(tl.float32)
        begin, end = pooling_bin(
            p, valid, m, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr
        )
        if KIND == "appg":
            d_h += dz / tl.maximum(end - begin, 1).to(tl.float32)[:, None]
        else:
            arg = tl.load(arg_ptr + at, mask=inside, other=-1)
            best = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
            span = tl.where(valid, (end - 1) // TILE - begin // TILE, 0)
            for k in range(1, tl.max(span, axis=0) + 1):
                more = inside & (k <= span)[:, None]
                left_at = (begin // TILE + k).to(tl.int64)[:, None] * R + c[None, :]
                share = tl.load(left_ptr + left_at, mask=more, other=float("-inf"))
                share = share.to(tl.float32)
                share_arg = tl.load(left_arg_ptr + left_at, mask=more, other=-1)
                better = share > best
                best = tl.where(better, share, best)
                arg = tl.where(better, share_arg, arg)
            d_h += tl.where(arg == t[:, None], dz, 0.0)
    return d_h


@triton.jit(do_not_specialize=COUNTS)
def down_bwd_kernel(
    out_ptr,  # [T + B m, D], the text rows are read
    d_w_ptr,  # fp32 [splits, R, D]
    dz_ptr,  # [B m, R]
    z_ptr,
    arg_ptr,
    left_ptr,
    left_arg_ptr,
    cu_seqlens_ptr,
    insert_at_ptr,
    readable_start_ptr,
    readable_count_ptr,
    order_ptr,
    T,
    B,
    m,
    D,
    R,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dW_d over blocks of text rows. Grid: D blocks x R blocks x splits of the text.

    appg pools before it multiplies, as the forward pass does; mppg gives each row the gradient of
    the channels that chose it.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    d_w = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for block in range(split, tl.cdiv(T, BLOCK_T), tl.num_programs(2)):
        t_first = block * BLOCK_T
        t = t_first + tl.arange(0, BLOCK_T)
        mask = t < T
        b = example_of(cu_seqlens_ptr, tl.minimum(t, T - 1), B, STEPS)
        start, n = readable(b, mask, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
        useful = mask & (t >= start) & (t < start + n)
        row = destination(t, b, mask, m, insert_at_ptr, order_ptr)
        x = tl.load(
            out_ptr + row[:, None] * D + d[None, :],
            mask=useful[:, None] & (d < D)[None, :],
            other=0.0,
        )
        if KIND == "appg":
            p_low, p_high = prompt_rows_of(
                t_first,
                tl.minimum(t_first + BLOCK_T, T),
                tl.min(b, axis=0),
                tl.max(b, axis=0),
                m,
                cu_seqlens_ptr,
                readable_start_ptr,
                readable_count_ptr,
            )
            for p_first in range(p_low, p_high, BLOCK_P):
                p = p_first + tl.arange(0, BLOCK_P)
                p_mask = p < p_high
                begin, end = pooling_bin(
                    p, p_mask, m, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr
                )
                member = (t[None, :] >= begin[:, None]) & (t[None, :] < end[:, None])
                share = 1.0 / tl.maximum(end - begin, 1).to(tl.float32)
                pooled = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
                pooled = dot(member.to(tl.float32), x, pooled, dtype, PRECISION) * share[:, None]
                dz = tl.load(
                    dz_ptr + p.to(tl.int64)[:, None] * R + c[None, :],
                    mask=p_mask[:, None] & (c < R)[None, :],
                    other=0.0,
                )
                d_w = dot(tl.trans(dz.to(tl.float32)), pooled, d_w, dtype, PRECISION)
        else:
            d_h = dz_of_tokens(
                t,
                b,
                mask,
                c,
                R,
                m,
                dz_ptr,
                arg_ptr,
                left_ptr,
                left_arg_ptr,
                z_ptr,
                cu_seqlens_ptr,
                readable_start_ptr,
                readable_count_ptr,
                KIND,
                TILE,
            )
            d_w = dot(tl.trans(d_h), x, d_w, dtype, PRECISION)
    at = (split.to(tl.int64) * R + c)[:, None] * D + d[None, :]
    tl.store(d_w_ptr + at, d_w, mask=(c < R)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def hidden_bwd_kernel(
    grad_ptr,  # [T + B m, D]
    d_x_ptr,  # [rows of hidden, D]
    w_down_ptr,
    b_down_ptr,
    dz_ptr,
    z_ptr,
    arg_ptr,
    left_ptr,
    left_arg_ptr,
    cu_seqlens_ptr,
    insert_at_ptr,
    readable_start_ptr,
    readable_count_ptr,
    order_ptr,
    T,
    B,
    m,
    D,
    R,
    stride_gt,
    KIND: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of hidden: that of its row in the output, plus W_d^T dz where the generator read it.

    Grid: ceil(T / BLOCK_T) x ceil(D / BLOCK_D) programs.
    """
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = t < T
    b = example_of(cu_seqlens_ptr, tl.minimum(t, T - 1), B, STEPS)
    place = destination(t, b, mask, m, insert_at_ptr, order_ptr)
    row = source(t, b, mask, m, cu_seqlens_ptr, insert_at_ptr, order_ptr, None, False)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (d < D)[None, :]
    g = tl.load(grad_ptr + place[:, None] * stride_gt + d[None, :], mask=inside, other=0.0)
    g = g.to(tl.float32)
    if KIND != "static":
        start, n = readable(b, mask, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
        if KIND == "npg":
            if LAST:
                chosen = mask & (t == start + n - 1)
            else:
                chosen = mask & (t == start)
        else:
            chosen = mask & (t >= start) & (t < start + n)
        # Most tiles hold no row that npg has read.
        if tl.max(chosen.to(tl.int32), axis=0) > 0:
            for c_first in range(0, R, BLOCK_R):
                c = c_first + tl.arange(0, BLOCK_R)
                if KIND == "npg":
                    at = b.to(tl.int64)[:, None] * R + c[None, :]
                    some = chosen[:, None] & (c < R)[None, :]
                    bias = tl.load(b_down_ptr + c, mask=c < R, other=0.0).to(tl.float32)
                    z = tl.load(z_ptr + at, mask=some, other=0.0).to(tl.float32)
                    d_h = tl.load(dz_ptr + at, mask=some, other=0.0).to(tl.float32)
                    d_h = tl.where(z + bias[None, :] <= 0, 0.0, d_h)
                else:
                    d_h = dz_of_tokens(
                        t,
                        b,
                        mask,
                        c,
                        R,
                        m,
                        dz_ptr,
                        arg_ptr,
                        left_ptr,
                        left_arg_ptr,
                        z_ptr,
                        cu_seqlens_ptr,
                        readable_start_ptr,
                        readable_count_ptr,
                        KIND,
                        TILE,
                    )
                w = tl.load(
                    w_down_ptr + c.to(tl.int64)[:, None] * D + d[None, :],
                    mask=(c < R)[:, None] & (d < D)[None, :],
                    other=0.0,
                )
                g = dot(d_h, w, g, dtype, PRECISION)
    tl.store(d_x_ptr + row[:, None] * D + d[None, :], round_to(g, dtype), mask=inside)
