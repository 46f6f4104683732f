"""Fused prompt insertion: the prompt generator and the concatenation in one pass over the text.

`insert_fwd` and `insert_bwd` are plain functions on tensors; autograd, checks and the registration
with PyTorch are lpt_fast.insertion's. Formulas: lpt_fast/insertion/reference.py (paper section
3.2). Launch configurations: insert_config.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .insert_bwd import (
    down_bwd_kernel,
    dz_bwd_kernel,
    hidden_bwd_kernel,
    pools_bwd_kernel,
    read_rows_kernel,
    static_bwd_kernel,
    up_bwd_kernel,
    up_bwd_weight_kernel,
)
from .insert_config import (
    Config,
    block_d,
    block_p,
    block_r,
    candidates,
    chunks_of,
    config_of,
    splits_of,
)
from .insert_fwd import (
    npg_down_fwd_kernel,
    pool_fwd_kernel,
    pools_down_fwd_kernel,
    static_fwd_kernel,
    up_fwd_kernel,
)
from .launch import best_config, ceil_div, launch, precision_of

KINDS = ("static", "npg", "appg", "mppg")


@dataclass(frozen=True)
class Layout:
    """Where the rows of a batch are; see rows.py for the meaning of each tensor.

    Attributes:
        cu_seqlens: int32 [B+1].
        m: prompt rows per example.
        insert_at: int32 [B] or None.
        readable_start, readable_count: int32 [B], both or neither.
        order: int32 [T] or None.
        source_start: int64 [B] or None; given, `hidden` is a cache.
        token_scale, channel_scale: fp32, of a quantised cache ([rows of the cache], [D]).
        last: npg reads the last readable row instead of the first.
    """

    cu_seqlens: Tensor
    m: int
    insert_at: Tensor | None = None
    readable_start: Tensor | None = None
    readable_count: Tensor | None = None
    order: Tensor | None = None
    source_start: Tensor | None = None
    token_scale: Tensor | None = None
    channel_scale: Tensor | None = None
    last: bool = False

    @property
    def B(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def arguments(self, *names: str) -> dict[str, object]:
        """The kernel arguments of these tensors."""
        return {f"{name}_ptr": getattr(self, name) for name in names}


_PLACES = ("cu_seqlens", "insert_at")
_BINS = ("readable_start", "readable_count")
_SOURCES = ("order", "source_start", "token_scale", "channel_scale")


def _store(hidden: Tensor) -> str:
    return {torch.int8: "int8", torch.uint8: "fp8"}.get(hidden.dtype, "plain")


def insert_fwd(
    kind: str,
    hidden: Tensor | None,
    layout: Layout,
    weights: list[Tensor],
    *,
    T: int,
    dtype: torch.dtype,
    p_drop: float = 0.0,
    seed: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed rows with prompts.

    Args:
        kind: of KINDS.
        hidden: [T, D] rows (last dimension contiguous), a cache, or None with `out`.
        layout: where the rows are.
        weights: static: [prompt [m, D] or [B, m, D]]; else proj_down.weight, proj_down.bias,
            proj_up.weight, proj_up.bias. Rounded to `dtype` before products.
        T: text rows of the batch.
        dtype: of the output.
        p_drop: dropout probability on the prompt, with `seed` int64 [1].
        out: [T + B m, D] with the text in place already; only prompt rows are written (the
            in-place form).

    Returns:
        out [T + B m, D], and what `insert_bwd` needs: u [B or B m, R] in `dtype`, the
        bottleneck's units behind their ReLU, and arg int32 [B m, R] (mppg), the text rows that
        have the maxima; empty where not used.
    """
    B, m = layout.B, layout.m
    in_place = out is not None
    if in_place:
        hidden = out
    D = hidden.shape[1]
    if out is None:
        out = hidden.new_empty((T + B * m, D), dtype=dtype)
    drop = p_drop > 0
    common = dict(
        x_ptr=hidden,
        out_ptr=out,
        T=T,
        B=B,
        m=m,
        D=D,
        stride_xt=hidden.stride(0),
        STORE=_store(hidden),
        **layout.arguments(*_PLACES, *_SOURCES),
    )
    none, none_arg = out.new_empty(0), out.new_empty(0, dtype=torch.int32)
    if kind == "static":
        (prompt,) = weights
        block_t = 16
        copy_tiles = 0 if in_place else ceil_div(T, block_t)
        launch(
            static_fwd_kernel,
            (copy_tiles + ceil_div(B * m, block_t),),
            prompt_ptr=prompt,
            seed_ptr=seed if drop else None,
            p_drop=p_drop,
            copy_tiles=copy_tiles,
            SHARED=prompt.dim() == 2,
            DROP=drop,
            BLOCK_T=block_t,
            BLOCK_D=block_d(D, 256),
            **common,
        )
        return out, none, none_arg

    w_down, b_down, w_up, b_up = weights
    R = w_down.shape[0]
    down = dict(
        common,
        w_down_ptr=w_down,
        R=R,
        IN_PLACE=in_place,
        PRECISION=precision_of(dtype),
    )
    key = (kind, dtype, D, R, in_place, T.bit_length(), B.bit_length())
    arg = none_arg
    if kind == "npg":
        u = out.new_empty((B, R))

        def run_down(config: Config):
            r_block = min(block_r(R), config.BLOCK_R)
            down_tiles = ceil_div(B, 16) * ceil_div(R, r_block)
            launch(
                npg_down_fwd_kernel,
                (down_tiles + (0 if in_place else ceil_div(T, config.BLOCK_T)),),
                u_ptr=u,
                b_down_ptr=b_down,
                down_tiles=down_tiles,
                LAST=layout.last,
                BLOCK_B=16,
                BLOCK_R=r_block,
                **config.blocks("BLOCK_T", "BLOCK_D"),
                **layout.arguments(*_BINS),
                **down,
            )

    else:
        u, h = out.new_empty((B * m, R)), out.new_empty((T, R))
        if kind == "mppg":
            arg = none_arg.new_empty((B * m, R))

        def run_down(config: Config):
            launch(
                pools_down_fwd_kernel,
                (ceil_div(T, config.BLOCK_T), ceil_div(R, block_r(R))),
                h_ptr=h,
                BLOCK_R=block_r(R),
                **config.blocks("BLOCK_T", "BLOCK_D"),
                **down,
            )

    name = "npg_down_fwd" if kind == "npg" else "pools_down_fwd"
    default = config_of(name, dtype, D)
    run_down(best_config((name, *key), default, candidates(name, D), run_down, out.device))

    rows = len(u)
    if kind != "npg":
        launch(
            pool_fwd_kernel,
            (ceil_div(rows, 16), ceil_div(R, block_r(R))),
            u_ptr=u,
            arg_ptr=arg,
            h_ptr=h,
            b_down_ptr=b_down,
            rows=rows,
            m=m,
            R=R,
            KIND=kind,
            BLOCK_P=16,
            BLOCK_R=block_r(R),
            **layout.arguments("cu_seqlens", *_BINS),
        )

    def run_up(config: Config):
        p_block = block_p(rows, config.BLOCK_T)
        columns = ceil_div(D, config.BLOCK_D) * (m if kind == "npg" else 1)
        chunk, splits = chunks_of(rows, p_block, columns)
        launch(
            up_fwd_kernel,
            (columns, splits),
            out_ptr=out,
            u_ptr=u,
            w_up_ptr=w_up,
            b_up_ptr=b_up,
            seed_ptr=seed if drop else None,
            rows=rows,
            m=m,
            D=D,
            R=R,
            p_drop=p_drop,
            chunk=chunk,
            KIND=kind,
            DROP=drop,
            PRECISION=precision_of(dtype),
            ONE_R=block_r(R) >= R,
            BLOCK_P=p_block,
            BLOCK_R=block_r(R),
            **config.blocks("BLOCK_D"),
            **layout.arguments(*_PLACES),
        )

    name = "npg_up_fwd" if kind == "npg" else "up_fwd"
    default = config_of(name, dtype, D)
    run_up(best_config((name, *key), default, candidates(name, D), run_up, out.device))
    return out, u, arg


