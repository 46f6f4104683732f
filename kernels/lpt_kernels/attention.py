"""Attention within short texts that lie packed one after another.

Kernels made for long texts work in blocks of 128 rows and spend most of each on nothing where texts
have some thirty: here a program takes a text and a head in one block of 64 rows, forward and
backward, and a text of more rows in several. Nothing is summed by atomics: two runs are equal to
the bit. Formulas: softmax(q k^T scale) v (Vaswani et al. 2017, section 3.2.1); backward and the
logarithms of sums that it keeps as in FlashAttention-2 (Dao 2023, algorithms 1 and 2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_kernels import attend_bwd_kernel, attend_fwd_kernel, attend_long_bwd_kernel
from .launch import ceil_div, launch, next_power_of_2, on_hopper, precision_of

# Rows: on sm_90 one step of its tensor cores; more than 32 spill elsewhere.
BLOCK, BLOCK_ELSEWHERE = 64, 32
# Columns of a head: wider ones spill (sm_90, of 128 in the backward: 264 bytes a thread).
MAX_HEAD = 64
# Texts of so many rows in the mean and at most are better off here than with PyTorch's own kernel.
MEAN_ROWS, MAX_ROWS = 96, 1024
_LOG2_E = 1.4426950408889634


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
