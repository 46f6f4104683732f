"""Frozen weights in bf16 on a CPU as oneDNN wants them, arranged once.

A linear layer's weights lie row by row; oneDNN arranges them for its products anew in each call,
which takes up to a third of it. What never changes can stay arranged, as PyTorch's compiler has it
for inference; its operators are used here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..backbone.watch import Remembered, descendants

ROWS = 1024  # of a product that the arrangement is chosen for; others run on it too


class Prepacked(Remembered):
    """Both products of a frozen weight matrix, x W^T + b and g W.

    Args:
        weight: bf16 [D', D].
        bias: bf16 [D'], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self._weight, self._bias = weight, bias

    @cached_property
    def _ahead(self) -> Tensor:
        return _arranged(self._weight)

    @cached_property
    def _back(self) -> Tensor:
        return _arranged(self._weight.t())

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b of rows x [n, D]: [n, D']."""
        return torch.ops.mkldnn._linear_pointwise(x, self._ahead, self._bias, "none", [], "")

    def backward(self, grad: Tensor, other: Tensor | None = None) -> Tensor:
        """g W of rows [n, D']: [n, D]; added to `other` where that is given, rounded once."""
        run = torch.ops.mkldnn._linear_pointwise
        if other is None:
            return run(grad, self._back, None, "none", [], "")
        return run.binary(grad, other, self._back, None, "add")

    def __call__(self, x: Tensor) -> Tensor:
        """`forward`, with a gradient."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)
        return self.forward(x)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed):
        ctx.packed = packed
        return packed.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.packed.backward(grad.contiguous()), None


def _arranged(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


def prepack(parts: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Gives linear layers in some parts of a model, whose weights are frozen and in `dtype`, their
    `prepacked`.
    """
    if dtype != torch.bfloat16 or not known():
        return
    for module in descendants(parts):
        if type(module) in (nn.Linear, Conv1D):
            weight = module.weight if type(module) is nn.Linear else module.weight.t()
            module.__dict__["prepacked"] = Prepacked(weight, module.bias), _state(module)


def of(module: nn.Module, x: Tensor) -> Prepacked | None:
    """What `prepack` gave a module, for rows in its dtype; None, too, where its weight has changed
    since. (Not seen: writing through `.data`, which hides from PyTorch's version counters.)
    """
    packed, state = module.__dict__.get("prepacked", (None, None))
    fits = packed is not None and x.dtype == torch.bfloat16 and state == _state(module)
    return packed if fits else None


def _state(module: nn.Module) -> tuple:
    weight = module.weight
    # (Tensors of inference mode have no version. A bias is read where it is.)
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, id(module.bias)


@lru_cache
@torch.no_grad()
def known() -> bool:
    """Whether this PyTorch has these operators and they multiply."""
    draw = torch.Generator().manual_seed(0)
    sizes = ((64, 48), (80, 48), (80,), (64, 48))
    x, w, b, y = (torch.randn(s, generator=draw, device="cpu").bfloat16() for s in sizes)
    try:
        made = Prepacked(w, b)
        got = made.forward(x), made.backward(made.forward(x)), made.backward(made.forward(x), y)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    plain = x.float() @ w.float().t() + b.float()
    back = plain @ w.float()
    expected = plain, back, back + y.float()
    return all(
        bool(((a.float() - e).abs() <= 2**-6 * e.abs().max()).all())
        for a, e in zip(got, expected, strict=True)
    )
