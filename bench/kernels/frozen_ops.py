"""Blocks with frozen weights: norms and activations with what stands before them."""

from __future__ import annotations

from functools import partial

from torch.nn import functional as F

from ..case import Inputs, Operator, normal


def _rows(shape, dtype, device, generator, wide, vectors, rows) -> Inputs:
    columns = shape.inter if wide else shape.D
    of_rows = {n: normal(generator, device, shape.T, columns, dtype=dtype) for n in rows}
    return of_rows | {n: normal(generator, device, columns, dtype=dtype) for n in vectors}


def _layer_norm_eager(x):
    s = x["x"] + x["bias"] + x["residual"]
    return F.layer_norm(s, s.shape[-1:], x["weight"], x["norm_bias"], 1e-5)


def _layer_norm_triton(x):
    from lpt_kernels import frozen

    return frozen.layer_norm(
        x["x"], x["weight"], x["norm_bias"], bias=x["bias"], residual=x["residual"], eps=1e-5
    )


def _rms_norm_eager(x):
    s = x["x"] + x["residual"]
    return F.rms_norm(s, s.shape[-1:], x["weight"], 1e-6), s


def _rms_norm_triton(x):
    from lpt_kernels import frozen

    return frozen.rms_norm(x["x"], x["weight"], residual=x["residual"], eps=1e-6, return_sum=True)


def _gelu_eager(x):
    return F.gelu(x["x"] + x["bias"])


def _gelu_triton(x):
    from lpt_kernels import frozen

    return frozen.gelu(x["x"], x["bias"])


def _gated_eager(x):
    return F.silu(x["gate"]) * x["up"]


def _gated_triton(x):
    from lpt_kernels import frozen

    return frozen.gated(x["gate"], x["up"], activation="silu")


def _tensors_bytes(shape, x, e, tensors, wide):
    """So many tensors of [T, width] read or written; vectors of one width are not counted."""
    return tensors * shape.T * (shape.inter if wide else shape.D) * e


# name: functions; feed-forward width; vectors; tensors of rows; how many are moved forward
# (inputs, outputs) and backward (gradients of outputs, what the derivative needs, gradients).
_FROZEN = {
    "layer_norm": (
        (_layer_norm_eager, _layer_norm_triton),
        (False, ("bias", "weight", "norm_bias"), ("x", "residual")),
        (3, 3),
    ),
    # With the sum given out, as pre-norm blocks need it.
    "rms_norm": (
        (_rms_norm_eager, _rms_norm_triton),
        (False, ("weight",), ("x", "residual")),
        (4, 4),
    ),
    "gelu": ((_gelu_eager, _gelu_triton), (True, ("bias",), ("x",)), (2, 3)),
    "silu_gated": ((_gated_eager, _gated_triton), (True, (), ("gate", "up")), (3, 5)),
}


def operators():
    for name, ((eager, triton), (wide, vectors, rows), (forward, backward)) in _FROZEN.items():
        make = partial(_rows, wide=wide, vectors=vectors, rows=rows)
        functions = {"eager": eager, "triton": triton}
        nbytes = partial(_tensors_bytes, tensors=forward, wide=wide)
        yield Operator(f"{name}.fwd", make, functions, nbytes)
        nbytes = partial(_tensors_bytes, tensors=backward, wide=wide)
        yield Operator(f"{name}.bwd", make, functions, nbytes, rows)
