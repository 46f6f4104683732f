"""Operations with frozen weights for the packed blocks: Triton kernels (lpt_kernels.frozen) where
they run, else PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..insertion.checks import choose_impl
from . import prepacked
from .attention import autocast_dtype, plainly, without_autocast


def fused(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the Triton kernels for frozen weights (lpt_kernels.frozen) take it."""
    return choose_impl("auto", x) == "triton" and all(
        t is None or t.dtype == x.dtype for t in others
    )


def add(fresh: Tensor, other: Tensor) -> Tensor:
    """Their sum; in the memory of `fresh`, which nobody else holds, where the dtype allows."""
    return fresh.add_(other) if fresh.dtype == other.dtype else fresh + other


def layer_norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """LayerNorm of x + residual; x is fresh where there is a residual."""
    if fused(x, residual):
        from lpt_kernels.frozen import layer_norm as kernel

        return kernel(x, norm.weight, norm.bias, residual=residual, eps=norm.eps)
    if residual is not None:
        x = add(x, residual)
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def activation(act: nn.Module, x: Tensor) -> Tensor:
    """A frozen layer's activation of rows [N, D]."""
    name = _ACTIVATIONS.get(type(act).__name__)
    if name is not None and fused(x):
        from lpt_kernels.frozen import activate

        return activate(x, activation=name)
    if name in _GELUS and x.device.type == "cpu":
        return _Gelu.apply(x, _GELUS[name])
    return act(x)


class _Gelu(torch.autograd.Function):
    """GELU whose gradient is written over that of its output, which nobody else reads: on a CPU a
    batch's fresh memory costs as much as the arithmetic.
    """

    @staticmethod
    def forward(ctx, x, approximate):
        ctx.approximate = approximate
        ctx.save_for_backward(x)
        # (The view keeps oneDNN out, which compiles a program for each new number of rows. Texts
        # differ in length, so nearly every batch has one.)
        return F.gelu(x.t(), approximate=approximate).t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        # (Of a product, as here; a user's own expanded gradient is not to be written to.)
        out = grad if grad.is_contiguous() else torch.empty_like(x)
        backward = torch.ops.aten.gelu_backward.grad_input
        return backward(grad, x, approximate=ctx.approximate, grad_input=out), None


def gated(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) up."""
    name = _ACTIVATIONS.get(type(act).__name__)
    if name is not None and fused(gate, up):
        from lpt_kernels.frozen import gated as kernel

        return kernel(gate, up, activation=name)
    return act(gate) * up


# Names of transformers' activation modules -> of the kernels.
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
    "SiLU": "silu",
}
# Those of the kernels that are GELUs -> PyTorch's name of the approximation.
_GELUS = {"gelu": "none", "gelu_tanh": "tanh"}


def linear(module: nn.Linear | Conv1D, x: Tensor) -> Tensor:
    """What a frozen linear layer, GPT-2's own among them, makes of rows [N, D]."""
    packed = prepacked.of(module, x)
    if packed is not None:
        return packed(x)
    if isinstance(module, Conv1D):
        return torch.addmm(module.bias, x, module.weight)
    return F.linear(x, module.weight, module.bias)


def linear_gradient(module: nn.Linear, grad: Tensor, other: Tensor | None = None) -> Tensor:
    """The gradient of its rows, [N, D]; added to `other`, whose memory it may take."""
    packed = prepacked.of(module, grad)
    if packed is not None:
        return packed.backward(grad.contiguous(), other)
    return torch.mm(grad, module.weight) if other is None else other.addmm_(grad, module.weight)


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """A frozen RMSNorm of rows [N, D]."""
    if fused(x):
        from lpt_kernels.frozen import rms_norm as kernel

        return kernel(x, norm.weight, eps=norm.variance_epsilon)
    return norm(x)


class _Branches(torch.autograd.Function):
    """x -> (x, x W_1^T + b_1, ...) with frozen weights. In backward each product adds itself to the
    gradient, where autograd would launch an addition for every use of x.
    """

    @staticmethod
    def forward(ctx, x, keep, linears):
        ctx.linears = linears
        ctx.save_for_backward(*(m.weight for m in linears))  # which says where one has changed
        ctx.set_materialize_grads(False)
        made = [linear(m, x) for m in linears]
        return (x.view_as(x), *made) if keep else tuple(made)

    @staticmethod
    @once_differentiable
    @plainly
    def backward(ctx, *grads):
        linears, _ = ctx.linears, ctx.saved_tensors
        d = None if len(grads) == len(linears) else grads[0]
        # (In the memory of what comes along the residual: it comes from the norm or the sum behind
        # it, whose other taker has read it before the gradients of the branches could be made.)
        for grad, m in zip(grads[-len(linears) :], linears, strict=True):
            if grad is not None:
                d = linear_gradient(m, grad, d)
        return d, None, None


def branches(x: Tensor, *linears: nn.Linear, keep: bool = False) -> tuple[Tensor, ...]:
    """What each of several frozen linear layers makes of x [n, D]; with `keep` x itself first, for
    its other use: all of them have one gradient.
    """
    plain = torch.is_grad_enabled() and x.requires_grad
    if (
        plain
        and autocast_dtype(x) in (None, x.dtype)
        and all(m.weight.dtype == x.dtype for m in linears)
    ):
        return _Branches.apply(x, keep, linears)
    made = tuple(linear(m, x) for m in linears)
    return (x, *made) if keep else made


# -- the first layer: only prompt rows have a gradient ---------------------------------------------


class FromPrompts(torch.autograd.Function):
    """x -> (x, *project(x)) where the text rows of x are constants.

    Forward runs all rows, or where those of the text are known already (`held`, [N, ...] each) the
    prompt rows alone. Backward takes the gradients at the prompt rows and leaves the others:
    nothing below reads them.

    Args:
        x: [N, D].
        project: (rows of x, their numbers or None for all) -> several tensors.
        project_backward: as of `Block`.
        plan: of the batch.
        held: what `project` gives, whose prompt rows are overwritten; or None.
        reads: whether `project_backward` looks at x.
    """

    @staticmethod
    def forward(ctx, x, project, project_backward, plan, held=None, reads=True):
        ctx.project_backward, ctx.plan = project_backward, plan
        ctx.autocast = autocast_dtype(x)
        rows = plan.prompt_rows
        # Not x itself: it may be a buffer that the next forward fills again.
        own = x.index_select(0, rows) if reads or held is not None else None
        ctx.save_for_backward(own if reads else None)
        if held is None:
            return x.view_as(x), *project(x, None)
        if len(rows):
            for whole, part in zip(held, project(own, rows), strict=True):
                whole.index_copy_(0, rows, part)
        return x.view_as(x), *held

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, *grads):
        rows = ctx.plan.prompt_rows
        grads = [g.index_select(0, rows) for g in grads]
        # (Backward runs outside of the autocast of the forward.)
        again = ctx.autocast is not None
        with torch.autocast(dx.device.type, ctx.autocast) if again else without_autocast(dx):
            d = ctx.project_backward(ctx.saved_tensors[0], rows, grads)
        d = add(dx.index_select(0, rows), d)
        return torch.zeros_like(dx).index_copy_(0, rows, d), *[None] * 5


def backward_of(project: Callable, x: Tensor, grads: list[Tensor]) -> Tensor:
    """Gradient of x [n, D] for a few rows, by running them again."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        outputs = project(x)
    return torch.autograd.grad(outputs, x, grads)[0]
