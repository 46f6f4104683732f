"""Forward kernels of the fused prompt insertion.

Two launches: the first (`*_down_fwd_kernel`) reads every text row once, copies it to its place in
the output and makes what the bottleneck needs on the way: npg z of one row an example, appg and
mppg h = W_d x of every row. The second (`up_fwd_kernel`) pools h, which is small and still in the
L2 cache, and makes the prompt rows. Prompts that need no text (`static`) take one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, keep_scale, load_rows, relu, round_to
from .rows import (
    bottleneck,
    destination,
    examples_of,
    pooled,
    prompt_start,
    readable,
    source,
)

# Numbers that change from batch to batch; a variant of the machine code for each would be waste.
COUNTS = ("T", "B", "rows", "copy_tiles", "down_tiles")


@triton.jit
def copy_tile(
    tile,
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
    STORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Text rows of a tile to their places in the output."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = t < T
    b = examples_of(cu_seqlens_ptr, tile * BLOCK_T, B, BLOCK_T)
    place = destination(t, b, mask, m, insert_at_ptr, order_ptr)
    row = source(t, b, mask, m, cu_seqlens_ptr, insert_at_ptr, order_ptr, source_start_ptr, False)
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
        tl.store(
            out_ptr + place[:, None] * D + d[None, :], x, mask=mask[:, None] & (d < D)[None, :]
        )


@triton.jit(do_not_specialize=COUNTS)
def static_fwd_kernel(
    x_ptr,  # [T, D] or a cache
    out_ptr,  # [T + B m, D]
    prompt_ptr,  # [m, D] or [B, m, D]
    seed_ptr,
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
    p_drop,
    copy_tiles,
    SHARED: tl.constexpr,
    DROP: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copies text rows and given prompts. Grid: copy_tiles + ceil(B m / BLOCK_T) programs."""
    tile = tl.program_id(0)
    if tile < copy_tiles:
        copy_tile(
            tile,
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
    else:
        p = (tile - copy_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = p < B * m
        j = p % m
        place = prompt_start(p // m, mask, m, cu_seqlens_ptr, insert_at_ptr) + j
        if SHARED:
            row = j.to(tl.int64)
        else:
            row = p.to(tl.int64)
        for d_first in range(0, D, BLOCK_D):
            d = d_first + tl.arange(0, BLOCK_D)
            inside = mask[:, None] & (d < D)[None, :]
            x = tl.load(prompt_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
            x = x.to(tl.float32)
            if DROP:
                x *= keep_scale(seed_ptr, p.to(tl.int64)[:, None], d[None, :], D, p_drop)
            x = round_to(x, out_ptr.dtype.element_ty)
            tl.store(out_ptr + place[:, None] * D + d[None, :], x, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def npg_down_fwd_kernel(
    x_ptr,  # [T, D], a cache, or the output itself
    out_ptr,  # [T + B m, D]
    z_ptr,  # [B, R]
    w_down_ptr,  # [R, D]
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
    """z = W_d h of the first (LAST: last) readable row of each example; the other programs copy.

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
        z = tl.zeros((BLOCK_B, BLOCK_R), dtype=tl.float32)
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
            z = dot(x, w, z, dtype, PRECISION)
        z_at = b.to(tl.int64)[:, None] * R + c[None, :]
        tl.store(z_ptr + z_at, round_to(z, dtype), mask=mask[:, None] & (c < R)[None, :])
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
    copies = (not IN_PLACE) & (tl.program_id(1) == 0)
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
        if copies:
            inside = mask[:, None] & (d < D)[None, :]
            tl.store(out_ptr + place[:, None] * D + d[None, :], x, mask=inside)
        w = tl.load(
            w_down_ptr + c[None, :].to(tl.int64) * D + d[:, None],
            mask=(c < R)[None, :] & (d < D)[:, None],
            other=0.0,
        )
        h = dot(x, w, h, dtype, PRECISION)
    h_at = t.to(tl.int64)[:, None] * R + c[None, :]
    tl.store(h_ptr + h_at, round_to(h, dtype), mask=mask[:, None] & (c < R)[None, :])


@triton.jit
def units(
    row,  # [BLOCK_P], rows of z
    mask,
    c,  # [BLOCK_R], channels
    R,
    m,
    z_ptr,
    arg_ptr,
    h_ptr,
    b_down_ptr,
    cu_seqlens_ptr,
    readable_start_ptr,
    readable_count_ptr,
    keeps,
    KIND: tl.constexpr,
):
    """relu(z + b_d), fp32 [BLOCK_P, BLOCK_R]; appg and mppg pool z first, and store it (and where
    the maxima are) if `keeps`.
    """
    if KIND == "npg":
        z = bottleneck(row, mask, c, R, z_ptr, b_down_ptr)
    else:
        inside = mask[:, None] & (c < R)[None, :]
        z, arg = pooled(
            row, mask, c, R, m, h_ptr, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr, KIND
        )
        z = round_to(z, z_ptr.dtype.element_ty)
        at = row.to(tl.int64)[:, None] * R + c[None, :]
        if keeps:
            tl.store(z_ptr + at, z, mask=inside)
            if KIND == "mppg":
                tl.store(arg_ptr + at, arg, mask=inside)
        bias = tl.load(b_down_ptr + c, mask=c < R, other=0.0).to(tl.float32)
        z = tl.where(inside, z.to(tl.float32) + bias[None, :], 0.0)
    return relu(z)


@triton.jit(do_not_specialize=COUNTS)
def up_fwd_kernel(
    out_ptr,  # [T + B m, D]
    z_ptr,  # [rows, R]; rows = B (npg) or B m
    arg_ptr,  # int32 [rows, R] (mppg)
    h_ptr,  # [T, R] (appg, mppg)
    b_down_ptr,  # [R]
    w_up_ptr,  # [m D, R] (npg) or [D, R]
    b_up_ptr,
    seed_ptr,
    cu_seqlens_ptr,
    insert_at_ptr,
    readable_start_ptr,
    readable_count_ptr,
    rows,
    m,
    D,
    R,
    p_drop,
    KIND: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Prompt rows W_u relu(z + b_d) + b_u, dropped out, to their places.

    Grid: ceil(rows / BLOCK_P) x programs that share the column blocks, of D or (npg) of m D. A
    program makes its rows of z once, where R fits a block.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = row < rows
    if KIND == "npg":
        b = row
    else:
        b = row // m
    place = prompt_start(b, mask, m, cu_seqlens_ptr, insert_at_ptr)
    c = tl.arange(0, BLOCK_R)
    keeps = tl.program_id(1) == 0
    if ONE_R:
        z = units(
            row,
            mask,
            c,
            R,
            m,
            z_ptr,
            arg_ptr,
            h_ptr,
            b_down_ptr,
            cu_seqlens_ptr,
            readable_start_ptr,
            readable_count_ptr,
            keeps,
            KIND,
        )
    columns = tl.cdiv(D, BLOCK_D)
    blocks = columns
    if KIND == "npg":
        blocks *= m
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        d = (block % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
        w_row = d.to(tl.int64)
        if KIND == "npg":
            j = row * 0 + block // columns
            w_row += (block // columns).to(tl.int64) * D
        else:
            j = row % m
        prompt = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
        if ONE_R:
            w = tl.load(
                w_up_ptr + w_row[None, :] * R + c[:, None],
                mask=(d < D)[None, :] & (c < R)[:, None],
                other=0.0,
            )
            prompt = dot(z, w, prompt, dtype, PRECISION)
        else:
            for c_first in range(0, R, BLOCK_R):
                k = c_first + c
                z = units(
                    row,
                    mask,
                    k,
                    R,
                    m,
                    z_ptr,
                    arg_ptr,
                    h_ptr,
                    b_down_ptr,
                    cu_seqlens_ptr,
                    readable_start_ptr,
                    readable_count_ptr,
                    keeps & (block == 0),
                    KIND,
                )
                w = tl.load(
                    w_up_ptr + w_row[None, :] * R + k[:, None],
                    mask=(d < D)[None, :] & (k < R)[:, None],
                    other=0.0,
                )
                prompt = dot(z, w, prompt, dtype, PRECISION)
        bias = tl.load(b_up_ptr + w_row, mask=d < D, other=0.0).to(tl.float32)
        prompt += bias[None, :]
        if DROP:
            p = b.to(tl.int64) * m + j
            prompt *= keep_scale(seed_ptr, p[:, None], d[None, :], D, p_drop)
        at = (place + j)[:, None] * D + d[None, :]
        inside = mask[:, None] & (d < D)[None, :]
        tl.store(out_ptr + at, round_to(prompt, dtype), mask=inside)
