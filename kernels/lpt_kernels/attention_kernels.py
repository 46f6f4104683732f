"""The kernels of attention.py: softmax(q k^T scale) v (Vaswani et al. 2017, section 3.2.1) within
texts that lie packed one after another; backward and the logarithms of sums that it keeps as in
FlashAttention-2 (Dao 2023, algorithms 1 and 2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, round_to

# Numbers that change from batch to batch; a variant of the machine code for each would be waste.
COUNTS = ("N",)


@triton.jit
def rows_of(x_ptr, start, r, n, stride, column, d, D):
    """Rows r of a text that begins at row `start` and has n, columns column + d: [BLOCK, BLOCK_D],
    zeros beyond them.
    """
    at = (start + r).to(tl.int64)[:, None] * stride + (column + d)[None, :]
    return tl.load(x_ptr + at, mask=(r < n)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def put_rows(x_ptr, x, start, r, n, stride, column, d, D):
    """Stores what `rows_of` would load, rounded to its dtype."""
    at = (start + r).to(tl.int64)[:, None] * stride + (column + d)[None, :]
    inside = (r < n)[:, None] & (d < D)[None, :]
    tl.store(x_ptr + at, round_to(x, x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def seen_by(r, c, n, CAUSAL: tl.constexpr):
    """Whether row r looks at row c, [rows, columns]; rows beyond the text look at none."""
    seen = (r < n)[:, None] & (c < n)[None, :]
    if CAUSAL:
        seen &= c[None, :] <= r[:, None]
    return seen


@triton.jit
def chances_and_gradient(
    q,  # [rows, BLOCK_D]
    k,  # [columns, BLOCK_D]
    v,
    d_out,  # [rows, BLOCK_D]
    lse,  # [rows], logarithms to base 2
    seen,  # [rows, columns]
    scale_log2,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Probabilities p (0 where nothing is seen) and their gradient, fp32 [rows, columns]."""
    scores = tl.zeros((q.shape[0], k.shape[0]), dtype=tl.float32)
    scores = dot(q, tl.trans(k), scores, dtype, PRECISION)
    p = tl.where(seen, tl.exp2(scores * scale_log2 - lse[:, None]), 0.0)
    d_p = tl.zeros((q.shape[0], k.shape[0]), dtype=tl.float32)
    return p, dot(d_out, tl.trans(v), d_p, dtype, PRECISION)


