"""Blocks with frozen weights: norm(+ bias + residual) and activation(+ bias), differentiable.

For a transformer stack whose weights do not train: a linear layer leaves its bias to the operation
behind it, the backward pass computes input gradients only, and what it keeps is the least (said in
frozen_norm.py and frozen_act.py, where the kernels are). Without a gradient to come (grad mode off
or no input that requires one) nothing is kept.

    layer_norm, rms_norm        y = norm(x + bias + residual) weight [+ norm_bias], if asked the sum
    gelu, silu, activate        y = act(x + bias)
    gated                       y = act(gate + bias) (up + bias_up)

Common to all: inputs are [..., D] in fp32, fp16 or bf16 with any strides, zero rows included;
outputs and gradients have their dtype and are contiguous; arithmetic is fp32 and each output is
rounded once. Weights and biases are [D] of any of these dtypes and must not require a gradient. A
ValueError names the argument that does not fit. Derivatives of derivatives are not there.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .common import INTERPRETED
from .frozen_act import ACTIVATIONS, act_bwd, act_fwd, gated_bwd, gated_fwd
from .frozen_norm import MAX_D, norm_bwd, norm_fwd

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check_input(name: str, x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{name}: got {x.dtype}, expected float32, float16 or bfloat16: convert it first."
        )
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, expected [..., D] with D >= 1: the last axis is "
            "the one of features."
        )
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            f"{name}: got a tensor on the CPU, expected one on a GPU: move it there, use "
            "torch.nn.functional, or start Python with TRITON_INTERPRET=1."
        )


def _check_like(name: str, other: torch.Tensor | None, of: str, x: torch.Tensor) -> None:
    if other is None:
        return
    got = (tuple(other.shape), other.dtype, other.device)
    expected = (tuple(x.shape), x.dtype, x.device)
    if got != expected:
        raise ValueError(
            f"{name}: got shape {got[0]}, {got[1]} on {got[2]}, expected {expected[0]}, "
            f"{expected[1]} on {expected[2]} as {of} has: expand or convert it first."
        )


def _check_frozen(name: str, weight: torch.Tensor | None, D: int, x: torch.Tensor) -> None:
    if weight is None:
        return
    if weight.requires_grad:
        raise ValueError(
            f"{name}: got a tensor that requires a gradient, expected a frozen one: call "
            "requires_grad_(False) on it, or use torch.nn.functional to train it."
        )
    if weight.shape != (D,):
        raise ValueError(
            f"{name}: got shape {tuple(weight.shape)}, expected ({D},) for an input of shape "
            f"{tuple(x.shape)}: pass the parameter of the layer that this input belongs to."
        )
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: got {weight.dtype}, expected float32, float16 or bfloat16: convert it first."
        )
    if weight.device != x.device:
        raise ValueError(
            f"{name}: got a tensor on {weight.device}, expected {x.device} as the input: move it."
        )


def _wants_gradient(*inputs: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, norm_bias, bias, eps, weight_offset, rms, return_sum):
        y, s, normed, mean, rstd = norm_fwd(
            x,
            weight,
            norm_bias,
            bias,
            residual,
            eps=eps,
            weight_offset=weight_offset,
            rms=rms,
            return_sum=return_sum,
            save=True,
        )
        kept = next(t for t in (normed, s, x) if t is not None)
        ctx.save_for_backward(kept, mean, rstd, weight)
        ctx.weight_offset, ctx.rms, ctx.normed = weight_offset, rms, normed is not None
        # A zero tensor for an output that was not used would cost a read of it.
        ctx.set_materialize_grads(False)
        return (y, s) if return_sum else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsum=None):
        kept, mean, rstd, weight = ctx.saved_tensors
        dx = dsum
        if dy is not None:
            dx = norm_bwd(
                dy,
                dsum,
                kept,
                mean,
                rstd,
                weight,
                weight_offset=ctx.weight_offset,
                rms=ctx.rms,
                normed=ctx.normed,
            )
        x_wants, residual_wants = ctx.needs_input_grad[:2]
        return (dx if x_wants else None, dx if residual_wants else None, *[None] * 7)


def _norm(x, weight, norm_bias, bias, residual, eps, weight_offset, rms, return_sum):
    _check_input("x", x)
    D = x.shape[-1]
    if D > MAX_D:
        raise ValueError(
            f"x: got {D} features, expected at most {MAX_D}, for a row is held in registers: use "
            "torch.nn.functional."
        )
    _check_like("residual", residual, "x", x)
    for name, tensor in (("weight", weight), ("norm_bias", norm_bias), ("bias", bias)):
        _check_frozen(name, tensor, D, x)
    if _wants_gradient(x, residual):
        return _Norm.apply(
            x, residual, weight, norm_bias, bias, eps, weight_offset, rms, return_sum
        )
    y, s, *_ = norm_fwd(
        x,
        weight,
        norm_bias,
        bias,
        residual,
        eps=eps,
        weight_offset=weight_offset,
        rms=rms,
        return_sum=return_sum,
    )
    return (y, s) if return_sum else y


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_bias: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    return_sum: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm of s = x + bias + residual, over the last axis.

    Args:
        x: [..., D], D <= 16,384: output of a linear layer, as a rule without its bias.
        weight, norm_bias: [D], the norm's own, frozen; norm_bias may be None.
        bias: [D], the linear layer's, frozen, or None.
        residual: as x in shape, dtype and device, or None.
        eps: added to the variance.
        return_sum: give s too (rounded to x's dtype), for pre-norm blocks.

    Returns:
        y, or (y, s), as x. x and residual get the same gradient, that of s included.

    Raises:
        ValueError: an argument has another shape, dtype or device, or a weight requires a gradient.
    """
    return _norm(x, weight, norm_bias, bias, residual, eps, 0.0, False, return_sum)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    return_sum: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of s = x + bias + residual, over the last axis: s / sqrt(mean(s^2) + eps) * weight.

    Llama rounds to the input's dtype before it multiplies by the weight; here only y is rounded.

    Args:
        x, bias, residual, eps, return_sum: as for `layer_norm`.
        weight: [D], frozen.
        weight_offset: added to the weight in fp32: 1.0 for Gemma.

    Returns:
        y, or (y, s), as x. x and residual get the same gradient, that of s included.

    Raises:
        ValueError: an argument has another shape, dtype or device, or a weight requires a gradient.
    """
    return _norm(x, weight, None, bias, residual, eps, weight_offset, True, return_sum)


class _Act(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, activation):
        ctx.save_for_backward(x, bias)
        ctx.activation = activation
        return act_fwd(x, bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        return act_bwd(dy, x, bias, ctx.activation), None, None


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}: use "
            "torch.nn.functional for others."
        )


def activate(x: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str) -> torch.Tensor:
    """act(x + bias), in x's shape and dtype.

    Args:
        x: [..., D], output of a linear layer, as a rule without its bias.
        bias: [D], that layer's, frozen, or None.
        activation: "gelu" (erf), "gelu_tanh", "silu", or a name that model configurations use for
            one of them ("gelu_new", "gelu_pytorch_tanh", "swish").

    Raises:
        ValueError: an unknown activation, or a bias that does not fit or requires a gradient.
    """
    _check_activation(activation)
    _check_input("x", x)
    _check_frozen("bias", bias, x.shape[-1], x)
    if _wants_gradient(x):
        return _Act.apply(x, bias, activation)
    return act_fwd(x, bias, activation)


def gelu(
    x: torch.Tensor, bias: torch.Tensor | None = None, *, approximate: str = "none"
) -> torch.Tensor:
    """GELU of x + bias; approximate: "none" (erf) or "tanh", as in torch. See `activate`."""
    if approximate not in ("none", "tanh"):
        raise ValueError(
            f"approximate: got {approximate!r}, expected 'none' or 'tanh': give the names of "
            "model configurations to `activate`."
        )
    return activate(x, bias, activation="gelu" if approximate == "none" else "gelu_tanh")


def silu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """SiLU of x + bias. See `activate`."""
    return activate(x, bias, activation="silu")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, bias, bias_up, activation):
        ctx.save_for_backward(gate, up, bias, bias_up)
        ctx.activation = activation
        return gated_fwd(gate, up, bias, bias_up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dgate, dup = gated_bwd(dy, *ctx.saved_tensors, ctx.activation)
        return (
            dgate if ctx.needs_input_grad[0] else None,
            dup if ctx.needs_input_grad[1] else None,
            *[None] * 3,
        )


def gated(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    bias_up: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """act(gate + bias) * (up + bias_up), [..., D] in gate's dtype: SwiGLU and its relatives.

    Args:
        gate: [..., D]; or, with up None, [..., 2 D] with gate and up side by side.
        up: as gate in shape, dtype and device, or None.
        bias: frozen bias of gate, [D]; with up None that of both, [2 D]; or None.
        bias_up: frozen bias of up, [D], or None.
        activation: as for `activate`.

    Raises:
        ValueError: an unknown activation, an odd last axis with up None, or an argument that does
            not fit or requires a gradient.
    """
    _check_activation(activation)
    _check_input("gate", gate)
    _check_like("up", up, "gate", gate)
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"gate: got shape {tuple(gate.shape)}, expected an even last axis that holds gate "
                "and up side by side: pass up if they are two tensors."
            )
        if bias_up is not None:
            raise ValueError(
                "bias_up: got a tensor, expected None without up: concatenate it to bias."
            )
    for name, tensor in (("bias", bias), ("bias_up", bias_up)):
        _check_frozen(name, tensor, gate.shape[-1], gate)
    if _wants_gradient(gate, up):
        return _Gated.apply(gate, up, bias, bias_up, activation)
    return gated_fwd(gate, up, bias, bias_up, activation)
