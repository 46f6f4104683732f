"""Forward kernels of the fused prompt insertion.

Two launches: the first (`*_down_fwd_kernel`) reads every text row once, copies it to its place in
the output and makes the bottleneck z on the way; the second (`up_fwd_kernel`) makes the prompt rows
from z. Prompts that need no text (`static`) take one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, example_of, keep_scale, load_rows, relu, round_to
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
    STEPS: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Text rows of a tile to their places in the output."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = t < T
    b = example_of(cu_seqlens_ptr, tl.minimum(t, T - 1), B, STEPS)
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
    STEPS: tl.constexpr,
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
            STEPS,
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
    STEPS: tl.constexpr,
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
            STEPS,
            STORE,
            BLOCK_T,
            BLOCK_D,
        )


@triton.jit(do_not_specialize=COUNTS)
def appg_down_fwd_kernel(
    x_ptr,  # [T, D], a cache, or the output itself
    out_ptr,  # [T + B m, D]
    z_ptr,  # [B m, R]
    left_ptr,  # fp32 [tiles, R]
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
    IN_PLACE: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    STORE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean of each bin, then W_d of the means; copies the rows on the way.

    Grid: ceil(T / TILE) x ceil(R / BLOCK_R) programs; the first column of programs copies. A tile
    that more than BLOCK_P bins touch is read again for each further BLOCK_P.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tile = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tile * TILE + tl.arange(0, TILE)
    end = tl.minimum(tile * TILE + TILE, T)
    mask = t < T
    b = example_of(cu_seqlens_ptr, tl.minimum(t, T - 1), B, STEPS)
    b_first = tl.min(b, axis=0)
    b_last = tl.max(b, axis=0)
    place = destination(t, b, mask, m, insert_at_ptr, order_ptr)
    row = source(
        t, b, mask, m, cu_seqlens_ptr, insert_at_ptr, order_ptr, source_start_ptr, IN_PLACE
    )
    start, n = readable(b, mask, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr)
    useful = mask & (t >= start) & (t < start + n)
    p_low, p_high = prompt_rows_of(
        tile * TILE,
        end,
        b_first,
        b_last,
        m,
        cu_seqlens_ptr,
        readable_start_ptr,
        readable_count_ptr,
    )
    copies = (not IN_PLACE) & (tl.program_id(1) == 0)
    # At least once, for a tile without readable rows is copied too.
    for p_first in range(p_low, tl.maximum(p_high, p_low + 1), BLOCK_P):
        p = p_first + tl.arange(0, BLOCK_P)
        p_mask = p < p_high
        bin_begin, bin_end = pooling_bin(
            p, p_mask, m, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr
        )
        member = (t[None, :] >= bin_begin[:, None]) & (t[None, :] < bin_end[:, None])
        member = member.to(tl.float32)  # [BLOCK_P, TILE], exact in every dtype
        share = 1.0 / tl.maximum(bin_end - bin_begin, 1).to(tl.float32)
        z = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
        for d_first in range(0, D, BLOCK_D):
            d = d_first + tl.arange(0, BLOCK_D)
            inside = mask[:, None] & (d < D)[None, :]
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
            if copies & (p_first == p_low):
                tl.store(out_ptr + place[:, None] * D + d[None, :], x, mask=inside)
            # Rows that may not be read can hold anything, and 0 NaN is not 0.
            x = tl.where(useful[:, None], x, 0.0)
            pooled = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
            pooled = dot(member, x, pooled, dtype, PRECISION) * share[:, None]
            w = tl.load(
                w_down_ptr + c[None, :].to(tl.int64) * D + d[:, None],
                mask=(c < R)[None, :] & (d < D)[:, None],
                other=0.0,
            )
            z = dot(pooled, w, z, dtype, PRECISION)
        inside = p_mask[:, None] & (c < R)[None, :]
        own = inside & (bin_begin >= tile * TILE)[:, None]
        z_at = p.to(tl.int64)[:, None] * R + c[None, :]
        tl.store(z_ptr + z_at, round_to(z, dtype), mask=own)
        left_at = tl.zeros_like(p).to(tl.int64)[:, None] + tile.to(tl.int64) * R + c[None, :]
        tl.store(left_ptr + left_at, z, mask=inside & (bin_begin < tile * TILE)[:, None])


@triton.jit(do_not_specialize=COUNTS)
def mppg_down_fwd_kernel(
    x_ptr,  # [T, D], a cache, or the output itself
    out_ptr,  # [T + B m, D]
    z_ptr,  # [B m, R]
    arg_ptr,  # int32 [B m, R]
    left_ptr,  # [tiles, R]
    left_arg_ptr,  # int32 [tiles, R]
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
    IN_PLACE: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    STORE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LONG: tl.constexpr,
):
    """W_d of every row, then the maximum of each bin and channel and the row that has it (the first
    of equals); copies the rows on the way. Grid as in appg_down_fwd_kernel.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tile = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tile * TILE + tl.arange(0, TILE)
    end = tl.minimum(tile * TILE + TILE, T)
    mask = t < T
    b = example_of(cu_seqlens_ptr, tl.minimum(t, T - 1), B, STEPS)
    b_first = tl.min(b, axis=0)
    b_last = tl.max(b, axis=0)
    place = destination(t, b, mask, m, insert_at_ptr, order_ptr)
    row = source(
        t, b, mask, m, cu_seqlens_ptr, insert_at_ptr, order_ptr, source_start_ptr, IN_PLACE
    )
    copies = (not IN_PLACE) & (tl.program_id(1) == 0)
    h = tl.zeros((TILE, BLOCK_R), dtype=tl.float32)
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
    # A maximum drops NaN; a row that has one is looked for by itself.
    bad = tl.max((h != h).to(tl.int32), axis=1) > 0  # [TILE]
    h = tl.where(h != h, float("-inf"), h)
    p_low, p_high = prompt_rows_of(
        tile * TILE,
        end,
        b_first,
        b_last,
        m,
        cu_seqlens_ptr,
        readable_start_ptr,
        readable_count_ptr,
    )
    for p_first in range(p_low, p_high, BLOCK_P):
        p = p_first + tl.arange(0, BLOCK_P)
        p_mask = p < p_high
        bin_begin, bin_end = pooling_bin(
            p, p_mask, m, cu_seqlens_ptr, readable_start_ptr, readable_count_ptr
        )
        low = tl.maximum(bin_begin, tile * TILE)
        steps = tl.max(tl.minimum(bin_end, end) - low, axis=0)
        best = tl.full((BLOCK_P, BLOCK_R), float("-inf"), dtype=tl.float32)
        arg = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.int32) + low[:, None]
        member = (t[None, :] >= bin_begin[:, None]) & (t[None, :] < bin_end[:, None])
        poisoned = tl.max((member & (bad & mask)[None, :]).to(tl.int32), axis=1) > 0
        if steps <= LONG:
            # Short bins: one row of each at a time.
            for s in range(0, steps):
                at = low + s
                valid = at < tl.minimum(bin_end, end)
                index = tl.minimum(tl.maximum(at - tile * TILE, 0), TILE - 1)
                index = tl.broadcast_to(index[:, None], (BLOCK_P, BLOCK_R))
                value = tl.gather(h, index, 0)
                better = valid[:, None] & (value > best)
                best = tl.where(better, value, best)
                arg = tl.where(better, at[:, None], arg)
        else:
            # Long bins are few in a tile: all rows of one at a time.
            for i in range(0, tl.minimum(BLOCK_P, p_high - p_first)):
                pick = tl.arange(0, BLOCK_P) == i
                i_low = tl.max(tl.where(pick, low, 0), axis=0)
                i_end = tl.max(tl.where(pick, tl.minimum(bin_end, end), 0), axis=0)
                member_i = (t >= i_low) & (t < i_end)
                value = tl.where(member_i[:, None], h, float("-inf"))
                top = tl.max(value, axis=0)
                is_top = member_i[:, None] & (value == top[None, :])
                where_top = tl.min(tl.where(is_top, t[:, None], 0x7FFFFFFF), axis=0)
                best = tl.where(pick[:, None], top[None, :], best)
                arg = tl.where(pick[:, None], where_top[None, :], arg)
        best = tl.where(poisoned[:, None], float("nan"), best)
        inside = p_mask[:, None] & (c < R)[None, :]
        own = inside & (bin_begin >= tile * TILE)[:, None]
        z_at = p.to(tl.int64)[:, None] * R + c[None, :]
        tl.store(z_ptr + z_at, round_to(best, dtype), mask=own)
        tl.store(arg_ptr + z_at, arg, mask=own)
        goes_on = inside & (bin_begin < tile * TILE)[:, None]
        left_at = tl.zeros_like(p).to(tl.int64)[:, None] + tile.to(tl.int64) * R + c[None, :]
        tl.store(left_ptr + left_at, round_to(best, dtype), mask=goes_on)
        tl.store(left_arg_ptr + left_at, arg, mask=goes_on)


