"""Prompt insertion: packed, backward, in place, padded."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lpt_fast import insertion
from lpt_fast.insertion import reference

from ..case import Inputs, Operator, nbytes_of, normal, offsets


def weights_of(kind, shape, dtype, device, generator) -> dict[str, Tensor]:
    """fp32 masters of a generator, with values that the run's dtype holds exactly, so that the
    oracle and every provider mean the same numbers.
    """
    D, r, m = shape.D, shape.r, shape.m
    rows = m * D if kind == "npg" else D
    sizes = {
        "prompt_embedding.weight": ((m, D), 1.0),
        "proj_down.weight": ((r, D), D**-0.5),
        "proj_down.bias": ((r,), D**-0.5),
        "proj_up.weight": ((rows, r), r**-0.5),
        "proj_up.bias": ((rows,), r**-0.5),
    }
    return {
        name: normal(generator, device, *sizes[name][0], scale=sizes[name][1]).to(dtype).float()
        for name in reference.WEIGHTS[kind]
    }


def _packed(kind, shape, dtype, device, generator) -> Inputs:
    return {
        "hidden": normal(generator, device, shape.T, shape.D, dtype=dtype),
        "cu_seqlens": offsets(shape.lengths, device),
        "weights": weights_of(kind, shape, dtype, device, generator),
        "kind": kind,
        "m": shape.m,
    }


def _cast(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: w.to(dtype) for name, w in weights.items()}


def insert_eager(x: Inputs) -> Tensor:
    weights = _cast(x["weights"], x["hidden"].dtype)
    return reference.insert_prompt(x["hidden"], x["cu_seqlens"], x["kind"], weights, x["m"])


def _insert_triton(x: Inputs) -> Tensor:
    return insertion.insert_prompt(
        x["hidden"],
        x["cu_seqlens"],
        x["kind"],
        x["weights"],
        x["m"],
        impl="triton",
        validate=False,
    )


def _insert_fwd_bytes(shape, x, e):
    """Text rows read and written, prompt rows written, weights read as they are kept (fp32)."""
    return (shape.T + shape.rows) * shape.D * e + nbytes_of(*x["weights"].values())


def _insert_bwd_bytes(shape, x, e, hidden):
    """Gradients of the prompt rows read; text rows that the gradient of W_down needs read (npg: one
    an example; appg, mppg: all, for with r channels nearly every row is some channel's maximum);
    W_up read; gradients of the weights written in fp32. With the gradient of `hidden`: also the
    gradients of the text rows read and theirs written, and W_down read.
    """
    weights, T, D = x["weights"], shape.T, shape.D
    needed = {"static": 0, "npg": shape.B, "appg": T, "mppg": T}[x["kind"]]
    total = (shape.B * shape.m + needed) * D * e + nbytes_of(*weights.values())
    read = ("proj_up.weight", "proj_down.weight") if hidden else ("proj_up.weight",)
    total += sum(nbytes_of(weights[name]) for name in read if name in weights)
    return total + (2 * T * D * e if hidden else 0)


def _buffer(kind, shape, dtype, device, generator) -> Inputs:
    """As the cache reader leaves it: the text in place; NaN where prompts belong, so that a row
    that nobody writes shows.
    """
    x = _packed(kind, shape, dtype, device, generator)
    hidden = x.pop("hidden")
    row = torch.arange(shape.T, device=device)
    row = row + shape.m * torch.searchsorted(x["cu_seqlens"][:-1].long(), row, right=True)
    x["buffer"] = hidden.new_full((shape.rows, shape.D), float("nan")).index_copy_(0, row, hidden)
    return x


def _fill_eager(x: Inputs) -> Tensor:
    buffer, cu, m = x["buffer"], x["cu_seqlens"].long(), x["m"]
    start = cu[:-1] + m * torch.arange(1, len(cu), device=cu.device)
    weights = _cast(x["weights"], buffer.dtype)
    prompt = reference.make_prompts(buffer, start, cu.diff(), x["kind"], weights, m)
    rows = (start - m)[:, None] + torch.arange(m, device=cu.device)
    return buffer.index_copy_(0, rows.flatten(), prompt.flatten(0, 1))


def _fill_triton(x: Inputs) -> Tensor:
    return insertion.insert_prompt_(
        x["buffer"],
        x["cu_seqlens"],
        x["kind"],
        x["weights"],
        x["m"],
        impl="triton",
        validate=False,
    )


def _fill_bytes(shape, x, e):
    """Text rows that prompts are made of read (npg: one an example), prompt rows written, weights
    read.
    """
    needed = {"static": 0, "npg": shape.B}.get(x["kind"], shape.T)
    return (needed + shape.B * shape.m) * shape.D * e + nbytes_of(*x["weights"].values())


def _padded(kind, shape, dtype, device, generator) -> Inputs:
    S = max(shape.lengths)
    lengths = torch.tensor(shape.lengths, device=device)
    return {
        "hidden": normal(generator, device, shape.B, S, shape.D, dtype=dtype),
        "mask": (torch.arange(S, device=device) < lengths[:, None]).long(),
        "weights": weights_of(kind, shape, dtype, device, generator),
        "kind": kind,
        "m": shape.m,
    }


def _pad_insert(x: Inputs, impl: str) -> Tensor:
    weights = x["weights"] if impl == "triton" else _cast(x["weights"], x["hidden"].dtype)
    return insertion.insert_prompt_padded(
        x["hidden"], x["mask"], x["kind"], weights, x["m"], impl=impl
    )[0]


def _padded_bytes(shape, x, e):
    """All rows of [B, S, D] read and of [B, m + S, D] written, weights read."""
    rows = 2 * shape.B * max(shape.lengths) + shape.B * shape.m
    return rows * shape.D * e + nbytes_of(*x["weights"].values())


def operators():
    insert = {"eager": insert_eager, "triton": _insert_triton}
    for kind in ("npg", "appg", "mppg", "static"):
        name, make = f"insert_{kind}", partial(_packed, kind)
        yield Operator(f"{name}.fwd", make, insert, _insert_fwd_bytes)
        for what, wrt in (("weights", ("weights",)), ("hidden", ("hidden", "weights"))):
            nbytes = partial(_insert_bwd_bytes, hidden=what == "hidden")
            ties = kind != "static"
            yield Operator(f"{name}.bwd_{what}", make, insert, nbytes, wrt, ties=ties)
    for kind in ("npg", "appg", "mppg"):
        functions = {"eager": _fill_eager, "triton": _fill_triton}
        make = partial(_buffer, kind)
        yield Operator(f"insert_into_{kind}.fwd", make, functions, _fill_bytes, (), ("buffer",))
    for kind in ("npg", "appg", "mppg"):
        functions = {
            "eager": partial(_pad_insert, impl="reference"),
            "triton": partial(_pad_insert, impl="triton"),
        }
        make = partial(_padded, kind)
        yield Operator(f"insert_padded_{kind}.fwd", make, functions, _padded_bytes)
