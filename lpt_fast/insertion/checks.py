"""Checks at the door of prompt insertion: what is wrong is said before a kernel runs.

Shapes, dtypes and devices are looked at always. Values raise a ValueError on the CPU and stop the
stream by an assertion on a GPU, where looking would make the host wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from .padded_layout import check
from .reference import WEIGHTS

IMPLS = ("auto", "triton", "reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_values(condition: Tensor, message: Callable[[], str]) -> None:
    """A ValueError on the CPU, an assertion in the stream on a GPU, where looking would wait. Not
    while compiling: a graph cannot look; the eager run of the same data has.
    """
    if not torch.compiler.is_compiling():
        check(condition, message)


def check_tensor(
    name: str, tensor: Tensor, shape: tuple, dtypes: tuple, device: torch.device
) -> None:
    """Shape (None: any), dtype and device of an argument."""
    fits = tensor.dim() == len(shape) and all(
        want is None or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        want = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"`{name}` must have the shape [{want}], got {list(tensor.shape)}.")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d) for d in dtypes)
        raise ValueError(
            f"`{name}` must be {names}, got {tensor.dtype}; convert it with .to({dtypes[0]})."
        )
    if tensor.device != device:
        raise ValueError(
            f"`{name}` must be on {device}, where the hidden states are, got {tensor.device}."
        )


def check_weights(kind, weights, D, m, device, B=None) -> list[Tensor]:
    """The weights of a generator in the operator's order."""
    if kind not in WEIGHTS:
        raise ValueError(f"`kind` must be one of {', '.join(WEIGHTS)}, got {kind!r}.")
    if isinstance(m, bool) or not isinstance(m, int | torch.SymInt) or m < 1:
        raise ValueError(f"`num_virtual_tokens` must be a whole number of at least 1, got {m!r}.")
    missing = [name for name in WEIGHTS[kind] if name not in weights]
    if missing:
        raise ValueError(
            f"`weights` of {kind} must hold {', '.join(WEIGHTS[kind])}, got "
            f"{', '.join(weights) or 'nothing'}."
        )
    floats = (*DTYPES, torch.float64)
    found = [weights[name] for name in WEIGHTS[kind]]
    if kind == "static":
        shape = (m, D) if found[0].dim() == 2 else (B, m, D)
        check_tensor(WEIGHTS[kind][0], found[0], shape, floats, device)
        return found
    r = found[0].shape[0] if found[0].dim() == 2 else None
    rows = m * D if kind == "npg" else D
    for name, tensor, shape in zip(
        WEIGHTS[kind], found, ((r, D), (r,), (rows, r), (rows,)), strict=True
    ):
        check_tensor(name, tensor, shape, floats, device)
    if r == 0:
        raise ValueError("`proj_down.weight` must have at least one row, got the shape [0, D].")
    return found


def check_lengths(cu_seqlens: Tensor, T: int, device: torch.device, validate: bool) -> int:
    """B, after checking where the examples are."""
    check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int32,), device)
    B = cu_seqlens.shape[0] - 1
    if B < 0:
        raise ValueError("`cu_seqlens` must hold B + 1 numbers beginning with 0, got none.")
    if validate:
        check_values(
            (cu_seqlens[:1] == 0).all() & (cu_seqlens[-1:] == T).all(),
            lambda: (
                f"`cu_seqlens` must begin with 0 and end at {T}, the number of text rows, got "
                f"{int(cu_seqlens[0])} and {int(cu_seqlens[-1])}."
            ),
        )
        check_values(
            cu_seqlens[1:] > cu_seqlens[:-1],
            lambda: (
                "`cu_seqlens` must increase, each example having at least one row, got "
                f"{cu_seqlens.tolist()[:12]}; leave empty examples out."
            ),
        )
    return B


def check_context(context, cu_seqlens, B, validate):
    """First readable row and number of readable rows of each example, or nothing."""
    if context is None:
        return None, None
    check_tensor("context", context, (B, 2), (torch.int32, torch.int64), cu_seqlens.device)
    if validate:
        lengths = cu_seqlens.diff()
        check_values(
            (context[:, 0] >= 0) & (context[:, 0] < context[:, 1]) & (context[:, 1] <= lengths),
            lambda: (
                "`context` must hold a first row and an end within each example's rows, at least "
                f"one apart, got {context.tolist()[:6]} for the lengths {lengths.tolist()[:6]}."
            ),
        )
    start = (cu_seqlens[:-1] + context[:, 0]).to(torch.int32)
    return start, (context[:, 1] - context[:, 0]).to(torch.int32)


def check_dropout(p: float, seed: Tensor | None, device) -> Tensor | None:
    """The seed of the mask: given, drawn from PyTorch's generator of the device, or none."""
    if not 0 <= p < 1:
        raise ValueError(f"`dropout_p` must be in [0, 1), got {p}.")
    if p == 0:
        return None
    if seed is None:
        # On the device, so that the replay of a CUDA graph draws anew.
        return torch.randint(0, 2**31 - 1, (1,), device=device)
    check_tensor("seed", seed, (1,), (torch.int64,), device)
    return seed


def choose_impl(impl: str, hidden: Tensor) -> str:
    """ "triton" or "reference": what `impl` and the tensors ask for.

    "auto" takes the kernels on CUDA and in Triton's interpreter (TRITON_INTERPRET=1), and plain
    PyTorch on the CPU and in float64.

    Raises:
        ValueError: for kernels asked for where they cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"`impl` must be one of {', '.join(IMPLS)}, got {impl!r}.")
    runs = hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    known = hidden.dtype in (*DTYPES, torch.int8, torch.uint8)
    if impl == "auto":
        return "triton" if runs and known else "reference"
    if impl == "triton" and not known:
        names = ", ".join(str(d) for d in DTYPES)
        raise ValueError(
            f"`hidden` must be one of {names} for impl='triton', got {hidden.dtype}; use "
            "impl='reference'."
        )
    if impl == "triton" and not runs:
        raise ValueError(
            f"impl='triton' needs hidden states on a CUDA device, got {hidden.device}; use "
            "impl='reference', or TRITON_INTERPRET=1 to run the kernels in Triton's interpreter."
        )
    return impl


def check_mask(name, mask, B, S, device):
    """Raises ValueError unless `mask` is a mask [B, S] on `device`."""
    dtypes = (torch.bool, torch.int64, torch.int32, torch.uint8, torch.int8, *DTYPES)
    check_tensor(name, mask, (B, S), dtypes, device)
    check_values(
        mask.bool().any(1),
        lambda: f"`{name}` must have a token in each row, got a row of zeros; leave it out.",
    )
