"""Prompts that need no text: they are put before each example, and their gradient is summed.

Sums over examples go to partial sums in fp32 that are added in a fixed order, never through
atomics: two runs are equal to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import keep_scale, round_to
from .insert_tiles import COUNTS, copy_tile, prompt_grad
from .rows import prompt_start


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