def insert_bwd(
    kind: str,
    grad: Tensor,
    out: Tensor,
    layout: Layout,
    weights: list[Tensor],
    u: Tensor,
    arg: Tensor,
    *,
    T: int,
    p_drop: float,
    seed: Tensor | None,
    need_weights: bool,
    need_hidden: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of hidden [T, D] (None unless asked) and of the weights (fp32, empty unless asked):
    of a static prompt in its shape; else of proj_down's weight and bias, and one flat tensor of
    proj_up's weight with its bias behind it, as one sum makes them.

    Args:
        grad: of the output, [T + B m, D], last dimension contiguous.
        out: the output; its text rows stand for `hidden`.
        u, arg: from `insert_fwd`; the rest as there.
    """
    B, m, D = layout.B, layout.m, grad.shape[1]
    drop = p_drop > 0
    drops = dict(seed_ptr=seed if drop else None, p_drop=p_drop, DROP=drop)
    if kind == "static":
        d_weights = [_static_bwd(grad, layout, weights[0], drops)] if need_weights else []
        d_h = place = None
    else:
        dz, prompt_rows = _dz(kind, grad, layout, weights, u, drops)
        d_h, place = _d_h(kind, dz, arg, layout, T)
        d_weights = []
        if need_weights:
            d_weights = [
                _down_weight(out, d_h, place),
                dz.sum(0, dtype=torch.float32),
                _up_weight(kind, grad, layout.m, u, prompt_rows, drops),
            ]
    if not need_hidden:
        return None, d_weights
    d_hidden = grad.new_empty((T, D))
    R = 1 if d_h is None else d_h.shape[1]
    config = config_of("hidden_bwd", grad.dtype, D)

    def run(count, d_h, read=False):
        launch(
            hidden_bwd_kernel,
            (ceil_div(count, config.BLOCK_T),),
            grad_ptr=grad,
            d_x_ptr=d_hidden,
            w_down_ptr=None if d_h is None else weights[0],
            d_h_ptr=d_h,
            order_ptr=layout.order,
            count=count,
            B=B,
            m=m,
            D=D,
            R=R,
            stride_gt=grad.stride(0),
            READ=read,
            LAST=layout.last,
            PRECISION=precision_of(grad.dtype),
            ONE_R=block_r(R) >= R,
            BLOCK_R=block_r(R),
            **config.blocks("BLOCK_T", "BLOCK_D"),
            **layout.arguments(*_PLACES, *_BINS),
        )

    run(T, None if kind == "npg" else d_h)
    if kind == "npg":  # the few rows that it read, once more
        run(B, d_h, read=True)
    return d_hidden, d_weights


def _static_bwd(grad, layout, prompt, drops) -> Tensor:
    B, m, D = layout.B, layout.m, grad.shape[1]
    shared = prompt.dim() == 2
    config = config_of("static_bwd", grad.dtype, D)
    columns = ceil_div(D, config.BLOCK_D)
    # (Nothing is pipelined there: many programs hide the wait for memory.)
    chunk, splits = chunks_of(B, 32, m * columns, programs=4096)
    size = (splits, m, D) if shared else (B, m, D)
    d_prompt = grad.new_empty(size, dtype=torch.float32)
    launch(
        static_bwd_kernel,
        (m, columns, splits),
        grad_ptr=grad,
        d_prompt_ptr=d_prompt,
        B=B,
        m=m,
        D=D,
        stride_gt=grad.stride(0),
        chunk=chunk,
        SHARED=shared,
        BLOCK_B=32,
        **config.blocks("BLOCK_D"),
        **drops,
        **layout.arguments(*_PLACES),
    )
    return _total(d_prompt) if shared else d_prompt


def _dz(kind, grad, layout, weights, u, drops) -> tuple[Tensor, Tensor]:
    """Gradient before the ReLU, [rows, R] in the dtype of u, and the output row of each prompt row,
    or of each example's first (npg), int32 [rows].
    """
    m, D, (rows, R) = layout.m, grad.shape[1], u.shape
    config = config_of("up_bwd", grad.dtype, D)
    p_block, r_blocks = block_p(rows, config.BLOCK_T), ceil_div(R, block_r(R))
    row_blocks, units = ceil_div(rows, p_block), m if kind == "npg" else 1
    # So many parts of D that there are programs for every multiprocessor.
    parts = splits_of(row_blocks * r_blocks * units, ceil_div(D, config.BLOCK_D))
    width = ceil_div(ceil_div(D, config.BLOCK_D), parts) * config.BLOCK_D
    parts = ceil_div(D, width)
    splits = units * parts
    dz, place = torch.empty_like(u), u.new_empty(rows, dtype=torch.int32)
    whole = splits == 1
    partial = dz if whole else u.new_empty((splits, rows, R), dtype=torch.float32)
    launch(
        up_bwd_kernel,
        (row_blocks, r_blocks, splits),
        grad_ptr=grad,
        dz_ptr=partial,
        place_ptr=place,
        u_ptr=u,
        w_up_ptr=weights[2],
        rows=rows,
        m=m,
        D=D,
        R=R,
        stride_gt=grad.stride(0),
        parts=parts,
        part_width=width,
        KIND=kind,
        WHOLE=whole,
        PRECISION=precision_of(grad.dtype),
        BLOCK_P=p_block,
        BLOCK_R=block_r(R),
        **config.blocks("BLOCK_D"),
        **drops,
        **layout.arguments(*_PLACES),
    )
    if not whole:
        launch(
            dz_bwd_kernel,
            (ceil_div(rows, 16), r_blocks),
            partial_ptr=partial,
            dz_ptr=dz,
            u_ptr=u,
            rows=rows,
            R=R,
            splits=splits,
            BLOCK_P=16,
            BLOCK_R=block_r(R),
        )
    return dz, place


def _d_h(kind, dz, arg, layout, T) -> tuple[Tensor, Tensor]:
    """Gradient of the down-projection of the rows that the generator has read, [T, R], npg: [B, R];
    and the output rows that these are, int32, -1 for those that it has not read.
    """
    B, m, R = layout.B, layout.m, dz.shape[1]
    common = layout.arguments(*_PLACES, *_BINS, "order") | dict(B=B, m=m)
    if kind == "npg":
        place = dz.new_empty(B, dtype=torch.int32)
        launch(
            read_rows_kernel,
            (ceil_div(B, 128),),
            place_ptr=place,
            LAST=layout.last,
            BLOCK_B=128,
            **common,
        )
        return dz, place
    d_h, place = dz.new_empty((T, R)), dz.new_empty(T, dtype=torch.int32)
    block_t = 32
    launch(
        pools_bwd_kernel,
        (ceil_div(T, block_t), ceil_div(R, block_r(R))),
        d_h_ptr=d_h,
        place_ptr=place,
        dz_ptr=dz,
        arg_ptr=arg,
        T=T,
        R=R,
        KIND=kind,
        BLOCK_T=block_t,
        BLOCK_R=block_r(R),
        num_warps=8,
        **common,
    )
    return d_h, place


def _up_weight(kind, grad, m, u, place, drops) -> Tensor:
    """Gradients of W_u [N, R] and b_u [N] one behind the other, fp32."""
    D, (rows, R) = grad.shape[1], u.shape
    N = m * D if kind == "npg" else D
    config = config_of(f"{'npg_' if kind == 'npg' else ''}up_bwd_weight", grad.dtype, D)
    p_block = block_p(rows, config.BLOCK_T)
    blocks = ceil_div(D, config.BLOCK_D) * (N // D) * ceil_div(R, block_r(R))
    chunk, splits = chunks_of(rows, p_block, blocks)
    partial = u.new_empty((splits, N * R + N), dtype=torch.float32)
    launch(
        up_bwd_weight_kernel,
        (ceil_div(D, config.BLOCK_D) * (N // D), ceil_div(R, block_r(R)), splits),
        grad_ptr=grad,
        d_w_ptr=partial,
        u_ptr=u,
        place_ptr=place,
        rows=rows,
        m=m,
        D=D,
        R=R,
        stride_gt=grad.stride(0),
        stride_split=partial.stride(0),
        chunk=chunk,
        KIND=kind,
        PRECISION=precision_of(grad.dtype),
        BLOCK_P=p_block,
        BLOCK_R=block_r(R),
        **config.blocks("BLOCK_D"),
        **drops,
    )
    return _total(partial)


def _down_weight(out, d_h, place) -> Tensor:
    """Gradient of W_d [R, D], fp32."""
    (count, R), D = d_h.shape, out.shape[1]
    config = config_of("down_bwd", out.dtype, D)
    r_blocks = ceil_div(R, block_r(R))
    chunk, splits = chunks_of(count, config.BLOCK_T, ceil_div(D, config.BLOCK_D) * r_blocks)
    partial = d_h.new_empty((splits, R, D), dtype=torch.float32)
    launch(
        down_bwd_kernel,
        (ceil_div(D, config.BLOCK_D), r_blocks, splits),
        out_ptr=out,
        d_w_ptr=partial,
        d_h_ptr=d_h,
        place_ptr=place,
        count=count,
        D=D,
        R=R,
        stride_split=partial.stride(0),
        chunk=chunk,
        PRECISION=precision_of(out.dtype),
        BLOCK_R=block_r(R),
        **config.blocks("BLOCK_T", "BLOCK_D"),
    )
    return _total(partial)


def _total(partial: Tensor) -> Tensor:
    return partial[0] if partial.shape[0] == 1 else partial.sum(0)
