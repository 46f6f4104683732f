"""How kernels are started: one place, so that launches can be recorded, compiled ahead or searched.

Every wrapper of this package ends in `launch(...)` by keyword. With `LPT_AUTOTUNE=1` on a GPU,
`best_config` times the candidates of an operator once for each key; without it the default that
the operator's heuristic names is used, so that results do not depend on a search.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
import triton


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, as recorded by `record`.

    Attributes:
        kernel: the jit function.
        grid: number of programs along each axis.
        args: every argument by name, tensors and constants alike.
        num_warps, num_stages: launch options.
    """

    kernel: object
    grid: tuple[int, ...]
    args: dict[str, object] = field(repr=False)
    num_warps: int = 4
    num_stages: int = 2

    @property
    def name(self) -> str:
        """Of the jit function."""
        return getattr(self.kernel, "__name__", None) or self.kernel.fn.__name__


_recorded: list[Launch] | None = None


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Inside, kernels are noted instead of run; tensors on the device "meta" serve."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def launch(kernel, grid: tuple[int, ...], *, num_warps: int = 4, num_stages: int = 2, **args):
    """Starts `kernel` on the device of its tensors; nothing happens for an empty grid."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, num_warps, num_stages))
        return
    if 0 in grid:
        return
    device = next(a.device for a in args.values() if isinstance(a, torch.Tensor))
    if device.type == "cuda":
        # Triton starts on the current device, which need not be the tensors' own.
        with torch.cuda.device(device):
            kernel[grid](**args, num_warps=num_warps, num_stages=num_stages)
    else:
        kernel[grid](**args, num_warps=num_warps, num_stages=num_stages)


# What is compiled for without a GPU (lpt_kernels.targets says).
compiled_for: str | None = None


def on_hopper() -> bool:
    """Whether kernels run on sm_90, the GPU for which launch configurations were tuned; where there
    is no GPU too, so that the interpreter runs what a Hopper would.
    """
    return compiled_for == "sm_90" if compiled_for else _gpu_is_hopper()


@cache
def _gpu_is_hopper() -> bool:
    if torch.version.hip is not None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() == (9, 0)


def precision_of(dtype: torch.dtype) -> str:
    """What PyTorch's own setting for fp32 products asks of tl.dot."""
    setting = torch.get_float32_matmul_precision() if dtype == torch.float32 else "highest"
    if torch.version.hip is not None:
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[setting]


# Plain Python, for torch.compile cannot look into triton.cdiv and triton.next_power_of_2.


def ceil_div(n: int, block: int) -> int:
    """How many blocks hold n things."""
    return -(-n // block)


def next_power_of_2(n: int, at_least: int = 1) -> int:
    """The smallest power of two that is at least n and at_least (itself one)."""
    return max(at_least, 1 << (max(n, 1) - 1).bit_length())


_best: dict[tuple, object] = {}


def best_config(key: tuple, default, candidates: Iterable, run: Callable[[object], object], device):
    """The configuration to use: `default`, or with LPT_AUTOTUNE=1 on a GPU the fastest candidate.

    Args:
        key: what the choice depends on (operator, dtype, bucketed sizes).
        default: the heuristic's choice.
        candidates: configurations to try beside it.
        run: starts the operator with a configuration; it must leave its inputs unchanged.
        device: of the tensors.
    """
    if os.environ.get("LPT_AUTOTUNE") != "1" or device.type != "cuda" or _recorded is not None:
        return default
    if key not in _best:
        if torch.cuda.is_current_stream_capturing():
            return default
        timed = []
        for config in dict.fromkeys((default, *candidates)):
            try:
                timed.append((triton.testing.do_bench(lambda c=config: run(c)), config))
            except (triton.runtime.errors.OutOfResources, triton.CompilationError):
                continue
        _best[key] = min(timed, key=lambda pair: pair[0])[1] if timed else default
    return _best[key]
