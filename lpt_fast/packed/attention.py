"""Attention over packed texts: each row sees rows of its own text, whatever else is in the batch.

Four ways, equal up to rounding. On the CPU, short texts: padded groups of texts of like length
and batched matrix products in fp32, whose backward can stop at the prompt rows. On CUDA in half
precision: kernels of our own for short texts (lpt_kernels.attention), PyTorch's variable-length
kernel for long ones. Else: padded groups and `scaled_dot_product_attention`.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from functools import lru_cache, wraps

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..insertion.checks import choose_impl
from .plan import Group, Plan

# Longest texts for which scores of a whole text are kept; above, the memory would hurt.
PRODUCTS_UP_TO = 256


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast x to now; None: it is off."""
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else None


def without_autocast(x: Tensor):
    """A context in which operations on the device of x run in the dtypes that they are given."""
    casts = autocast_dtype(x) is not None
    return torch.autocast(x.device.type, enabled=False) if casts else nullcontext()


def plainly(backward):
    """The backward of a Function in the dtypes of its forward, also where it is called under
    autocast.
    """

    @wraps(backward)
    def run(ctx, *grads):
        with without_autocast(next(grad for grad in grads if grad is not None)):
            return backward(ctx, *grads)

    return run


class _Regroup(torch.autograd.Function):
    """Packed rows to padded places, or back; both directions are gathers, so backward is one too.

    Backward of gathering into places ignores what arrives at padding: nothing may.
    """

    @staticmethod
    def forward(ctx, x, index, back, clear):
        ctx.back, ctx.clear = back, clear
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.contiguous().index_select(0, ctx.back)
        return (grad if ctx.clear is None else ctx.clear(grad)), None, None, None


