"""Attention of one row of each text: what the last layer runs where a head reads one token (readout
pruning, DESIGN section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import autocast_dtype, plainly, to_heads, without_autocast
from .low_rank import Part, add_by_heads
from .plan import Group, Plan


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


def _softmax(scores: Tensor, plan: Plan, group: Group, seen: Tensor | None) -> Tensor:
    """Over the keys that the query sees; scores [G, ..., S], which are overwritten.

    Args:
        seen: int64 [G], how many rows of each text; None: all.
    """
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


def _dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In what the products of groups are computed: on a CPU in fp32 at least, where one in bf16
    makes oneDNN compile a program for each new size, and each group has its own.
    """
    return torch.promote_types(dtype, torch.float32) if x.device.type == "cpu" else dtype


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
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of one row of each text.

    Args:
        q: [B, H d].
        k, v: [N, Hk d].
        place: int64 [B], which token of its text each query is (it counts where `causal`).
        plan, heads, kv_heads, scale, causal, bias: as for `attend`.

    Returns:
        [B, H d].
    """
    own = q.dtype
    q, k, v = (x.to(_dtype(x, x.dtype)) for x in (q, k, v))
    repeat, slices = heads // kv_heads, plan.heads(kv_heads).slices
    seen = _in_groups(place + 1 + plan.m, plan) if causal else None
    biases = _bias_rows(bias, place, plan)
    k, v = to_heads(k, plan, kv_heads), to_heads(v, plan, kv_heads)
    q = _in_groups(q * scale, plan).view(plan.texts, kv_heads, repeat, -1)
    out = []
    for group, kv in zip(plan.groups, slices, strict=True):
        n = group.texts * kv_heads
        kg, vg = (_of_group(x, kv).view(n, group.size, -1) for x in (k, v))
        scores = torch.bmm(_of_group(q, group.numbers).flatten(0, 1), kg.transpose(1, 2))
        scores = scores.view(group.texts, kv_heads, repeat, group.size)
        if biases is not None:
            scores = scores + _bias_of(biases, group).view(-1, kv_heads, repeat, group.size)
        limit = None if seen is None else seen[group.numbers]
        p = _softmax(scores, plan, group, limit).to(vg.dtype)
        out.append(torch.bmm(p.flatten(0, 1), vg).view(group.texts, -1))
    return _in_batch(out, plan).to(own)


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
    bias: Tensor | None = None,
    key_parts: Sequence[Part] = (),
    value_parts: Sequence[Part] = (),
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
        plan, heads, scale, causal, place, bias: as for `attend_one`.
        key_parts, value_parts: updates of W_k and W_v, without dropout.

    Returns:
        [B, H d].
    """
    D = x_places.shape[1]
    own = autocast_dtype(q) or q.dtype
    dtype = _dtype(q, own)
    q = _in_groups(q, plan).to(dtype).view(plan.texts, heads, -1)
    w_k, w_v = (w.to(dtype).view(heads, -1, D) for w in (w_k, w_v))
    seen = _in_groups(place + 1 + plan.m, plan) if causal else None
    with without_autocast(q):
        u = add_by_heads(_ByHeads.apply(q, w_k), q, key_parts, plan, transposed=True)  # [B, H, D]
        biases = _bias_rows(bias, place, plan)
        pooled = _Absorbed.apply(u, x_places.to(dtype), plan, scale, seen, biases)
        made = _ByHeads.apply(pooled, w_v.transpose(1, 2))
        values = add_by_heads(made, pooled, value_parts, plan)
    values = _in_batch([values.flatten(1)], plan).to(own)
    return values if b_v is None else values + b_v


class _ByHeads(torch.autograd.Function):
    """`_by_heads` with frozen matrices."""

    @staticmethod
    def forward(ctx, x, weights):
        ctx.save_for_backward(weights)
        return _by_heads(x, weights)

    @staticmethod
    @once_differentiable
    @plainly
    def backward(ctx, grad):
        return _by_heads(grad, ctx.saved_tensors[0].transpose(1, 2)), None


class _Absorbed(torch.autograd.Function):
    """sum_j softmax_j(scale u x_j) x_j for u [B, H, D] in the order of the groups: what `q W_k`
    sees of the rows of its text. Products write where the next step wants them: no copies and no
    sums of gradients.
    """

    @staticmethod
    def forward(ctx, u, x, plan, scale, seen, biases):
        with without_autocast(u):
            pooled, chances = torch.empty_like(u), []
            for group, rows in _rows_of(x, plan):
                own = group.numbers
                scores = u.new_empty(group.texts, u.shape[1], group.size)
                _scaled(scores, u[own], rows.transpose(1, 2), scale)
                if biases is not None:
                    scores.add_(_bias_of(biases, group))
                p = _softmax(scores, plan, group, None if seen is None else seen[own])
                torch.bmm(p, rows, out=pooled[own])
                chances.append(p)
            ctx.save_for_backward(x, u, *chances)
            ctx.plan, ctx.scale = plan, scale
            return pooled

    @staticmethod
    @once_differentiable
    @plainly
    def backward(ctx, d_pooled):
        x, u, *chances = ctx.saved_tensors
        dx, du = torch.empty_like(x), torch.empty_like(u)
        wanted = ctx.needs_input_grad[1]  # (Not by the rows of a cache, where no prompt is.)
        parts = zip(_rows_of(x, ctx.plan), _rows_of(dx, ctx.plan), chances, strict=True)
        for (group, rows), (_, d_rows), p in parts:
            own = group.numbers
            ds = torch.bmm(d_pooled[own], rows.transpose(1, 2))
            ds = torch._softmax_backward_data(ds, p, -1, p.dtype)
            _scaled(du[own], ds, rows, ctx.scale)
            if wanted:
                torch.bmm(p.transpose(1, 2), d_pooled[own], out=d_rows)
                d_rows.baddbmm_(ds.transpose(1, 2), u[own], alpha=ctx.scale)
        return du, dx if wanted else None, *[None] * 4


def _bias_rows(bias: Tensor | None, place: Tensor | None, plan: Plan) -> Tensor | None:
    """Those of the queries in the order of the groups, [B, H, S]; one for all, [1, H, S], where
    each is the first token of its text.
    """
    if bias is None or (place is None and plan.even):
        return None if bias is None else bias[None, :, plan.m]
    row = plan.m if place is None else place + plan.m
    return bias[:, _in_groups(row, plan)].transpose(0, 1)


def _bias_of(rows: Tensor, group: Group) -> Tensor:
    """Of a group's texts, [G or 1, H, S]."""
    rows = rows if len(rows) == 1 else rows[group.numbers]
    return rows[..., : group.size]


def _by_heads(x: Tensor, weights: Tensor) -> Tensor:
    """[B, H, a] and a matrix for each head [H, a, b] -> [B, H, b]."""
    out = x.new_empty(*x.shape[:2], weights.shape[2])
    torch.bmm(x.transpose(0, 1), weights, out=out.transpose(0, 1))
    return out


def _scaled(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Writes scale a b (with beta 0, what stood there does not count)."""
    torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _rows_of(x: Tensor, plan: Plan):
    """Each group with its padded rows, views [G, S, D] of x."""
    for group in plan.groups:
        rows = x[group.first : group.first + group.places]
        yield group, rows.view(group.texts, group.size, -1)
