"""Activations behind a frozen linear layer: kernels and the plain functions that start them.

    y = act(x + bias)                                   (bias optional)
    y = act(gate + bias_gate) * (up + bias_up)

The backward pass computes the inputs' gradients from the inputs as they were given, so that
nothing else is kept: not the sum with the bias, and neither factor of the product. fp32 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import round_to
from .frozen_norm import as_rows
from .launch import ceil_div, launch, next_power_of_2

# What model configurations call them -> ACT of the kernels.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


@triton.jit
def _sigmoid_and_slope(z):
    """Sigmoid and its derivative from exp(-|z|), which cannot overflow; no digits cancel."""
    e = tl.exp(-tl.abs(z))
    half = 1.0 / (1.0 + e)
    return tl.where(z < 0, e * half, half), e * half * half


@triton.jit
def _activate(x, ACT: tl.constexpr):
    """act(x) and act'(x), fp32; what a caller leaves unused is not computed."""
    if ACT == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * below
        slope = below + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2 u). Past 20 it is 0 or 1 in fp32, while x^3 could overflow;
        # comparisons keep NaN.
        c = tl.where(x > 20.0, 20.0, tl.where(x < -20.0, -20.0, x))
        below, rise = _sigmoid_and_slope(1.5957691216057308 * (c + 0.044715 * c * c * c))
        value = x * below
        slope = below + c * rise * (1.5957691216057308 * (1.0 + 0.134145 * c * c))
    else:
        tl.static_assert(ACT == "silu")
        below, rise = _sigmoid_and_slope(x)
        value = x * below
        slope = below + x * rise
    return value, slope


