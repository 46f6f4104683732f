"""The up-projection W_u of the bottleneck's units to prompt rows, and its gradients.

Backward reads the prompt rows of the incoming gradient: dz = W_u^T dP, then dW_u and db_u as
partial sums in fp32 that are added in a fixed order, never through atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, keep_scale, round_to
from .insert_tiles import COUNTS, prompt_grad
from .rows import prompt_start


@triton.jit(do_not_specialize=COUNTS)
def up_fwd_kernel(
    out_ptr,  # [T + B m, D]
    u_ptr,  # [rows, R]; rows = B (npg) or B m
    w_up_ptr,  # [m D, R] (npg) or [D, R]
    b_up_ptr,
    seed_ptr,
    cu_seqlens_ptr,
    insert_at_ptr,
    rows,
    m,
    D,
    R,
    p_drop,
    chunk,
    KIND: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Prompt rows W_u u + b_u, dropped out, to their places.

    Grid: column blocks of D, for npg those of each of the m prompt rows, x splits of `chunk` rows.
    A program loads its part of W_u once, where R fits a block, and walks over its rows of u.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    columns = tl.cdiv(D, BLOCK_D)
    block = tl.program_id(0)
    d = (block % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_R)
    w_row = d.to(tl.int64)
    if KIND == "npg":
        w_row += (block // columns).to(tl.int64) * D
    bias = tl.load(b_up_ptr + w_row, mask=d < D, other=0.0).to(tl.float32)
    bias = round_to(bias, dtype).to(tl.float32)
    if ONE_R:
        w = tl.load(
            w_up_ptr + w_row[None, :] * R + c[:, None],
            mask=(d < D)[None, :] & (c < R)[:, None],
            other=0.0,
        )
        w = round_to(w.to(tl.float32), dtype)
    first = tl.program_id(1) * chunk
    end = tl.minimum(first + chunk, rows)
    for row_first in range(first, end, BLOCK_P):
        row = row_first + tl.arange(0, BLOCK_P)
        mask = row < end
        if KIND == "npg":
            b = row
            j = row * 0 + block // columns
        else:
            b = row // m
            j = row % m
        # (Asked for before the products, which hide the wait for it.)
        place = prompt_start(b, mask, m, cu_seqlens_ptr, insert_at_ptr) + j
        prompt = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
        u_at = u_ptr + row.to(tl.int64)[:, None] * R
        if ONE_R:
            u = tl.load(u_at + c[None, :], mask=mask[:, None] & (c < R)[None, :], other=0.0)
            prompt = dot(u, w, prompt, dtype, PRECISION)
        else:
            for c_first in range(0, R, BLOCK_R):
                k = c_first + c
                u = tl.load(u_at + k[None, :], mask=mask[:, None] & (k < R)[None, :], other=0.0)
                w = tl.load(
                    w_up_ptr + w_row[None, :] * R + k[:, None],
                    mask=(d < D)[None, :] & (k < R)[:, None],
                    other=0.0,
                )
                prompt = dot(u, w, prompt, dtype, PRECISION)
        prompt += bias[None, :]
        if DROP:
            p = b.to(tl.int64) * m + j
            prompt *= keep_scale(seed_ptr, p[:, None], d[None, :], D, p_drop)
        inside = mask[:, None] & (d < D)[None, :]
        at = place[:, None] * D + d[None, :]
        tl.store(out_ptr + at, round_to(prompt, dtype), mask=inside)


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