@triton.jit(do_not_specialize=COUNTS)
def up_fwd_kernel(
    out_ptr,  # [T + B m, D]
    z_ptr,  # [rows, R]; rows = B (npg) or B m
    left_ptr,
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
    TILE: tl.constexpr,
    J: tl.constexpr,
    ONE_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Prompt rows W_u relu(z) + b_u, dropped out, to their places.

    Grid: ceil(rows / BLOCK_P) x splits of D x (ceil(m / J) for npg, else 1). A program keeps its
    rows of z, and makes J prompt rows of each example (npg).
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
    if ONE_R:
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
        z = relu(z)
    for i in range(0, J):
        if KIND == "npg":
            j = row * 0 + (tl.program_id(2) * J + i)
        else:
            j = row % m
        p = b.to(tl.int64) * m + j
        p_mask = mask & (j < m)
        for d_first in range(tl.program_id(1) * BLOCK_D, D, tl.num_programs(1) * BLOCK_D):
            d = d_first + tl.arange(0, BLOCK_D)
            w_row = d.to(tl.int64)
            if KIND == "npg":
                w_row += (tl.program_id(2) * J + i).to(tl.int64) * D
            # No weights beyond the last of the m prompt rows.
            w_mask = d < tl.where(tl.program_id(2) * J + i < m, D, 0)
            prompt = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
            if ONE_R:
                w = tl.load(
                    w_up_ptr + w_row[None, :] * R + c[:, None],
                    mask=w_mask[None, :] & (c < R)[:, None],
                    other=0.0,
                )
                prompt = dot(z, w, prompt, dtype, PRECISION)
            else:
                for c_first in range(0, R, BLOCK_R):
                    k = c_first + c
                    z = bottleneck(
                        row,
                        mask,
                        k,
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
                    w = tl.load(
                        w_up_ptr + w_row[None, :] * R + k[:, None],
                        mask=w_mask[None, :] & (k < R)[:, None],
                        other=0.0,
                    )
                    prompt = dot(relu(z), w, prompt, dtype, PRECISION)
            bias = tl.load(b_up_ptr + w_row, mask=w_mask, other=0.0).to(tl.float32)
            prompt += bias[None, :]
            if DROP:
                prompt *= keep_scale(seed_ptr, p[:, None], d[None, :], D, p_drop)
            at = (place + j)[:, None] * D + d[None, :]
            inside = p_mask[:, None] & (d < D)[None, :]
            tl.store(out_ptr + at, round_to(prompt, dtype), mask=inside)
