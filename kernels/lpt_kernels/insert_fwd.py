"""Forward kernels of the fused prompt insertion.

The first (`*_down_fwd_kernel`) reads every text row once, copies it to its place in the output and
makes what the bottleneck needs on the way: npg u = relu(W_d x + b_d) of one row an example, appg
and mppg h = W_d x of every row, which `pool_fwd_kernel` pools to u: h is small and still in the L2
cache. `up_fwd_kernel` makes the prompt rows from u. Prompts that need no text (`static`) take one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, keep_scale, load_rows, relu, round_to
from .rows import destination, examples_of, pooled, prompt_start, readable, source

# Numbers that change from batch to batch; a variant of the machine code for each would be waste.
COUNTS = ("T", "B", "rows", "copy_tiles", "down_tiles", "chunk")


@triton.jit
def bias_of(b_ptr, c, R, dtype: tl.constexpr):
    """A bias at c, rounded to `dtype` as the products' operands are; fp32, 0 from R on."""
    bias = tl.load(b_ptr + c, mask=c < R, other=0.0).to(tl.float32)
    return round_to(bias, dtype).to(tl.float32)


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
