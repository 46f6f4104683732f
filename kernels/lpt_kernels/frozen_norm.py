"""LayerNorm and RMSNorm with frozen weights: kernels and the plain functions that start them.

    s = x + bias + residual                      (bias and residual optional)
    y = normalise(s) * (weight + weight_offset) + norm_bias

What the backward pass keeps. dx = rstd (g - x_hat mean(g x_hat) - mean(g)) with g = dy weight
(RMSNorm: without the last term), so it needs x_hat and rstd, and nothing of x or residual:

- when nothing is added (s is x), x itself as it was given, and mean and rstd of each row: no
  tensor is written for the backward pass;
- when s is returned (pre-norm), s, which is written anyway, and mean and rstd;
- otherwise (post-norm, s has no other reader), x_hat in x's dtype, and rstd. Not s: x_hat is of
  the order of 1 whatever s is, so it neither overflows in fp16 nor loses digits when |mean| is
  large against the deviation; and not y, which is there for nothing: x_hat = (y - norm_bias) /
  weight fails where a weight is zero or small, and frozen weights are what they are.

That is one [T, D] in x's dtype and at most two fp32 a row, where PyTorch keeps the sum, mean and
rstd and computes gradients of weight and bias. Everything between loads and stores is fp32; s is
rounded once, not after each addition. Configurations depend on D alone, so that a row's result
does not depend on the batch it is in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import round_to
from .launch import ceil_div, launch, next_power_of_2

# A program holds whole rows in registers; longer rows would spill.
MAX_D = 16384


@triton.jit(do_not_specialize=["T"])
def norm_fwd_kernel(
    x_ptr,  # [T, D]
    bias_ptr,  # [D] or None
    residual_ptr,  # [T, D] or None
    weight_ptr,  # [D]
    norm_bias_ptr,  # [D] or None
    y_ptr,  # [T, D], contiguous as every output
    sum_ptr,  # [T, D] or None
    normed_ptr,  # [T, D] or None
    mean_ptr,  # fp32 [T] or None
    rstd_ptr,  # fp32 [T] or None
    T,
    D,
    stride_xt,
    stride_rt,
    eps,
    weight_offset,
    RMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norm of x + bias + residual, whole rows a program; keeps what the backward needs."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    row_mask = row < T
    column_mask = column < D
    mask = row_mask[:, None] & column_mask[None, :]

    # [BLOCK_T, BLOCK_D]
    s = tl.load(x_ptr + row[:, None] * stride_xt + column[None, :], mask=mask, other=0.0)
    s = s.to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
        s += bias[None, :]
    if residual_ptr is not None:
        r = tl.load(residual_ptr + row[:, None] * stride_rt + column[None, :], mask=mask, other=0.0)
        s += r.to(tl.float32)
    offset = row[:, None] * D + column[None, :]
    if sum_ptr is not None:
        tl.store(sum_ptr + offset, round_to(s, sum_ptr.dtype.element_ty), mask=mask)

    if not RMS:
        mean = tl.sum(s, axis=1) / D  # [BLOCK_T]
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean, mask=row_mask)
        # Columns past D would count in the variance.
        s = tl.where(column_mask[None, :], s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(s * s, axis=1) / D + eps)  # [BLOCK_T]
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=row_mask)
    normed = s * rstd[:, None]
    if normed_ptr is not None:
        tl.store(normed_ptr + offset, round_to(normed, normed_ptr.dtype.element_ty), mask=mask)

    weight = tl.load(weight_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    y = normed * (weight + weight_offset)[None, :]
    if norm_bias_ptr is not None:
        norm_bias = tl.load(norm_bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
        y += norm_bias[None, :]
    tl.store(y_ptr + offset, round_to(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def norm_bwd_kernel(
    dy_ptr,  # [T, D]
    dsum_ptr,  # [T, D] or None
    kept_ptr,  # [T, D]: x_hat if NORMED, else s
    mean_ptr,  # fp32 [T], None if RMS or NORMED
    rstd_ptr,  # fp32 [T]
    weight_ptr,  # [D]
    dx_ptr,  # [T, D], contiguous
    T,
    D,
    stride_dyt,
    stride_dst,
    stride_kt,
    weight_offset,
    RMS: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of the sum behind a norm with frozen weights, whole rows a program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    row_mask = row < T
    column_mask = column < D
    mask = row_mask[:, None] & column_mask[None, :]

    rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
    # [BLOCK_T, BLOCK_D]
    normed = tl.load(kept_ptr + row[:, None] * stride_kt + column[None, :], mask=mask, other=0.0)
    normed = normed.to(tl.float32)
    if not NORMED:
        if not RMS:
            mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
            # Columns past D hold 0 - mean, whose product with rstd could overflow.
            normed = tl.where(column_mask[None, :], normed - mean[:, None], 0.0)
        normed *= rstd[:, None]

    weight = tl.load(weight_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + row[:, None] * stride_dyt + column[None, :], mask=mask, other=0.0)
    g = g.to(tl.float32) * (weight + weight_offset)[None, :]
    along = tl.sum(g * normed, axis=1) / D  # [BLOCK_T]
    dx = g - normed * along[:, None]
    if not RMS:
        dx -= (tl.sum(g, axis=1) / D)[:, None]
    dx *= rstd[:, None]
    if dsum_ptr is not None:
        dsum = tl.load(dsum_ptr + row[:, None] * stride_dst + column[None, :], mask=mask, other=0.0)
        dx += dsum.to(tl.float32)
    offset = row[:, None] * D + column[None, :]
    tl.store(dx_ptr + offset, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] as [rows, D] with neighbouring columns; a copy only where no view does."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def norm_config(D: int) -> dict[str, int]:
    """Blocks and warps: whole rows, about 2,048 elements a program, 16 (at D > 8,192: 32) a thread.

    16 warps is the most that gfx942 allows (1,024 threads of 64 lanes).
    """
    BLOCK_D = next_power_of_2(D)
    BLOCK_T = max(1, min(64, 2048 // BLOCK_D))
    num_warps = max(1, min(16, BLOCK_T * BLOCK_D // 512))
    return {"BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D, "num_warps": num_warps}


def norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_bias: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    rms: bool = False,
    return_sum: bool = False,
    save: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """(y, s, normed, mean, rstd); each but y is None where the flags do not need it.

    Args:
        x, residual: [..., D], fp32, fp16 or bf16.
        weight, norm_bias, bias: [D], any of these dtypes.
        rms: RMSNorm, else LayerNorm.
        return_sum: s is wanted.
        save: what `norm_bwd` takes is wanted: mean, rstd, and normed where s is neither x nor
            returned.

    Returns:
        y, s, normed in x's shape and dtype, mean and rstd fp32 [rows].
    """
    rows = as_rows(x)
    T, D = rows.shape
    residual = None if residual is None else as_rows(residual)
    added = bias is not None or residual is not None
    keep_normed = save and added and not return_sum
    keep_mean = save and not rms and not keep_normed

    def like_x():
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def of_rows():
        return torch.empty(T, dtype=torch.float32, device=x.device)

    y = like_x()
    s = like_x() if return_sum else None
    normed = like_x() if keep_normed else None
    mean = of_rows() if keep_mean else None
    rstd = of_rows() if save else None
    config = norm_config(D)
    launch(
        norm_fwd_kernel,
        (ceil_div(T, config["BLOCK_T"]),),
        x_ptr=rows,
        bias_ptr=None if bias is None else bias.contiguous(),
        residual_ptr=residual,
        weight_ptr=weight.contiguous(),
        norm_bias_ptr=None if norm_bias is None else norm_bias.contiguous(),
        y_ptr=y,
        sum_ptr=s,
        normed_ptr=normed,
        mean_ptr=mean,
        rstd_ptr=rstd,
        T=T,
        D=D,
        stride_xt=rows.stride(0),
        stride_rt=0 if residual is None else residual.stride(0),
        eps=eps,
        weight_offset=weight_offset,
        RMS=rms,
        **config,
    )
    return y, s, normed, mean, rstd


def norm_bwd(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    kept: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    *,
    weight_offset: float = 0.0,
    rms: bool = False,
    normed: bool = False,
) -> torch.Tensor:
    """dx, which is the gradient of residual too: [..., D] in the dtype of `kept`.

    Args:
        dy: gradient of y, [..., D].
        dsum: gradient of s if it was returned and used, [..., D].
        kept: x_hat (`normed`) or s, [..., D].
        mean: of each row, fp32 [rows]; None for RMSNorm or with x_hat.
        rstd: fp32 [rows].
        weight: [D].
    """
    shape = kept.shape
    dy, kept = as_rows(dy), as_rows(kept)
    dsum = None if dsum is None else as_rows(dsum)
    T, D = kept.shape
    dx = torch.empty(shape, dtype=kept.dtype, device=kept.device)
    config = norm_config(D)
    launch(
        norm_bwd_kernel,
        (ceil_div(T, config["BLOCK_T"]),),
        dy_ptr=dy,
        dsum_ptr=dsum,
        kept_ptr=kept,
        mean_ptr=mean,
        rstd_ptr=rstd,
        weight_ptr=weight.contiguous(),
        dx_ptr=dx,
        T=T,
        D=D,
        stride_dyt=dy.stride(0),
        stride_dst=0 if dsum is None else dsum.stride(0),
        stride_kt=kept.stride(0),
        weight_offset=weight_offset,
        RMS=rms,
        NORMED=normed,
        **config,
    )
    return dx
