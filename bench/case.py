"""What an operator to be timed consists of, and helpers to make inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import Shape

Inputs = dict[str, object]


@dataclass(frozen=True)
class Operator:
    """One thing to time.

    Attributes:
        name: `<operator>.<what>`.
        make: (shape, dtype, device, generator) -> inputs.
        functions: provider -> function of the inputs that gives a tensor or several; "compile" is
            made of "eager".
        nbytes: (shape, inputs, element size) -> compulsory bytes.
        wrt: inputs whose gradients are asked for: the backward pass is timed; none: the forward.
        mutates: inputs that a call overwrites.
        ties: gradients jump where a maximum is nearly tied or a ReLU nearly at its corner.
    """

    name: str
    make: Callable[[Shape, torch.dtype, torch.device, torch.Generator], Inputs]
    functions: dict[str, Callable[[Inputs], object]]
    nbytes: Callable[[Shape, Inputs, int], int]
    wrt: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    ties: bool = False

    def inputs(self, shape: Shape, dtype: torch.dtype, device, seed: int = 0) -> Inputs:
        """The same for the same seed."""
        return self.make(shape, dtype, device, torch.Generator(device).manual_seed(seed))


def normal(generator, device, *size, dtype=torch.float32, scale=1.0):
    values = torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
    return values.mul_(scale).to(dtype)


def offsets(lengths, device, dtype=torch.int32) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def nbytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