def to_heads(x: Tensor, plan: Plan, heads: int) -> Tensor:
    """[N, H d] -> [H places, d]."""
    places = plan.heads(heads)
    return _Regroup.apply(
        x.reshape(-1, x.shape[1] // heads), places.to_places, places.to_rows, None
    )


def _from_heads(x: Tensor, plan: Plan, heads: int) -> Tensor:
    """[H places, d] -> [N, H d]; no gradient reaches padding."""
    places = plan.heads(heads)
    rows = _Regroup.apply(x, places.to_rows, places.to_places, places.clear_padding)
    return rows.view(plan.rows, -1)


def _bias(group: Group, causal: bool, dtype: torch.dtype, device) -> Tensor | None:
    """0 where a row may look and -inf elsewhere, [G, 1, 1, S] or [S, S]; None: everywhere."""
    if causal:
        # Padding stands behind every row, so it needs no mask of its own.
        return torch.full((group.size,) * 2, float("-inf"), dtype=dtype, device=device).triu_(1)
    hidden = group.hidden()
    if hidden is None:
        return None
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return bias.masked_fill_(hidden, float("-inf"))[:, None, None]


def biases(plan: Plan, causal: bool, dtype: torch.dtype) -> list[Tensor | None]:
    """One for each group, made once a batch."""
    cache = plan.__dict__.setdefault("_biases", {})
    key = (causal, dtype)
    if key not in cache:
        cache[key] = [_bias(group, causal, dtype, plan.device) for group in plan.groups]
    return cache[key]


def _groups(plan: Plan, heads: int, kv_heads: int, each: list):
    """The groups with their places of queries, and of keys and values, and one of `each`."""
    return zip(
        plan.groups, plan.heads(heads).slices, plan.heads(kv_heads).slices, each, strict=True
    )


class _Products(torch.autograd.Function):
    """softmax(q k^T scale + mask) v by batched products over padded groups, in fp32 at least (that
    costs nothing beside the linear layers, which may be in less).

    With `prompt_only` the gradients of q, k and v are made for the m prompt rows of each text
    alone; the other rows of what comes back are not set.
    """

    @staticmethod
    def forward(ctx, q, k, v, plan, heads, kv_heads, scale, causal, places, prompt_only):
        ctx.dtype = q.dtype
        with without_autocast(q):
            return _Products._run(
                ctx, q, k, v, plan, heads, kv_heads, scale, causal, places, prompt_only
            )

    @staticmethod
    def _run(ctx, q, k, v, plan, heads, kv_heads, scale, causal, by_place, prompt_only):
        d, dv = q.shape[1] // heads, v.shape[1] // kv_heads
        places, kv_places = plan.heads(heads), plan.heads(kv_heads)
        exact = torch.promote_types(q.dtype, torch.float32)
        q = q.reshape(-1, d).index_select(0, places.to_places).to(exact)
        k = k.reshape(-1, d).index_select(0, kv_places.to_places).to(exact)
        v = v.reshape(-1, dv).index_select(0, kv_places.to_places).to(exact)
        out = q.new_empty(len(q), dv)
        chances = []
        repeat = heads // kv_heads
        for group, own, kv, bias in _groups(plan, heads, kv_heads, biases(plan, causal, q.dtype)):
            n, S = group.texts * kv_heads, group.size
            # Heads that share keys and values are further rows of their queries.
            qg, kg = q[own].view(n, repeat * S, d), k[kv].view(n, S, d)
            scores = torch.bmm(qg, kg.transpose(1, 2)).mul_(scale)
            if by_place is not None:
                scores.view(group.texts, heads, S, S).add_(by_place[:, :S, :S])
            if bias is not None:
                scores.view(group.texts, heads, S, S).add_(bias)
            p = torch.softmax(scores, -1)
            torch.bmm(p, v[kv].view(n, S, dv), out=out[own].view(n, repeat * S, dv))
            chances.append(p)
        ctx.save_for_backward(q, k, v, out if prompt_only else None, *chances)
        ctx.plan, ctx.settings = plan, (heads, kv_heads, scale, prompt_only)
        return out.index_select(0, places.to_rows).view(plan.rows, heads * dv).to(ctx.dtype)

    @staticmethod
    @once_differentiable
    @plainly
    def backward(ctx, grad):
        heads, kv_heads, scale, prompt_only = ctx.settings
        plan = ctx.plan
        q, k, v, out, *chances = ctx.saved_tensors
        places = plan.heads(heads)
        dv_size = v.shape[1]
        grad = grad.reshape(-1, dv_size).index_select(0, places.to_places).to(q.dtype)
        places.clear_padding(grad)
        backward = _prompt_gradients if prompt_only else _gradients
        grads = backward(plan, q, k, v, out, grad, chances, heads, kv_heads, scale)
        return (*(g.to(ctx.dtype) for g in grads), *[None] * 7)


def _views(plan, heads, kv_heads, group, own, kv, q, k, v, grad):
    n, S, repeat = group.texts * kv_heads, group.size, heads // kv_heads
    return (
        q[own].view(n, repeat * S, -1),
        k[kv].view(n, S, -1),
        v[kv].view(n, S, -1),
        grad[own].view(n, repeat * S, -1),
    )


def _gradients(plan, q, k, v, out, grad, chances, heads, kv_heads, scale):
    """Of every row."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for group, own, kv, p in _groups(plan, heads, kv_heads, chances):
        qg, kg, vg, dg = _views(plan, heads, kv_heads, group, own, kv, q, k, v, grad)
        torch.bmm(p.transpose(1, 2), dg, out=dv[kv].view(vg.shape))
        ds = torch.bmm(dg, vg.transpose(1, 2))
        ds = torch._softmax_backward_data(ds, p, -1, p.dtype).mul_(scale)
        torch.bmm(ds, kg, out=dq[own].view(qg.shape))
        torch.bmm(ds.transpose(1, 2), qg, out=dk[kv].view(kg.shape))
    rows, kv_rows = plan.heads(heads).to_rows, plan.heads(kv_heads).to_rows
    return tuple(
        x.index_select(0, index).view(plan.rows, -1)
        for x, index in ((dq, rows), (dk, kv_rows), (dv, kv_rows))
    )


def _prompt_gradients(plan, q, k, v, out, grad, chances, heads, kv_heads, scale):
    """Of the prompt rows: as keys and values they have met every row of their text, as queries
    only m rows count.
    """
    m, repeat = plan.m, heads // kv_heads
    parts = ([], [], [])
    for group, own, kv, p in _groups(plan, heads, kv_heads, chances):
        qg, kg, vg, dg = _views(plan, heads, kv_heads, group, own, kv, q, k, v, grad)
        n, S, G = len(kg), group.size, group.texts
        delta = (dg * out[own].view(dg.shape)).sum(-1, keepdim=True)  # [n, repeat S, 1]
        ds = torch.bmm(dg, vg[:, :m].transpose(1, 2)).sub_(delta).mul_(p[..., :m])
        dk = torch.bmm(ds.transpose(1, 2), qg).mul_(scale)  # [n, m, d]
        dv = torch.bmm(p[..., :m].transpose(1, 2), dg)

        def first(x, n=n, S=S):
            return x.view(n, repeat, S, -1)[:, :, :m].reshape(n, repeat * m, -1)

        ds = torch.bmm(first(dg), vg.transpose(1, 2)).sub_(first(delta)).mul_(first(p))
        dq = torch.bmm(ds, kg).mul_(scale)  # [n, repeat m, d]
        for part, x, count in zip(parts, (dq, dk, dv), (heads, kv_heads, kv_heads), strict=True):
            # [G, heads, m, d] -> a row for each prompt row
            part.append(x.view(G, count, m, -1).transpose(1, 2).reshape(G, m, -1))
    out = []
    for part in parts:
        rows = torch.cat(part).index_select(0, plan.inverse_order).flatten(0, 1)
        full = rows.new_empty(plan.rows, rows.shape[1])
        out.append(full.index_copy_(0, plan.prompt_rows, rows))
    return out


@lru_cache(maxsize=1)
def _varlen():
    """PyTorch's variable-length kernel and how it is told of causal attention; None: not there."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # pragma: no cover
        return None
    names = inspect.signature(varlen_attn).parameters
    return varlen_attn, set(names)


@lru_cache(maxsize=1)
def _flash_known() -> bool:
    """Whether this PyTorch's own operators behind `varlen_attn` take what `_Flash` gives them."""
    try:
        forward = torch.ops.aten._flash_attention_forward.default._schema
        backward = torch.ops.aten._flash_attention_backward.default._schema
    except AttributeError:  # pragma: no cover
        return False
    return (
        torch.version.hip is None
        and len(forward.returns) == 5
        and _names(forward)[:9] == _FORWARD
        and _names(backward)[:14] == _BACKWARD
        and all({"scale", *_WINDOW} <= set(_names(schema)) for schema in (forward, backward))
    )


def _names(schema) -> list[str]:
    return [argument.name for argument in schema.arguments]


_TEXTS = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
_FORWARD = ["query", "key", "value", *_TEXTS]
_BACKWARD = ["grad_out", "query", "key", "value", "out", "logsumexp", *_TEXTS]
_BACKWARD += ["rng_state", "unused"]
_WINDOW = ("window_size_left", "window_size_right")


class _Flash(torch.autograd.Function):
    """What `varlen_attn` runs, without its way there: that makes a tensor of zeros in each forward
    and two in each backward, for outputs that nobody has used, and three calls in Python.
    """

    @staticmethod
    def forward(ctx, q, k, v, cu, size, scale, causal):
        how = {"scale": scale, **dict(zip(_WINDOW, (-1, 0 if causal else -1), strict=True))}
        texts = (cu, cu, size, size, 0.0, causal)
        run = torch.ops.aten._flash_attention_forward.default
        out, lse, rng, unused, _ = run(q, k, v, *texts, False, **how)
        ctx.save_for_backward(q, k, v, out, lse, cu, rng, unused)
        ctx.texts, ctx.how = texts[2:], how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, cu, *drawn = ctx.saved_tensors
        run = torch.ops.aten._flash_attention_backward.default
        grad = grad.contiguous()
        return *run(grad, q, k, v, out, lse, cu, cu, *ctx.texts, *drawn, **ctx.how), *[None] * 4


def _by_varlen(q, k, v, plan, heads, kv_heads, scale, causal):
    call, names = _varlen()
    own = _flash_known()
    more = {}
    if "window_size" in names:
        more["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        more["is_causal"] = causal
    if "scale" in names:
        more["scale"] = scale
    elif not own:
        q = q * (scale * (q.shape[1] // heads) ** 0.5)
    q = q.view(plan.rows, heads, -1)
    k, v = (x.view(plan.rows, kv_heads, -1) for x in (k, v))
    if heads != kv_heads:
        if "enable_gqa" in names:
            more["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    cu = plan.cu_seqlens
    if own:
        return _Flash.apply(q, k, v, cu, plan.size, scale, causal).view(plan.rows, -1)
    return call(q, k, v, cu, cu, plan.size, plan.size, **more).reshape(plan.rows, -1)


def _by_sdpa(q, k, v, plan, heads, kv_heads, scale, causal, by_place=None):
    q, k, v = (to_heads(x, plan, n) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    out = []
    for group, own, kv, bias in _groups(plan, heads, kv_heads, biases(plan, causal, q.dtype)):
        shape = (group.texts, heads, group.size, -1)
        kg, vg = (x[kv].view(group.texts, kv_heads, group.size, -1) for x in (k, v))
        if heads != kv_heads:
            kg, vg = (x.repeat_interleave(heads // kv_heads, 1) for x in (kg, vg))
        more = {"is_causal": True} if causal else {"attn_mask": bias}
        if by_place is not None:
            own_places = by_place[:, : group.size, : group.size].to(q.dtype)
            more = {"attn_mask": own_places if bias is None else own_places + bias}
        o = F.scaled_dot_product_attention(q[own].view(shape), kg, vg, scale=scale, **more)
        out.append(o.flatten(0, 2))
    return _from_heads(torch.cat(out) if len(out) > 1 else out[0], plan, heads)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
    prompt_only: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention within each text.

    Args:
        q, k, v: [N, H d], [N, Hk d], [N, Hk d].
        plan: of the batch.
        heads, kv_heads: H and Hk, which divides H.
        scale: of the scores.
        causal: whether a row sees only those before it (and itself).
        bias: added to scores by the places of query and key in their text, [H, S, S] with S at
            least `plan.size`, for all texts; a constant. Not with `causal`.
        prompt_only: the caller reads the gradients of q, k and v at prompt rows alone.

    Returns:
        [N, H d].
    """
    arguments = (q, k, v, plan, heads, kv_heads, scale, causal)
    half = q.dtype in (torch.float16, torch.bfloat16)
    size = q.shape[1] // heads
    # (Kernels that take no bias are left out where there is one.)
    if bias is None and choose_impl("auto", q) == "triton" and (half or not q.is_cuda):
        from lpt_kernels import attention

        if attention.takes(plan.rows, plan.texts, plan.size, size):
            how = dict(heads=heads, kv_heads=kv_heads, scale=scale, causal=causal)
            most = plan.m if prompt_only and plan.even else None
            return attention.attend(q, k, v, plan.cu_seqlens, plan.size, most=most, **how)
    if not q.is_cuda and q.dtype == k.dtype == v.dtype and plan.size <= PRODUCTS_UP_TO:
        return _Products.apply(*arguments, bias, prompt_only and plan.even)
    if bias is None and q.is_cuda and half and size % 8 == 0 and _varlen() is not None:
        return _by_varlen(*arguments)
    return _by_sdpa(*arguments, bias)
