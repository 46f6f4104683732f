"""Attention of one row of each text: what the last layer runs where a head reads one token (readout
pruning, DESIGN section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .packed_attention import to_heads
from .packed_plan import Group, Plan


class _Pick(torch.autograd.Function):
    """Rows of x at padded places, and some of its rows, each once: [places, D] and [B, D]."""

    @staticmethod
    def forward(ctx, x, rows, plan):
        ctx.plan = plan
        ctx.save_for_backward(rows)
        return x.index_select(0, plan.to_places), x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_places, d_rows):
        d = ctx.plan.from_places(d_places)
        return d.index_add_(0, ctx.saved_tensors[0], d_rows), None, None


def pick(x: Tensor, rows: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """x [N, D] at padded places (padding repeats the text's own first row), [places, D], and at
    `rows`, one of each text, [B, D]: one gradient for both.
    """
    return _Pick.apply(x, rows, plan)


def _softmax(scores: Tensor, plan: Plan, group: Group, place, causal: bool) -> Tensor:
    """Over the keys that the query sees; scores [G, ..., S], which are overwritten."""
    seen = None  # all of the text's
    if causal:
        seen = _in_groups(place + 1 + plan.m, plan)[group.numbers]
    hidden = plan.hidden if seen is None and not plan.sorted else group.hidden(seen)
    if hidden is not None:
        hidden = hidden.view(len(hidden), *[1] * (scores.dim() - 2), group.size)
        scores = scores.masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, -1)


def _in_groups(x: Tensor, plan: Plan) -> Tensor:
    """One row for each text, in the order of the groups."""
    return x.index_select(0, plan.order) if plan.sorted else x


def _in_batch(parts: list[Tensor], plan: Plan) -> Tensor:
    """Back from the groups to the order of the batch."""
    return torch.cat(parts).index_select(0, plan.inverse_order) if plan.sorted else parts[0]


def _of_group(x: Tensor, part: slice) -> Tensor:
    """(No slice of all, whose gradient would be written into zeros.)"""
    return x if part.start == 0 and part.stop == len(x) else x[part]


def attend_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
    place: Tensor | None,
) -> Tensor:
    """Attention of one row of each text.

    Args:
        q: [B, H d].
        k, v: [N, Hk d].
        place: int64 [B], which token of its text each query is (it counts where `causal`).
        plan, heads, kv_heads, scale, causal: as for `attend`.

    Returns:
        [B, H d].
    """
    repeat, slices = heads // kv_heads, plan.heads(kv_heads).slices
    k, v = to_heads(k, plan, kv_heads), to_heads(v, plan, kv_heads)
    q = _in_groups(q * scale, plan).view(plan.texts, kv_heads, repeat, -1)
    out = []
    for group, kv in zip(plan.groups, slices, strict=True):
        n = group.texts * kv_heads
        kg, vg = (_of_group(x, kv).view(n, group.size, -1) for x in (k, v))
        scores = torch.bmm(_of_group(q, group.numbers).flatten(0, 1), kg.transpose(1, 2))
        scores = scores.view(group.texts, kv_heads, repeat, group.size)
        p = _softmax(scores, plan, group, place, causal).to(vg.dtype)
        out.append(torch.bmm(p.flatten(0, 1), vg).view(group.texts, -1))
    return _in_batch(out, plan)


def attend_one_absorbed(
    q: Tensor,
    x_places: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    plan: Plan,
    *,
    heads: int,
    scale: float,
    causal: bool,
    place: Tensor | None,
) -> Tensor:
    """Attention of one row of each text, without keys and values.

    A score is q (W_k x + b_k): with one query a text it is cheaper to take W_k^T q once than W_k x
    for every row, and b_k adds the same to all scores of a query, which softmax does not see. The
    values likewise: sum_j p_j (W_v x_j + b_v) = W_v (sum_j p_j x_j) + b_v. What is left for the N
    rows is 4 H D operations in place of 4 D^2. Without rotary positions this is exact.

    Args:
        q: [B, H d].
        x_places: [places, D], what keys and values would be made of, at padded places (`pick`).
        w_k, w_v: [H d, D]; b_v: [H d] or None.
        plan, heads, scale, causal, place: as for `attend_one`.

    Returns:
        [B, H d].
    """
    D = x_places.shape[1]
    q = _in_groups(q * scale, plan).view(plan.texts, heads, -1)
    u = torch.bmm(q.transpose(0, 1), w_k.view(heads, -1, D)).transpose(0, 1)  # [B, H, D]
    out = []
    for group in plan.groups:
        places = slice(group.first, group.first + group.places)
        rows = _of_group(x_places, places).view(group.texts, group.size, D)
        scores = torch.bmm(_of_group(u, group.numbers), rows.transpose(1, 2))  # [G, H, S]
        p = _softmax(scores, plan, group, place, causal).to(rows.dtype)
        out.append(torch.bmm(p, rows))
    pooled = _in_batch(out, plan)  # [B, H, D]
    values = torch.bmm(pooled.transpose(0, 1), w_v.view(heads, -1, D).transpose(1, 2))
    values = values.transpose(0, 1).reshape(plan.texts, -1)
    return values if b_v is None else values + b_v
