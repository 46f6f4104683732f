"""Fused prompt insertion: the prompt generator and the concatenation in one pass over the text.

`insert_fwd` and `insert_bwd` are plain functions on tensors; autograd, checks and the registration
with PyTorch are lpt_fast.insertion's. Formulas: lpt_fast/reference.py (paper section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .insert_bwd import (
    down_bwd_kernel,
    hidden_bwd_kernel,
    npg_down_bwd_kernel,
    static_bwd_kernel,
    up_bwd_kernel,
    up_bwd_weight_kernel,
)
from .insert_fwd import (
    appg_down_fwd_kernel,
    mppg_down_fwd_kernel,
    npg_down_fwd_kernel,
    static_fwd_kernel,
    up_fwd_kernel,
)
from .launch import best_config, ceil_div, launch, next_power_of_2

KINDS = ("static", "npg", "appg", "mppg")
# Text rows of a program of the pooling kernels, and so of a share of `left`. Twice as many would
# halve how often W_d is read from the L2 cache, but [128, 128] blocks in fp32 do not fit the
# registers (128 rows of mppg spilled 296 bytes a thread on sm_90 with 8 warps).
TILE = 64


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


@dataclass(frozen=True)
class Config:
    """Launch configuration of one kernel."""

    BLOCK_D: int
    num_warps: int = 4
    num_stages: int = 2


def _steps(B: int) -> int:
    # In fours, so that few batch sizes need machine code of their own.
    return ceil_div(B.bit_length() + 1, 4) * 4


def _block_r(R: int) -> int:
    return next_power_of_2(min(R, 128), 16)


def _precision(dtype: torch.dtype) -> str:
    """What PyTorch's own setting for fp32 products asks of tl.dot."""
    setting = torch.get_float32_matmul_precision() if dtype == torch.float32 else "highest"
    if torch.version.hip is not None:
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[setting]


def _block_d(D: int, most: int) -> int:
    return next_power_of_2(min(D, most), 16)


def _config(kernel: str, kind: str, dtype: torch.dtype, D: int) -> Config:
    """Blocks that fit the registers of every target (python -m lpt_kernels.targets --check).

    Products of fp32 numbers have no tensor cores and hold whole rows of both factors in registers,
    so that their blocks are smaller.
    """
    block_d, num_warps = (_BLOCKS_FP32 if dtype == torch.float32 else _BLOCKS)[kernel, kind]
    return Config(_block_d(D, block_d), num_warps)


def _candidates(D: int) -> list[Config]:
    """What LPT_AUTOTUNE=1 tries beside the default."""
    return [Config(_block_d(D, d), w, s) for d in (32, 64, 128) for w in (4, 8) for s in (2, 3)]


