"""The gate: who may be timed. Every provider is compared with the eager function in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..case import Inputs, Operator
from ..shapes import Shape
from ..timing import map_inputs, outputs_of, prepare

# Absolute part of the allowed error, relative to the root mean square of the exact result: room
# where PyTorch's own error happens to be next to none.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# Of gradients that jump: where a maximum is nearly tied or a ReLU nearly at its corner, a rounding
# hands a whole row's gradient to another row or to none.
FLOOR_TIES = 2e-3
DRAWS = 5


def exact(inputs: Inputs) -> Inputs:
    """The same inputs in float64; codes of a quantised cache stay codes."""

    def change(value):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.double()
        return torch.float64 if isinstance(value, torch.dtype) else value

    return map_inputs(inputs, change)


def poison(like: list[Tensor], dtype: torch.dtype) -> None:
    """Leaves NaN of `dtype` in memory that the next allocations of these shapes are likely to get,
    so that what a kernel forgets to write shows.
    """
    junk = [torch.full_like(x, float("nan"), dtype=dtype) for x in like]
    del junk


def errors_of(got: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """Root mean square of the error over all outputs and of the worst row, each relative to the
    exact output's own; infinite for NaN and for a wrong shape.
    """
    total, worst = 0.0, 0.0
    if [g.shape for g in got] != [t.shape for t in truth]:
        return {"rms": float("inf"), "row": float("inf")}
    for g, t in zip(got, truth, strict=True):
        if t.numel() == 0:
            continue
        scale = t.square().mean().sqrt().clamp_min(1e-300)
        square = (g.double() - t).square()
        rows = square.flatten(0, -2) if square.dim() > 1 else square[:, None]
        # (max of a NaN is NaN)
        found = torch.stack([square.mean(), rows.mean(-1).max()]).sqrt() / scale
        rms, row = (float("inf") if x != x else x for x in found.tolist())
        total, worst = max(total, rms), max(worst, row)
    return {"rms": total, "row": worst}


def allowed(eager: dict[str, float], dtype: torch.dtype, ties: bool) -> dict[str, float]:
    """What a contestant's errors may be: twice those of same-dtype PyTorch, and a little.

    With `ties` nothing is said of single rows: the last bit decides which of them a gradient goes
    to.
    """
    floor = FLOOR_TIES if ties else FLOOR[dtype]
    limits = {name: 2 * value + floor for name, value in eager.items()}
    return limits | ({"row": float("inf")} if ties else {})


def passes(found: dict[str, float], limits: dict[str, float]) -> bool:
    return found["rms"] <= limits["rms"] and (
        found["row"] <= limits["row"] and found["rms"] != float("inf")
    )


def check(operator: Operator, functions: dict, shape: Shape, dtype: torch.dtype, device):
    """Compares every provider with the oracle.

    Where gradients jump, a provider may have bad luck with one draw of the inputs and PyTorch with
    another: the median over several draws is compared.

    Returns:
        The gradients that the outputs of the first draw got, errors by provider, and what goes into
        the row of each provider that failed.
    """
    seen, failures, first = {name: [] for name in functions}, {}, None
    for seed in range(DRAWS if operator.ties else 1):
        inputs = operator.inputs(shape, dtype, device, seed)
        gradients, truth = truth_of(operator, inputs, dtype, device)
        first = gradients if seed == 0 else first
        for name in [name for name in functions if name not in failures]:
            try:
                got = _checked_call(operator, functions[name], inputs, gradients, truth, dtype)
                seen[name].append(errors_of(got, truth))
                del got
            except Exception as error:  # a contestant that breaks must not end the run
                failures[name] = failure(error)
    errors = {name: _middle(found) for name, found in seen.items() if name not in failures}
    return first, errors, failures


def _middle(found: list[dict[str, float]]) -> dict[str, float]:
    """The median of each error; infinite if one is, for NaN is never bad luck."""
    values = {what: sorted(errors[what] for errors in found) for what in found[0]}
    return {
        what: ordered[-1] if math.isinf(ordered[-1]) else ordered[len(ordered) // 2]
        for what, ordered in values.items()
    }


def failure(error: Exception) -> dict:
    """What goes into the row of a provider that broke."""
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}


def why(row: dict) -> str:
    """Why a row is that of a wrong provider."""
    if row.get("allowed") is None:
        return "PyTorch itself failed, so nothing says what error is allowed"
    found = ", ".join(f"{name} {value:.2e}" for name, value in row["error"].items())
    limit = ", ".join(f"{name} {value:.2e}" for name, value in row["allowed"].items())
    return f"error ({found}) over what is allowed ({limit})"


def truth_of(operator: Operator, inputs: Inputs, dtype: torch.dtype, device):
    """Gradients that the outputs get (random, of a backward operator), and the exact results."""
    double, function = exact(inputs), operator.functions["eager"]
    gradients = None
    if operator.wrt:
        with torch.no_grad():
            outs = outputs_of(function(double))
        draw = torch.Generator(device).manual_seed(1)
        gradients = [
            torch.randn(out.shape, generator=draw, device=device, dtype=torch.float32).to(dtype)
            for out in outs
        ]
        del outs
    upcast = None if gradients is None else [g.double() for g in gradients]
    return gradients, prepare(operator, function, double, upcast)()


def _checked_call(operator, function, inputs, gradients, truth, dtype):
    call = prepare(operator, function, inputs, gradients)
    poison(truth, dtype)
    return call()
