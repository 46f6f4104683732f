"""Rows of a cache that lies on the device: gathered, and gathered with prompts."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lpt_fast import insertion

from ..case import Inputs, Operator, nbytes_of, normal, offsets
from .insert_ops import insert_eager, weights_of


def _store(store, kind, shape, dtype, device, generator) -> Inputs:
    """A cache of each length twice and a batch of half its examples in random order."""
    lengths = shape.lengths * 2
    x = normal(generator, device, sum(lengths), shape.D)
    inputs = {"store": store, "token_scale": None, "channel_scale": None}
    if store == "int8":
        channel = x.abs().amax(0).clamp_min(1e-6)
        token = (x / channel).abs().amax(1).clamp_min(1e-6) / 127
        codes = (x / channel / token[:, None]).round().clamp(-127, 127).to(torch.int8)
        inputs |= {"token_scale": token, "channel_scale": channel}
    elif store == "fp8":
        token = x.abs().amax(1).clamp_min(1e-6) / 448
        # As uint8, so that nothing takes the codes for numbers.
        codes = (x / token[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
        inputs |= {"token_scale": token}
    else:
        codes = x.to(dtype)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))[: shape.B]
    cu_seqlens = offsets([lengths[i] for i in order.tolist()], device)
    inputs |= {
        "codes": codes,
        "spans": offsets(lengths, device, torch.int64),
        "index": order.to(device),
        "cu_seqlens": cu_seqlens,
        "total": int(cu_seqlens[-1]),
        "dtype": dtype,
    }
    if kind:
        weights = weights_of(kind, shape, dtype, device, generator)
        inputs |= {"weights": weights, "kind": kind, "m": shape.m}
    return inputs


def _gather_eager(x: Inputs) -> Tensor:
    cu = x["cu_seqlens"].long()
    row = torch.arange(x["total"], device=cu.device)
    of = torch.searchsorted(cu[1:], row, right=True)
    source = x["spans"][x["index"]][of] + row - cu[of]
    codes, dtype = x["codes"].index_select(0, source), x["dtype"]
    if x["store"] == "plain":
        return codes.to(dtype)
    if x["store"] == "fp8":
        codes = codes.view(torch.float8_e4m3fn)
    # float8 goes to float64 by way of float32 (exactly).
    codes = codes.float().to(torch.promote_types(dtype, torch.float32))
    if x["store"] == "int8":
        codes = codes * x["channel_scale"]
    return (codes * x["token_scale"][source, None]).to(dtype)


def _gather_insert_eager(x: Inputs) -> Tensor:
    return insert_eager(x | {"hidden": _gather_eager(x)})


def _as_store(x: Inputs):
    from lpt_kernels.gather import Store

    return Store(x["codes"], x["spans"], x["token_scale"], x["channel_scale"])


def _gather_triton(x: Inputs) -> Tensor:
    from lpt_kernels.gather import gather_rows

    return gather_rows(
        _as_store(x), x["index"], cu_seqlens=x["cu_seqlens"], total=x["total"], dtype=x["dtype"]
    )[0]


def _gather_insert_triton(x: Inputs) -> Tensor:
    return insertion.gather_insert_prompt(
        _as_store(x),
        x["index"],
        x["cu_seqlens"],
        x["total"],
        x["kind"],
        x["weights"],
        x["m"],
        dtype=x["dtype"],
        impl="triton",
        validate=False,
    )


def _gather_bytes(shape, x, e):
    """The batch's rows read as they are stored, with their scales; written in the run's dtype; with
    an insertion also its prompt rows written and weights read.
    """
    total, D = x["total"], shape.D
    nbytes = total * D * (x["codes"].element_size() + e)
    nbytes += 4 * total * (x["token_scale"] is not None) + 4 * D * (x["channel_scale"] is not None)
    if "weights" in x:
        nbytes += shape.B * shape.m * D * e + nbytes_of(*x["weights"].values())
    return nbytes


def operators():
    for store in ("plain", "int8", "fp8"):
        functions = {"eager": _gather_eager, "triton": _gather_triton}
        make = partial(_store, store, None)
        yield Operator(f"gather_{store}.fwd", make, functions, _gather_bytes)
    for store in ("plain", "int8", "fp8"):
        functions = {"eager": _gather_insert_eager, "triton": _gather_insert_triton}
        make = partial(_store, store, "appg")
        yield Operator(f"gather_insert_{store}_appg.fwd", make, functions, _gather_bytes)
