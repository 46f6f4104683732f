"""The gradients of a fused prompt insertion, launch by launch.

In order: dz of the prompt rows, the gradient of W_u, what dz means for the down-projection of each
text row (d_h), the gradient of W_d, and that of the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .insert_config import (
    block_p,
    block_r,
    chunks_of,
    config_of,
    splits_of,
)
from .insert_down import (
    down_bwd_kernel,
    read_rows_kernel,
)
from .insert_hidden import hidden_bwd_kernel
from .insert_layout import BINS, PLACES, Layout
from .insert_pool import pools_bwd_kernel
from .insert_static import static_bwd_kernel
from .insert_up import dz_bwd_kernel, up_bwd_kernel, up_bwd_weight_kernel
from .launch import ceil_div, launch, precision_of


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
            **layout.arguments(*PLACES, *BINS),
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
        **layout.arguments(*PLACES),
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
        **layout.arguments(*PLACES),
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
    common = layout.arguments(*PLACES, *BINS, "order") | dict(B=B, m=m)
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
        num_warps=8 if dz.dtype == torch.float32 else 4,  # (fp32: 4 spill on sm_80.)
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