_POOLS = ("appg", "mppg")
# (kernel, kind) -> columns of a block at most, warps.
_BLOCKS = {
    ("down_fwd", "npg"): (64, 4),
    **{("down_fwd", kind): (64, 8) for kind in _POOLS},
    **{("up_fwd", kind): (64, 4) for kind in KINDS},
    **{("up_bwd", kind): (32, 8) for kind in KINDS},
    **{("up_bwd_weight", kind): (128, 8) for kind in KINDS},
    ("down_bwd", "appg"): (64, 8),
    ("down_bwd", "mppg"): (128, 8),
    **{("hidden_bwd", kind): (64, 8 if kind == "appg" else 4) for kind in KINDS},
}
_BLOCKS_FP32 = _BLOCKS | {
    ("down_fwd", "npg"): (32, 4),
    **{("down_fwd", kind): (16, 8) for kind in _POOLS},
    **{("up_fwd", kind): (16, 8) for kind in KINDS},
    **{("up_bwd", kind): (16, 8) for kind in KINDS},
    **{("up_bwd_weight", kind): (64, 8) for kind in KINDS},
    ("down_bwd", "appg"): (32, 8),
    ("down_bwd", "mppg"): (64, 8),
    **{("hidden_bwd", kind): (32, 8) for kind in KINDS},
}


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
        out [T + B m, D], and what `insert_bwd` needs: z [B or B m, R] in `dtype`, arg int32
        [B m, R] (mppg), left [tiles, R], left_arg int32 [tiles, R] (mppg); empty where not used.
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
        STEPS=_steps(B),
        STORE=_store(hidden),
        **layout.arguments(*_PLACES, *_SOURCES),
    )
    none = out.new_empty(0)
    none_arg = out.new_empty(0, dtype=torch.int32)
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
            BLOCK_D=_block_d(D, 256),
            **common,
        )
        return out, none, none_arg, none.clone(), none_arg.clone()

    w_down, b_down, w_up, b_up = weights
    R = w_down.shape[0]
    block_r = _block_r(R)
    down = dict(
        common,
        w_down_ptr=w_down,
        R=R,
        IN_PLACE=in_place,
        PRECISION=_precision(dtype),
        BLOCK_R=block_r,
        **layout.arguments(*_BINS),
    )
    arg, left, left_arg = none_arg, none, none_arg.clone()
    r_blocks = ceil_div(R, block_r)
    key = (kind, dtype, D, block_r, in_place, T.bit_length(), B.bit_length())
    if kind == "npg":
        z = out.new_empty((B, R))
        down_tiles = ceil_div(B, 16) * r_blocks
        grid = (down_tiles + (0 if in_place else ceil_div(T, 32)),)

        def run(config):
            launch(
                npg_down_fwd_kernel,
                grid,
                z_ptr=z,
                down_tiles=down_tiles,
                LAST=layout.last,
                BLOCK_B=16,
                BLOCK_T=32,
                BLOCK_D=config.BLOCK_D,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **down,
            )

    else:
        tiles = ceil_div(T, TILE)
        z = out.new_empty((B * m, R))
        # Zeros, for a tile in which no bin goes on leaves its share alone.
        left = out.new_zeros((tiles, R), dtype=torch.float32 if kind == "appg" else dtype)
        if kind == "mppg":
            arg = none_arg.new_empty((B * m, R))
            left_arg = none_arg.new_zeros((tiles, R))
            # Prompt rows whose maxima are looked for together.
            extra = dict(arg_ptr=arg, left_arg_ptr=left_arg, BLOCK_P=16, LONG=8)
        else:
            # Bins that a tile of average texts touches, with room for shorter ones.
            extra = dict(BLOCK_P=_bins_of_tile(TILE, T, B, m))
        kernel = mppg_down_fwd_kernel if kind == "mppg" else appg_down_fwd_kernel

        def run(config):
            launch(
                kernel,
                (tiles, r_blocks),
                z_ptr=z,
                left_ptr=left,
                TILE=TILE,
                BLOCK_D=config.BLOCK_D,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **extra,
                **down,
            )

    default = _config("down_fwd", kind, dtype, D)
    run(best_config(("down", *key), default, _candidates(D), run, out.device))
    _up(kind, out, z, left, b_down, w_up, b_up, layout, p_drop, seed, key)
    return out, z, arg, left, left_arg


