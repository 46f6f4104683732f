"""Fused prompt insertion: the prompt generator and the concatenation in one pass over the text.

`insert_fwd` and `insert_bwd` are plain functions on tensors; autograd, checks and the registration
with PyTorch are lpt_fast.insertion's. Formulas: lpt_fast/insertion/reference.py (paper section
3.2). Launch configurations: insert_config.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .insert_backward import insert_bwd
from .insert_config import (
    Config,
    block_d,
    block_p,
    block_r,
    candidates,
    chunks_of,
    config_of,
)
from .insert_down import (
    npg_down_fwd_kernel,
    pools_down_fwd_kernel,
)
from .insert_layout import BINS, PLACES, SOURCES, Layout
from .insert_pool import pool_fwd_kernel
from .insert_static import static_fwd_kernel
from .insert_up import up_fwd_kernel
from .launch import best_config, ceil_div, launch, precision_of

KINDS = ("static", "npg", "appg", "mppg")
__all__ = ["KINDS", "Layout", "insert_bwd", "insert_fwd"]


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
        **layout.arguments(*PLACES, *SOURCES),
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
                **layout.arguments(*BINS),
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
            **layout.arguments("cu_seqlens", *BINS),
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
            **layout.arguments(*PLACES),
        )

    name = "npg_up_fwd" if kind == "npg" else "up_fwd"
    default = config_of(name, dtype, D)
    run_up(best_config((name, *key), default, candidates(name, D), run_up, out.device))
    return out, u, arg
