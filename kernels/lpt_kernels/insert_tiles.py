"""What kernels of several families share: copied rows, biases, gradients of prompt rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import keep_scale, load_rows, round_to
from .rows import destination, examples_of, source

# Numbers that change from batch to batch; a variant of the machine code for each would be waste.
COUNTS = ("T", "B", "rows", "count", "splits", "chunk", "copy_tiles", "down_tiles")


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


@triton.jit
def prompt_grad(grad_ptr, place, p, d, mask, D, stride_gt, seed_ptr, p_drop, DROP: tl.constexpr):
    """Gradient of prompt rows behind their dropout, fp32 [BLOCK_P, BLOCK_D].

    place: output rows int64, p: prompt rows counted through, int64, mask: [BLOCK_P, BLOCK_D].
    """
    g = tl.load(grad_ptr + place[:, None] * stride_gt + d[None, :], mask=mask, other=0.0)
    if DROP:
        g = g.to(tl.float32) * keep_scale(seed_ptr, p[:, None], d[None, :], D, p_drop)
    return g
