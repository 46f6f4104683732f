"""The operators that are timed: inputs, the plain PyTorch way, the kernels' way, and the bytes that
any way has to move.

`eager` is what a competent user of PyTorch would write (lpt_fast.insertion.reference,
torch.nn.functional); in float64 it is also the oracle that every provider is compared with.
`compile` is torch.compile of the same function. Both are given what the kernels are given: hidden
states in the run's dtype and generator weights as fp32 masters, which every provider casts itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..case import Inputs, Operator, normal
from . import attention_ops, frozen_ops, gather_ops, insert_ops


def _copy_inputs(shape, dtype, device, generator) -> Inputs:
    x = normal(generator, device, shape.rows, shape.D, dtype=dtype)
    return {"x": x, "out": torch.empty_like(x)}


def copy(x: Inputs) -> Tensor:
    return x["out"].copy_(x["x"])


def copy_bytes(shape, x, e):
    """Read once, written once."""
    return 2 * x["x"].numel() * e


def _operators():
    yield Operator("copy", _copy_inputs, {"eager": copy}, copy_bytes, mutates=("out",))
    yield from insert_ops.operators()
    yield from gather_ops.operators()
    yield from frozen_ops.operators()
    yield from attention_ops.operators()


OPERATORS: dict[str, Operator] = {operator.name: operator for operator in _operators()}
