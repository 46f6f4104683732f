"""Helpers that the kernels share: rounding, products, and where an example's rows are.

Shape tags in comments name the blocks: `# [BLOCK_T, BLOCK_D]`.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton decides at import whether `@triton.jit` interprets; the interpreter multiplies bf16 wrongly
# and cuts instead of rounding, so the helpers below take another way there.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)


def _let_arrays_of_one_be_numbers() -> None:
    """Triton 3.6's interpreter makes an int of an array of one element, for bounds of loops, which
    numpy refuses from 2.4 on.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if INTERPRETED:
    _let_arrays_of_one_be_numbers()


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 -> `dtype`, to the nearest, ties to even, on every backend."""
    if dtype == tl.float32:
        y = x
    elif _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Adding could carry a NaN over into a number.
        rounded = tl.where(x != x, 0x7FC0, rounded)
        y = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def dot(a, b, acc, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b with both rounded to `dtype` first and fp32 sums.

    a [M, K], b [K, N], acc fp32 [M, N]. PRECISION is used for fp32 operands alone ("ieee", "tf32"
    or "tf32x3").
    """
    if a.dtype != dtype:
        a = round_to(a.to(tl.float32), dtype)
    if b.dtype != dtype:
        b = round_to(b.to(tl.float32), dtype)
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if dtype == tl.float32 and PRECISION == "ieee":
        # A block's products are summed by themselves, for one long chain of additions rounds more
        # than PyTorch's sums do. (Triton would join the two additions again but for the limit.)
        acc += tl.dot(
            a, b, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1], out_dtype=tl.float32
        )
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)
    return acc


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN, unlike tl.maximum."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def example_of(cu_seqlens_ptr, row, B, STEPS: tl.constexpr):
    """Which example each packed row belongs to: the largest b with cu_seqlens[b] <= row.

    row: int32 of any shape, B: number of examples, STEPS: at least log2(B) + 1. Binary search,
    so that no table has to be made on the host (which would have to wait for the device).
    """
    low = tl.zeros_like(row)
    high = low + (B - 1)
    for _ in tl.static_range(STEPS):
        middle = (low + high + 1) // 2
        below = tl.load(cu_seqlens_ptr + middle) <= row
        low = tl.where(below, middle, low)
        high = tl.where(below, high, tl.maximum(middle - 1, low))
    return low


@triton.jit
def keep_scale(seed_ptr, row, column, D, p):
    """Dropout's factor of each element: 0 or 1 / (1 - p).

    seed_ptr: int64 [1]; row, column: int64 blocks that broadcast. The same element gets the same
    factor whatever the blocks are, so the backward pass makes the mask anew instead of saving it.
    """
    seed = tl.load(seed_ptr)
    draw = tl.rand(seed, row * D + column)
    return tl.where(draw >= p, 1.0 / (1.0 - p), 0.0)


@triton.jit
def load_rows(
    x_ptr,
    row,  # int64 [BLOCK_T]
    column,  # int32 [BLOCK_D]
    row_mask,  # [BLOCK_T]
    column_mask,  # [BLOCK_D]
    stride_row,
    token_scale_ptr,
    channel_scale_ptr,
    dtype: tl.constexpr,
    STORE: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    """Rows of a store of hidden states as `dtype`, [BLOCK_T, BLOCK_D]; masked elements are 0.

    STORE: "plain" (any float dtype), "int8" (times channel_scale[column] times token_scale[row],
    both fp32) or "fp8" (e4m3 given as uint8, times token_scale[row]). AGAIN: a second load of rows,
    which the compiler is not to make one with the first.
    """
    mask = row_mask[:, None] & column_mask[None, :]
    at = row[:, None] * stride_row + column[None, :]
    if AGAIN:
        x = tl.load(x_ptr + at, mask=mask, other=0, eviction_policy="evict_first")
    else:
        x = tl.load(x_ptr + at, mask=mask, other=0)
    if STORE == "plain":
        if x.dtype != dtype:
            x = round_to(x.to(tl.float32), dtype)
    else:
        token_scale = tl.load(token_scale_ptr + row, mask=row_mask, other=0.0)
        if STORE == "int8":
            channel_scale = tl.load(channel_scale_ptr + column, mask=column_mask, other=0.0)
            value = x.to(tl.float32) * channel_scale[None, :]
        else:
            # Decoded by hand, for sm_80 has no fp8 and gfx942 has another one. The bits of e4m3
            # shifted up are a half-precision number 2^8 too small, subnormals included.
            bits = x.to(tl.int16)
            half = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True)
            value = half.to(tl.float32) * 256.0
            value = tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
        x = round_to(value * token_scale[:, None], dtype)
    return x