def _bins_of_tile(tile: int, T: int, B: int, m: int) -> int:
    bins = tile * m * B // max(T, 1) + 2
    return next_power_of_2(min(bins + bins // 4, 128), 16)


def _up(kind, out, z, left, b_down, w_up, b_up, layout, p_drop, seed, key):
    """Second launch: prompt rows from z."""
    rows, R = z.shape
    D, m = out.shape[1], layout.m
    block_r = _block_r(R)
    block_p = next_power_of_2(min(rows, 64), 16)
    # A program makes about 1,024 columns of npg's prompts from its rows of z.
    J = min(m, max(1, 1024 // D)) if kind == "npg" else 1
    row_blocks = ceil_div(rows, block_p)
    # Each split of D reads z again; that may cost a twentieth of what has to be moved.
    T = out.shape[0] - layout.B * m
    room = (2 * T + rows) * D // max(20 * rows * R, 1)
    splits = 1 if kind == "npg" else max(1, min(4, 132 // max(row_blocks, 1), room))

    def run(config):
        launch(
            up_fwd_kernel,
            (row_blocks, splits, ceil_div(m, J) if kind == "npg" else 1),
            out_ptr=out,
            z_ptr=z,
            left_ptr=left,
            b_down_ptr=b_down,
            w_up_ptr=w_up,
            b_up_ptr=b_up,
            seed_ptr=seed if p_drop > 0 else None,
            rows=rows,
            m=m,
            D=D,
            R=R,
            p_drop=p_drop,
            KIND=kind,
            DROP=p_drop > 0,
            PRECISION=_precision(out.dtype),
            TILE=TILE,
            J=J,
            ONE_R=block_r >= R,
            BLOCK_P=block_p,
            BLOCK_R=block_r,
            BLOCK_D=config.BLOCK_D,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **layout.arguments(*_PLACES, *_BINS),
        )

    default = _config("up_fwd", kind, out.dtype, D)
    run(best_config(("up", *key), default, _candidates(D), run, out.device))


def insert_bwd(
    kind: str,
    grad: Tensor,
    out: Tensor,
    layout: Layout,
    weights: list[Tensor],
    z: Tensor,
    arg: Tensor,
    left: Tensor,
    left_arg: Tensor,
    *,
    T: int,
    p_drop: float,
    seed: Tensor | None,
    need_weights: bool,
    need_hidden: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of hidden [T, D] (None unless asked) and of the weights (fp32, empty unless asked).

    Args:
        grad: of the output, [T + B m, D], last dimension contiguous.
        out: the output; its text rows stand for `hidden`.
        z, arg, left, left_arg: from `insert_fwd`; the rest as there.
    """
    B, m, D = layout.B, layout.m, grad.shape[1]
    drop = p_drop > 0
    drops = dict(seed_ptr=seed if drop else None, p_drop=p_drop, DROP=drop)
    places = layout.arguments(*_PLACES)
    bins = layout.arguments(*_BINS)
    precision = _precision(grad.dtype)
    if kind == "static":
        d_weights = []
        if need_weights:
            (prompt,) = weights
            d_prompt = grad.new_empty(prompt.shape, dtype=torch.float32)
            block_d = _block_d(D, 128)
            launch(
                static_bwd_kernel,
                (m, ceil_div(D, block_d)),
                grad_ptr=grad,
                d_prompt_ptr=d_prompt,
                B=B,
                m=m,
                D=D,
                stride_gt=grad.stride(0),
                SHARED=prompt.dim() == 2,
                BLOCK_B=32,
                BLOCK_D=block_d,
                **drops,
                **places,
            )
            d_weights = [d_prompt]
        dz = None
    else:
        dz, d_weights = _weights_bwd(
            kind, grad, out, layout, weights, z, arg, left, left_arg, T, drops, need_weights
        )
    if not need_hidden:
        return None, d_weights
    d_hidden = grad.new_empty((T, D))
    R = 1 if kind == "static" else z.shape[1]
    # Small blocks: mppg holds several [BLOCK_T, BLOCK_R] at once.
    block_t = 32 if kind in ("npg", "mppg") else 64
    config = _config("hidden_bwd", kind, grad.dtype, D)
    launch(
        hidden_bwd_kernel,
        (ceil_div(T, block_t), ceil_div(D, config.BLOCK_D)),
        grad_ptr=grad,
        d_x_ptr=d_hidden,
        w_down_ptr=None if kind == "static" else weights[0],
        b_down_ptr=None if kind == "static" else weights[1],
        dz_ptr=dz,
        z_ptr=z,
        arg_ptr=arg,
        left_ptr=left,
        left_arg_ptr=left_arg,
        order_ptr=layout.order,
        T=T,
        B=B,
        m=m,
        D=D,
        R=R,
        stride_gt=grad.stride(0),
        KIND=kind,
        LAST=layout.last,
        PRECISION=precision,
        STEPS=_steps(B),
        TILE=TILE,
        BLOCK_T=block_t,
        BLOCK_R=min(_block_r(R), 64),
        BLOCK_D=config.BLOCK_D,
        num_warps=config.num_warps,
        **places,
        **bins,
    )
    return d_hidden, d_weights


def _weights_bwd(kind, grad, out, layout, weights, z, arg, left, left_arg, T, drops, need_weights):
    """dz, and when asked the gradients of the four weights, fp32."""
    _, b_down, w_up, _ = weights
    B, m, D, R = layout.B, layout.m, grad.shape[1], z.shape[1]
    rows = z.shape[0]
    npg = kind == "npg"
    block_r = _block_r(R)
    r_blocks = ceil_div(R, block_r)
    block_p = next_power_of_2(min(rows, 64), 16)
    places = layout.arguments(*_PLACES)
    bins = layout.arguments(*_BINS)
    up = dict(
        grad_ptr=grad,
        z_ptr=z,
        left_ptr=left,
        b_down_ptr=b_down,
        rows=rows,
        m=m,
        D=D,
        R=R,
        stride_gt=grad.stride(0),
        KIND=kind,
        PRECISION=_precision(grad.dtype),
        TILE=TILE,
        BLOCK_P=block_p,
        BLOCK_R=block_r,
        **drops,
        **places,
        **bins,
    )
    J = min(m, max(1, 1024 // D)) if npg else 1
    splits = ceil_div(m, J) if npg else 1
    if npg:
        dz = z.new_empty((splits, B, R), dtype=torch.float32)
    else:
        dz = torch.empty_like(z)
    config = _config("up_bwd", kind, grad.dtype, D)
    launch(
        up_bwd_kernel,
        (ceil_div(rows, block_p), r_blocks, splits),
        dz_ptr=dz,
        w_up_ptr=w_up,
        J=J,
        BLOCK_D=config.BLOCK_D,
        num_warps=config.num_warps,
        **up,
    )
    if npg:
        dz = dz.sum(0)
    if not need_weights:
        return dz, []

    # Partial sums are written and read once more, so there are few of them.
    splits = m if npg else max(1, min(8, rows // 256))
    d_w_up = z.new_empty((splits, D, R), dtype=torch.float32)
    d_b_up = z.new_empty((splits, D), dtype=torch.float32)
    config = _config("up_bwd_weight", kind, grad.dtype, D)
    launch(
        up_bwd_weight_kernel,
        (ceil_div(D, config.BLOCK_D), r_blocks, splits),
        d_w_ptr=d_w_up,
        d_b_ptr=d_b_up,
        BLOCK_D=config.BLOCK_D,
        num_warps=config.num_warps,
        **(up | dict(BLOCK_P=min(block_p, 16))),
    )
    if npg:
        d_w_up, d_b_up = d_w_up.view(m * D, R), d_b_up.view(m * D)
        d_w_down = z.new_empty((R, D), dtype=torch.float32)
        d_b_down = z.new_empty((R,), dtype=torch.float32)
        block_d = _block_d(D, 64)
        launch(
            npg_down_bwd_kernel,
            (ceil_div(D, block_d), r_blocks),
            out_ptr=out,
            d_w_ptr=d_w_down,
            d_b_ptr=d_b_down,
            dz_ptr=dz,
            z_ptr=z,
            b_down_ptr=b_down,
            order_ptr=layout.order,
            B=B,
            m=m,
            D=D,
            R=R,
            LAST=layout.last,
            PRECISION=up["PRECISION"],
            BLOCK_B=16,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            **places,
            **bins,
        )
        return dz, [d_w_down, d_b_down, d_w_up, d_b_up]

    d_w_up, d_b_up = _total(d_w_up), _total(d_b_up)
    block_t = 32 if kind == "mppg" else 64
    splits = max(1, min(8, T // 512))
    config = _config("down_bwd", kind, grad.dtype, D)
    if kind == "mppg":
        block_r = min(block_r, 64)
        r_blocks = ceil_div(R, block_r)
    d_w_down = z.new_empty((splits, R, D), dtype=torch.float32)
    launch(
        down_bwd_kernel,
        (ceil_div(D, config.BLOCK_D), r_blocks, splits),
        out_ptr=out,
        d_w_ptr=d_w_down,
        dz_ptr=dz,
        z_ptr=z,
        arg_ptr=arg,
        left_ptr=left,
        left_arg_ptr=left_arg,
        order_ptr=layout.order,
        T=T,
        B=B,
        m=m,
        D=D,
        R=R,
        KIND=kind,
        PRECISION=up["PRECISION"],
        STEPS=_steps(B),
        TILE=TILE,
        BLOCK_T=block_t,
        BLOCK_P=_bins_of_tile(block_t, T, B, m),
        BLOCK_R=block_r,
        BLOCK_D=config.BLOCK_D,
        num_warps=config.num_warps,
        **places,
        **bins,
    )
    return dz, [_total(d_w_down), dz.sum(0, dtype=torch.float32), d_w_up, d_b_up]


def _total(partial: Tensor) -> Tensor:
    return partial[0] if partial.shape[0] == 1 else partial.sum(0)
