"""The operator's registration with PyTorch and its autograd function; `insertion` is the door.

`lpt_fast::insert_prompt_fwd` makes a packed batch with prompts, `..._into` fills the gaps of a
buffer, `..._bwd` makes the gradients. All run the kernels of lpt_kernels.insert, on CUDA or in
Triton's interpreter. The autograd function stands outside of the operators, so that torch.compile
sees through it.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

_PLACES = (
    "Tensor cu_seqlens, Tensor[] weights, Tensor? insert_at, Tensor? readable_start, "
    "Tensor? readable_count, Tensor? order"
)
_SETTINGS = "str kind, SymInt m, SymInt T, bool last, float p"
_SAVED = "Tensor units, Tensor arg"

_library = torch.library.Library("lpt_fast", "DEF")
_library.define(
    f"insert_prompt_fwd(Tensor hidden, {_PLACES}, Tensor? source_start, Tensor? token_scale, "
    f"Tensor? channel_scale, Tensor? seed, {_SETTINGS}, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"insert_prompt_into(Tensor(a!) buffer, {_PLACES}, Tensor? seed, {_SETTINGS}) "
    "-> (Tensor, Tensor)"
)
_library.define(
    f"insert_prompt_bwd(Tensor grad, Tensor out, {_PLACES}, {_SAVED}, Tensor? seed, {_SETTINGS}, "
    "bool need_weights, bool need_hidden) -> Tensor[]"
)


def _layout(cu_seqlens, m, insert_at, readable_start, readable_count, order, last, **more):
    from lpt_kernels.insert import Layout

    return Layout(
        cu_seqlens, m, insert_at, readable_start, readable_count, order, last=last, **more
    )


def _fwd(
    hidden,
    cu_seqlens,
    weights,
    insert_at,
    readable_start,
    readable_count,
    order,
    source_start,
    token_scale,
    channel_scale,
    seed,
    kind,
    m,
    T,
    last,
    p,
    dtype,
):
    from lpt_kernels.insert import insert_fwd

    layout = _layout(
        cu_seqlens,
        m,
        insert_at,
        readable_start,
        readable_count,
        order,
        last,
        source_start=source_start,
        token_scale=token_scale,
        channel_scale=channel_scale,
    )
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    weights = [w.contiguous() for w in weights]
    return insert_fwd(kind, hidden, layout, weights, T=T, dtype=dtype, p_drop=p, seed=seed)


def _into(
    buffer,
    cu_seqlens,
    weights,
    insert_at,
    readable_start,
    readable_count,
    order,
    seed,
    kind,
    m,
    T,
    last,
    p,
):
    from lpt_kernels.insert import insert_fwd

    layout = _layout(cu_seqlens, m, insert_at, readable_start, readable_count, order, last)
    weights = [w.contiguous() for w in weights]
    _, *saved = insert_fwd(
        kind,
        None,
        layout,
        weights,
        T=T,
        dtype=buffer.dtype,
        p_drop=p,
        seed=seed,
        out=buffer,
    )
    return tuple(saved)


def _bwd(
    grad,
    out,
    cu_seqlens,
    weights,
    insert_at,
    readable_start,
    readable_count,
    order,
    units,
    arg,
    seed,
    kind,
    m,
    T,
    last,
    p,
    need_weights,
    need_hidden,
):
    from lpt_kernels.insert import insert_bwd

    layout = _layout(cu_seqlens, m, insert_at, readable_start, readable_count, order, last)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    d_hidden, d_weights = insert_bwd(
        kind,
        grad,
        out,
        layout,
        [w.contiguous() for w in weights],
        units,
        arg,
        T=T,
        p_drop=p,
        seed=seed,
        need_weights=need_weights,
        need_hidden=need_hidden,
    )
    return [grad.new_empty(0) if d_hidden is None else d_hidden, *d_weights]


def _saved_shapes(like, cu_seqlens, weights, kind, m, dtype):
    """Empty tensors as the kernels save them."""
    B = cu_seqlens.shape[0] - 1
    R = 0 if kind == "static" else weights[0].shape[0]
    units = {"static": (0,), "npg": (B, R)}.get(kind, (B * m, R))
    arg = (B * m, R) if kind == "mppg" else (0,)
    return like.new_empty(units, dtype=dtype), like.new_empty(arg, dtype=torch.int32)


@torch.library.register_fake("lpt_fast::insert_prompt_fwd", lib=_library)
def _fwd_fake(hidden, cu_seqlens, weights, *rest):
    kind, m, T, _, _, dtype = rest[-6:]
    B = cu_seqlens.shape[0] - 1
    out = hidden.new_empty((T + B * m, hidden.shape[1]), dtype=dtype)
    return (out, *_saved_shapes(hidden, cu_seqlens, weights, kind, m, dtype))


@torch.library.register_fake("lpt_fast::insert_prompt_into", lib=_library)
def _into_fake(buffer, cu_seqlens, weights, *rest):
    kind, m, *_ = rest[-5:]
    return _saved_shapes(buffer, cu_seqlens, weights, kind, m, buffer.dtype)


@torch.library.register_fake("lpt_fast::insert_prompt_bwd", lib=_library)
def _bwd_fake(grad, out, cu_seqlens, weights, *rest):
    _, _, T, _, _, need_weights, need_hidden = rest[-7:]
    d_hidden = grad.new_empty((T, grad.shape[1]) if need_hidden else (0,))
    shapes = []
    if need_weights and len(weights) == 1:
        shapes = [weights[0].shape]
    elif need_weights:
        w_up, b_up = weights[2:]
        shapes = [*(w.shape for w in weights[:2]), (w_up.numel() + b_up.numel(),)]
    return [d_hidden, *(grad.new_empty(size, dtype=torch.float32) for size in shapes)]


for _key in ("CPU", "CUDA"):
    _library.impl("insert_prompt_fwd", _fwd, _key)
    _library.impl("insert_prompt_into", _into, _key)
    _library.impl("insert_prompt_bwd", _bwd, _key)


# -- autograd --------------------------------------------------------------------------------------


def _narrow(kind, weights, dtype):
    """Weights rounded to the dtype of the products where many programs read them; biases and what
    is read only once (npg's W_u is large) are rounded on the way.
    """
    often = kind in ("appg", "mppg")
    return [w.to(dtype) if often and w.dim() >= 2 else w for w in weights]


class _Insert(torch.autograd.Function):
    """Forward and backward of the operator; `places` and `settings` are its arguments in order."""

    @staticmethod
    def forward(ctx, hidden, in_place, places, sources, seed, settings, dtype, *weights):
        kind, T = settings[0], settings[2]
        narrow = _narrow(kind, weights, dtype)
        cu_seqlens, *optional = places
        if in_place:
            saved = torch.ops.lpt_fast.insert_prompt_into(
                hidden, cu_seqlens, narrow, *optional, seed, *settings
            )
            ctx.mark_dirty(hidden)
            out = hidden
        else:
            out, *saved = torch.ops.lpt_fast.insert_prompt_fwd(
                hidden, cu_seqlens, narrow, *optional, *sources, seed, *settings, dtype
            )
        # The text rows of the output stand for `hidden`, which nobody needs any more.
        ctx.save_for_backward(out, cu_seqlens, *optional, *saved, seed, *narrow)
        ctx.settings = settings
        ctx.shape = None if in_place else hidden.shape
        ctx.dtypes = [w.dtype for w in weights]
        assert in_place or sources[0] is not None or hidden.shape[0] == T
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        out, cu_seqlens, *more = ctx.saved_tensors
        optional, saved, seed, weights = more[:4], more[4:6], more[6], more[7:]
        need_hidden = ctx.needs_input_grad[0]
        need_weights = any(ctx.needs_input_grad[7:])
        d_hidden, *d_weights = torch.ops.lpt_fast.insert_prompt_bwd(
            grad,
            out,
            cu_seqlens,
            weights,
            *optional,
            *saved,
            seed,
            *ctx.settings,
            need_weights,
            need_hidden,
        )
        d_hidden = d_hidden.view(ctx.shape) if need_hidden else None
        if need_weights:
            if len(weights) > 1:  # proj_up's bias lies behind its weight
                # (PyTorch 2.11's compiler takes what a star collects for a tuple.)
                *down, up = d_weights
                parts = up.split([w.numel() for w in weights[2:]])
                up = [part.view(w.shape) for part, w in zip(parts, weights[2:], strict=True)]
                d_weights = [*down, *up]
            d_weights = [g.to(dtype) for g, dtype in zip(d_weights, ctx.dtypes, strict=True)]
        else:
            d_weights = [None] * len(weights)
        return (d_hidden, None, None, None, None, None, None, *d_weights)


def run_insertion(hidden, in_place, places, sources, seed, settings, dtype, weights):
    """The operator with autograd, or the registered one alone where no gradient is wanted.
    Arguments are those of `_Insert`.
    """
    needs = torch.is_grad_enabled() and (
        hidden.requires_grad or any(w.requires_grad for w in weights)
    )
    if in_place and hidden.requires_grad:
        raise ValueError(
            "`buffer` requires a gradient, expected a constant, since its rows are overwritten in "
            "place; use insert_prompt."
        )
    if needs or in_place:
        return _Insert.apply(hidden, in_place, places, sources, seed, settings, dtype, *weights)
    cu_seqlens, *optional = places
    narrow = _narrow(settings[0], weights, dtype)
    return torch.ops.lpt_fast.insert_prompt_fwd(
        hidden, cu_seqlens, narrow, *optional, *sources, seed, *settings, dtype
    )[0]