@triton.jit
def _load_biased(x_ptr, bias_ptr, row, column, row_mask, column_mask, stride_row):
    """Rows of x plus bias (None: 0), fp32 [BLOCK_T, BLOCK_D]."""
    mask = row_mask[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + row[:, None] * stride_row + column[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
        x += bias[None, :]
    return x


@triton.jit(do_not_specialize=["T"])
def act_fwd_kernel(
    x_ptr,  # [T, D]
    bias_ptr,  # [D] or None
    y_ptr,  # [T, D], contiguous
    T,
    D,
    stride_xt,
    ACT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = act(x + bias), a tile of rows and columns a program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask = row < T
    column_mask = column < D
    x = _load_biased(x_ptr, bias_ptr, row, column, row_mask, column_mask, stride_xt)
    value, _ = _activate(x, ACT)
    offset = row[:, None] * D + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(y_ptr + offset, round_to(value, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def act_bwd_kernel(
    dy_ptr,  # [T, D]
    x_ptr,  # [T, D]
    bias_ptr,  # [D] or None
    dx_ptr,  # [T, D], contiguous
    T,
    D,
    stride_dyt,
    stride_xt,
    ACT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx = dy act'(x + bias); the activation is computed again."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask = row < T
    column_mask = column < D
    dy = _load_biased(dy_ptr, None, row, column, row_mask, column_mask, stride_dyt)
    x = _load_biased(x_ptr, bias_ptr, row, column, row_mask, column_mask, stride_xt)
    _, slope = _activate(x, ACT)
    offset = row[:, None] * D + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(dx_ptr + offset, round_to(dy * slope, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def gated_fwd_kernel(
    gate_ptr,  # [T, D]
    up_ptr,  # [T, D]
    bias_gate_ptr,  # [D] or None
    bias_up_ptr,  # [D] or None
    y_ptr,  # [T, D], contiguous
    T,
    D,
    stride_gt,
    stride_ut,
    ACT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = act(gate + bias) (up + bias_up), a tile a program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask = row < T
    column_mask = column < D
    gate = _load_biased(gate_ptr, bias_gate_ptr, row, column, row_mask, column_mask, stride_gt)
    up = _load_biased(up_ptr, bias_up_ptr, row, column, row_mask, column_mask, stride_ut)
    value, _ = _activate(gate, ACT)
    offset = row[:, None] * D + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(y_ptr + offset, round_to(value * up, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def gated_bwd_kernel(
    dy_ptr,  # [T, D]
    gate_ptr,  # [T, D]
    up_ptr,  # [T, D]
    bias_gate_ptr,  # [D] or None
    bias_up_ptr,  # [D] or None
    dgate_ptr,  # [T, D]
    dup_ptr,  # [T, D]
    T,
    D,
    stride_dyt,
    stride_gt,
    stride_ut,
    stride_dgt,
    stride_dut,
    ACT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of gate and up; both factors are computed again."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask = row < T
    column_mask = column < D
    dy = _load_biased(dy_ptr, None, row, column, row_mask, column_mask, stride_dyt)
    gate = _load_biased(gate_ptr, bias_gate_ptr, row, column, row_mask, column_mask, stride_gt)
    up = _load_biased(up_ptr, bias_up_ptr, row, column, row_mask, column_mask, stride_ut)
    value, slope = _activate(gate, ACT)
    mask = row_mask[:, None] & column_mask[None, :]
    dgate = round_to(dy * up * slope, dgate_ptr.dtype.element_ty)
    tl.store(dgate_ptr + row[:, None] * stride_dgt + column[None, :], dgate, mask=mask)
    dup = round_to(dy * value, dup_ptr.dtype.element_ty)
    tl.store(dup_ptr + row[:, None] * stride_dut + column[None, :], dup, mask=mask)


def act_config(D: int) -> dict[str, int]:
    """Blocks and warps: about 2,048 elements a program, several rows so that a bias serves them."""
    BLOCK_D = min(512, next_power_of_2(D))
    BLOCK_T = min(64, 2048 // BLOCK_D)
    return {
        "BLOCK_T": BLOCK_T,
        "BLOCK_D": BLOCK_D,
        "num_warps": max(1, BLOCK_T * BLOCK_D // 512),
    }


def _grid(T: int, D: int, config: dict[str, int]) -> tuple[int, int]:
    return ceil_div(T, config["BLOCK_T"]), ceil_div(D, config["BLOCK_D"])


def act_fwd(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """act(x + bias) in x's shape and dtype. x: [..., D], bias: [D], activation: see ACTIVATIONS."""
    rows = as_rows(x)
    T, D = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = act_config(D)
    launch(
        act_fwd_kernel,
        _grid(T, D, config),
        x_ptr=rows,
        bias_ptr=None if bias is None else bias.contiguous(),
        y_ptr=y,
        T=T,
        D=D,
        stride_xt=rows.stride(0),
        ACT=ACTIVATIONS[activation],
        **config,
    )
    return y


def act_bwd(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """dx in x's shape and dtype. dy, x: [..., D], bias: [D]."""
    dy, rows = as_rows(dy), as_rows(x)
    T, D = rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = act_config(D)
    launch(
        act_bwd_kernel,
        _grid(T, D, config),
        dy_ptr=dy,
        x_ptr=rows,
        bias_ptr=None if bias is None else bias.contiguous(),
        dx_ptr=dx,
        T=T,
        D=D,
        stride_dyt=dy.stride(0),
        stride_xt=rows.stride(0),
        ACT=ACTIVATIONS[activation],
        **config,
    )
    return dx


def _halves(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    bias_up: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """gate, up as rows [T, D] and their biases [D], from two tensors or from halves of one."""
    bias = None if bias is None else bias.contiguous()
    bias_up = None if bias_up is None else bias_up.contiguous()
    gate = as_rows(gate)
    if up is not None:
        return gate, as_rows(up), bias, bias_up
    D = gate.shape[1] // 2
    if bias is not None:
        bias, bias_up = bias[:D], bias[D:]
    return gate[:, :D], gate[:, D:], bias, bias_up


def gated_fwd(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """act(gate + bias) * (up + bias_up), [..., D] in gate's dtype.

    Args:
        gate, up: [..., D] each; or up None and gate [..., 2 D], the halves side by side.
        bias, bias_up: [D] each; or bias_up None and bias [2 D] where up is None.
        activation: a key of ACTIVATIONS.
    """
    shape, dtype = gate.shape, gate.dtype
    packed = up is None
    gate, up, bias, bias_up = _halves(gate, up, bias, bias_up)
    T, D = gate.shape
    y = torch.empty((*shape[:-1], D) if packed else shape, dtype=dtype, device=gate.device)
    config = act_config(D)
    launch(
        gated_fwd_kernel,
        _grid(T, D, config),
        gate_ptr=gate,
        up_ptr=up,
        bias_gate_ptr=bias,
        bias_up_ptr=bias_up,
        y_ptr=y,
        T=T,
        D=D,
        stride_gt=gate.stride(0),
        stride_ut=up.stride(0),
        ACT=ACTIVATIONS[activation],
        **config,
    )
    return y


def gated_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dgate, dup) in the shapes of gate and up; dup is None where up is. dy: [..., D]."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = None if up is None else torch.empty(up.shape, dtype=up.dtype, device=up.device)
    dgate_rows, dup_rows, _, _ = _halves(dgate, dup, None, None)
    gate, up, bias, bias_up = _halves(gate, up, bias, bias_up)
    dy = as_rows(dy)
    T, D = gate.shape
    config = act_config(D)
    launch(
        gated_bwd_kernel,
        _grid(T, D, config),
        dy_ptr=dy,
        gate_ptr=gate,
        up_ptr=up,
        bias_gate_ptr=bias,
        bias_up_ptr=bias_up,
        dgate_ptr=dgate_rows,
        dup_ptr=dup_rows,
        T=T,
        D=D,
        stride_dyt=dy.stride(0),
        stride_gt=gate.stride(0),
        stride_ut=up.stride(0),
        stride_dgt=dgate_rows.stride(0),
        stride_dut=dup_rows.stride(0),
        ACT=ACTIVATIONS[activation],
        **config,
    )
    return dgate, dup
