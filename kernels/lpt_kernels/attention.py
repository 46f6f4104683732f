"""Attention within short texts that lie packed one after another.

Kernels made for long texts work in blocks of 128 rows and spend most of each on nothing where texts
have some thirty: here a program takes a text and a head in one block of 64 rows, forward and
backward, and a text of more rows in several. Nothing is summed by atomics: two runs are equal to
the bit. Formulas: softmax(q k^T scale) v (Vaswani et al. 2017, section 3.2.1); backward and the
logarithms of sums that it keeps as in FlashAttention-2 (Dao 2023, algorithms 1 and 2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import dot, round_to
from .launch import ceil_div, launch, next_power_of_2, on_hopper, precision_of

# Rows: on sm_90 one step of its tensor cores; more than 32 spill elsewhere.
BLOCK, BLOCK_ELSEWHERE = 64, 32
# Columns of a head: wider ones spill (sm_90, of 128 in the backward: 264 bytes a thread).
MAX_HEAD = 64
# Texts of so many rows in the mean and at most are better off here than with PyTorch's own kernel.
MEAN_ROWS, MAX_ROWS = 96, 1024
# Numbers that change from batch to batch; a variant of the machine code for each would be waste.
COUNTS = ("N",)
_LOG2_E = 1.4426950408889634


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


def takes(rows: int, texts: int, longest: int, head: int) -> bool:
    """Whether texts are short enough, from what the host knows without waiting for a GPU.

    Args:
        rows, texts: N and B. longest: bound of a text's rows. head: columns of a head.
    """
    return rows <= MEAN_ROWS * texts and longest <= MAX_ROWS and head <= MAX_HEAD


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
    most: int | None = None,
) -> Tensor:
    """softmax(q k^T scale) v within each text, for autograd.

    Args:
        q: [N, H d]; k, v: [N, Hk d]; of one dtype.
        cu_seqlens: int32 [B + 1], where texts begin; every row belongs to one.
        longest: at least the rows of the longest text.
        heads, kv_heads: H and Hk, which divides H.
        scale: of the scores.
        causal: whether a row sees only those before it (and itself).
        most: gradients of q, k and v are made for the first so many rows of each text alone, the
            others are not set; None: for all.

    Returns:
        [N, H d].
    """
    return _Attend.apply(q, k, v, cu_seqlens, longest, heads, kv_heads, scale, causal, most)


def _dense_columns(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, longest, heads, kv_heads, scale, causal, most):
        q, k, v = map(_dense_columns, (q, k, v))
        out = q.new_empty(q.shape)
        lse = q.new_empty((heads, len(q)), dtype=torch.float32)
        D = q.shape[1] // heads
        block = BLOCK if on_hopper() else BLOCK_ELSEWHERE
        block = min(block, next_power_of_2(longest, 16))
        ctx.common = dict(
            cu_seqlens_ptr=cu_seqlens,
            N=len(q),
            stride_q=q.stride(0),
            stride_k=k.stride(0),
            stride_v=v.stride(0),
            D=D,
            scale_log2=scale * _LOG2_E,
            H=heads,
            REPEAT=heads // kv_heads,
            CAUSAL=causal,
            PRECISION=precision_of(q.dtype),
            BLOCK_S=block,
            BLOCK_D=next_power_of_2(D, 16),
        )
        texts = len(cu_seqlens) - 1
        ctx.settings = (texts, kv_heads, ceil_div(longest, block), scale, longest, most)
        launch(
            attend_fwd_kernel,
            (texts * heads, ceil_div(longest, block)),
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            out_ptr=out,
            stride_out=out.stride(0),
            lse_ptr=lse,
            num_warps=4,
            num_stages=1,
            **ctx.common,
        )
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        texts, kv_heads, blocks, scale, longest, most = ctx.settings
        d_out = _dense_columns(d_out)
        d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
        arguments = dict(
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            d_out_ptr=d_out,
            lse_ptr=lse,
            d_q_ptr=d_q,
            d_k_ptr=d_k,
            d_v_ptr=d_v,
            stride_d_out=d_out.stride(0),
            stride_dq=d_q.stride(0),
            stride_dk=d_k.stride(0),
            stride_dv=d_v.stride(0),
            scale=scale,
            most=longest if most is None else most,
            num_warps=4,
            num_stages=1,
            **ctx.common,
        )
        launch(attend_bwd_kernel, (texts * kv_heads,), **arguments)
        if blocks > 1:
            if most is not None:
                blocks = ceil_div(most, ctx.common["BLOCK_S"])
            arguments.update(out_ptr=out, stride_out=out.stride(0))
            launch(attend_long_bwd_kernel, (texts * kv_heads, blocks), **arguments)
        return d_q, d_k, d_v, *[None] * 7
