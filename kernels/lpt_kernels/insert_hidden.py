"""The gradient of the text: its own rows of the incoming gradient, and W_d^T d_h beside."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, round_to
from .insert_tiles import COUNTS
from .rows import destination, examples_of, readable, source


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