@triton.jit(do_not_specialize=COUNTS)
def attend_fwd_kernel(
    q_ptr,  # [N, H D]
    k_ptr,  # [N, Hk D]
    v_ptr,
    out_ptr,  # [N, H D]
    lse_ptr,  # fp32 [H, N]
    cu_seqlens_ptr,
    N,
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    D,
    scale_log2,
    H: tl.constexpr,
    REPEAT: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: texts H x ceil(longest / BLOCK_S). Programs beyond the end of their text are done at
    once.
    """
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    h = tl.program_id(0) % H
    b = tl.program_id(0) // H
    first = tl.program_id(1) * BLOCK_S
    start = tl.load(cu_seqlens_ptr + b)
    n = tl.load(cu_seqlens_ptr + b + 1) - start
    if first < n:
        d = tl.arange(0, BLOCK_D)
        r = first + tl.arange(0, BLOCK_S)
        q = rows_of(q_ptr, start, r, n, stride_q, h * D, d, D)
        kv_column = (h // REPEAT) * D
        top = tl.full((BLOCK_S,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_S,), dtype=tl.float32)
        out = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
        end = n
        if CAUSAL:
            end = tl.minimum(n, first + BLOCK_S)
        for c_first in range(0, end, BLOCK_S):
            c = c_first + tl.arange(0, BLOCK_S)
            k = rows_of(k_ptr, start, c, n, stride_k, kv_column, d, D)
            scores = tl.zeros((BLOCK_S, BLOCK_S), dtype=tl.float32)
            scores = dot(q, tl.trans(k), scores, dtype, PRECISION) * scale_log2
            # Rows beyond the text look at its keys too, so that no row sees nothing.
            seen = (c < n)[None, :] & (r >= 0)[:, None]
            if CAUSAL:
                seen &= c[None, :] <= r[:, None]
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            p = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, axis=1)
            v = rows_of(v_ptr, start, c, n, stride_v, kv_column, d, D)
            out = dot(p, v, out * shrink[:, None], dtype, PRECISION)
            top = higher
        put_rows(out_ptr, out / total[:, None], start, r, n, stride_out, h * D, d, D)
        lse_at = h.to(tl.int64) * N + start + r
        tl.store(lse_ptr + lse_at, top + tl.log2(total), mask=r < n)


@triton.jit(do_not_specialize=COUNTS)
def attend_bwd_kernel(
    q_ptr,  # [N, H D]
    k_ptr,  # [N, Hk D]
    v_ptr,
    d_out_ptr,  # [N, H D]
    lse_ptr,  # fp32 [H, N]
    d_q_ptr,  # [N, H D]
    d_k_ptr,  # [N, Hk D]
    d_v_ptr,
    cu_seqlens_ptr,
    N,
    stride_q,
    stride_k,
    stride_v,
    stride_d_out,
    stride_dq,
    stride_dk,
    stride_dv,
    D,
    scale_log2,
    scale,
    most,  # rows of each text whose gradients are stored
    H: tl.constexpr,
    REPEAT: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Texts of at most BLOCK_S rows, whole. Grid: texts Hk."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    g = tl.program_id(0) % (H // REPEAT)
    b = tl.program_id(0) // (H // REPEAT)
    start = tl.load(cu_seqlens_ptr + b)
    n = tl.load(cu_seqlens_ptr + b + 1) - start
    if n <= BLOCK_S:
        d = tl.arange(0, BLOCK_D)
        r = tl.arange(0, BLOCK_S)
        kept = tl.minimum(n, most)
        seen = seen_by(r, r, n, CAUSAL)
        k = rows_of(k_ptr, start, r, n, stride_k, g * D, d, D)
        v = rows_of(v_ptr, start, r, n, stride_v, g * D, d, D)
        d_k = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
        d_v = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
        for i in range(0, REPEAT):
            h = g * REPEAT + i
            q = rows_of(q_ptr, start, r, n, stride_q, h * D, d, D)
            d_out = rows_of(d_out_ptr, start, r, n, stride_d_out, h * D, d, D)
            lse = tl.load(lse_ptr + h.to(tl.int64) * N + start + r, mask=r < n, other=0.0)
            p, d_p = chances_and_gradient(q, k, v, d_out, lse, seen, scale_log2, dtype, PRECISION)
            # (All of a row's keys are here, so `out` is not needed for this sum.)
            delta = tl.sum(p * d_p, axis=1)
            d_s = tl.where(seen, p * (d_p - delta[:, None]) * scale, 0.0)
            d_v = dot(tl.trans(p), d_out, d_v, dtype, PRECISION)
            d_k = dot(tl.trans(d_s), q, d_k, dtype, PRECISION)
            d_q = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
            d_q = dot(d_s, k, d_q, dtype, PRECISION)
            put_rows(d_q_ptr, d_q, start, r, kept, stride_dq, h * D, d, D)
        put_rows(d_k_ptr, d_k, start, r, kept, stride_dk, g * D, d, D)
        put_rows(d_v_ptr, d_v, start, r, kept, stride_dv, g * D, d, D)


@triton.jit(do_not_specialize=COUNTS)
def attend_long_bwd_kernel(
    q_ptr,  # [N, H D]
    k_ptr,  # [N, Hk D]
    v_ptr,
    out_ptr,  # [N, H D]
    d_out_ptr,
    lse_ptr,  # fp32 [H, N]
    d_q_ptr,  # [N, H D]
    d_k_ptr,  # [N, Hk D]
    d_v_ptr,
    cu_seqlens_ptr,
    N,
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    stride_d_out,
    stride_dq,
    stride_dk,
    stride_dv,
    D,
    scale_log2,
    scale,
    most,
    H: tl.constexpr,
    REPEAT: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Texts of more than BLOCK_S rows: a program makes the gradients of one block of queries, then
    of the same block as keys and values. Grid: texts Hk x blocks.
    """
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    g = tl.program_id(0) % (H // REPEAT)
    b = tl.program_id(0) // (H // REPEAT)
    first = tl.program_id(1) * BLOCK_S
    start = tl.load(cu_seqlens_ptr + b)
    n = tl.load(cu_seqlens_ptr + b + 1) - start
    if (n > BLOCK_S) & (first < n):
        d = tl.arange(0, BLOCK_D)
        own = first + tl.arange(0, BLOCK_S)
        kept = tl.minimum(n, most)
        for i in range(0, REPEAT):
            h = g * REPEAT + i
            q = rows_of(q_ptr, start, own, n, stride_q, h * D, d, D)
            out = rows_of(out_ptr, start, own, n, stride_out, h * D, d, D)
            d_out = rows_of(d_out_ptr, start, own, n, stride_d_out, h * D, d, D)
            lse = tl.load(lse_ptr + h.to(tl.int64) * N + start + own, mask=own < n, other=0.0)
            delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), axis=1)
            d_q = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
            end = n
            if CAUSAL:
                end = tl.minimum(n, first + BLOCK_S)
            for c_first in range(0, end, BLOCK_S):
                c = c_first + tl.arange(0, BLOCK_S)
                k = rows_of(k_ptr, start, c, n, stride_k, g * D, d, D)
                v = rows_of(v_ptr, start, c, n, stride_v, g * D, d, D)
                seen = seen_by(own, c, n, CAUSAL)
                p, d_p = chances_and_gradient(
                    q, k, v, d_out, lse, seen, scale_log2, dtype, PRECISION
                )
                d_s = tl.where(seen, p * (d_p - delta[:, None]) * scale, 0.0)
                d_q = dot(d_s, k, d_q, dtype, PRECISION)
            put_rows(d_q_ptr, d_q, start, own, kept, stride_dq, h * D, d, D)
        k = rows_of(k_ptr, start, own, n, stride_k, g * D, d, D)
        v = rows_of(v_ptr, start, own, n, stride_v, g * D, d, D)
        d_k = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
        d_v = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
        begin = 0
        if CAUSAL:
            begin = first
        for i in range(0, REPEAT):
            h = g * REPEAT + i
            for r_first in range(begin, n, BLOCK_S):
                r = r_first + tl.arange(0, BLOCK_S)
                q = rows_of(q_ptr, start, r, n, stride_q, h * D, d, D)
                out = rows_of(out_ptr, start, r, n, stride_out, h * D, d, D)
                d_out = rows_of(d_out_ptr, start, r, n, stride_d_out, h * D, d, D)
                lse = tl.load(lse_ptr + h.to(tl.int64) * N + start + r, mask=r < n, other=0.0)
                seen = seen_by(r, own, n, CAUSAL)
                p, d_p = chances_and_gradient(
                    q, k, v, d_out, lse, seen, scale_log2, dtype, PRECISION
                )
                delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), axis=1)
                d_s = tl.where(seen, p * (d_p - delta[:, None]) * scale, 0.0)
                d_v = dot(tl.trans(p), d_out, d_v, dtype, PRECISION)
                d_k = dot(tl.trans(d_s), q, d_k, dtype, PRECISION)
        put_rows(d_k_ptr, d_k, start, own, kept, stride_dk, g * D, d, D)
        put_rows(d_v_ptr, d_v, start, own, kept, stride_dv, g * D, d, D)
