"""Attention within texts that lie packed with their prompts, heads of 64 columns."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..case import Inputs, Operator, normal, offsets

SIZE = 64  # columns of a head


def _inputs(shape, dtype, device, generator) -> Inputs:
    lengths = [n + shape.m for n in shape.lengths]
    rows = {name: normal(generator, device, shape.rows, shape.D, dtype=dtype) for name in "qkv"}
    return rows | {
        "cu_seqlens": offsets(lengths, device),
        "longest": max(lengths),
        "heads": shape.D // SIZE,
    }


def _eager(x: Inputs) -> Tensor:
    """Padded to the longest text for scaled_dot_product_attention, and back."""
    cu, S, heads = x["cu_seqlens"].long(), x["longest"], x["heads"]
    row = torch.arange(len(x["q"]), device=cu.device)
    text = torch.searchsorted(cu[1:], row, right=True)
    B, at = len(cu) - 1, text * S + row - cu[text]

    def padded(rows):
        out = rows.new_zeros(B * S, rows.shape[1]).index_copy(0, at, rows)
        return out.view(B, S, heads, SIZE).transpose(1, 2)

    mask = (torch.arange(S, device=cu.device) < cu.diff()[:, None])[:, None, None]
    out = F.scaled_dot_product_attention(*(padded(x[name]) for name in "qkv"), attn_mask=mask)
    return out.transpose(1, 2).reshape(B * S, -1).index_select(0, at)


def _triton(x: Inputs) -> Tensor:
    from lpt_kernels.attention import attend

    heads, how = x["heads"], dict(scale=SIZE**-0.5, causal=False)
    return attend(
        x["q"], x["k"], x["v"], x["cu_seqlens"], x["longest"], heads=heads, kv_heads=heads, **how
    )


def _varlen(x: Inputs) -> Tensor:
    """PyTorch's own kernel for packed texts, in half precision on CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[name].view(len(x[name]), x["heads"], SIZE) for name in "qkv")
    cu, longest = x["cu_seqlens"], x["longest"]
    return varlen_attn(q, k, v, cu, cu, longest, longest).flatten(1)


def _bytes(shape, x, e, tensors):
    return tensors * shape.rows * shape.D * e


def _fwd_bytes(shape, x, e):
    """Queries, keys and values read, the output written."""
    return _bytes(shape, x, e, 4)


def _bwd_bytes(shape, x, e):
    """Queries, keys, values and the gradient of the output read, three gradients written."""
    return _bytes(shape, x, e, 7)


def operators():
    functions = {"eager": _eager, "varlen": _varlen, "triton": _triton}
    yield Operator("attention.fwd", _inputs, functions, _fwd_bytes)
    yield Operator("attention.bwd", _inputs, functions, _bwd_bytes, ("q", "k", "v"))
