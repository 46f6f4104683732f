"""python -m bench.kernels.tune_insert: the launch configurations of the insertion and attention
kernels, on a GPU: each by itself in each configuration, microseconds in a CUDA graph, best first.

Most of the time goes to Triton's compilations, which many processes share: start one for each part
with --compile first (bench/first_light.sh tune does), then one that finds all of it compiled.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from lpt_kernels import attention, insert, insert_backward, insert_config

from ..case import offsets
from ..shapes import HEADLINE, shape_of
from .attention_ops import operators as attention_operators
from .insert_ops import weights_of

# part: (kernel as in insert_config, kind)
PARTS = {
    "npg_down_fwd": ("npg_down_fwd", "npg"),
    "pools_down_fwd": ("pools_down_fwd", "mppg"),
    "up_fwd_npg": ("npg_up_fwd", "npg"),
    "up_fwd_mppg": ("up_fwd", "mppg"),
    "up_fwd_appg": ("up_fwd", "appg"),
    "up_bwd_npg": ("up_bwd", "npg"),
    "up_bwd_mppg": ("up_bwd", "mppg"),
    "up_bwd_weight_npg": ("npg_up_bwd_weight", "npg"),
    "up_bwd_weight_mppg": ("up_bwd_weight", "mppg"),
    "down_bwd_mppg": ("down_bwd", "mppg"),
    "hidden_bwd_mppg": ("hidden_bwd", "mppg"),
    "hidden_bwd_static": ("hidden_bwd", "static"),
    "static_bwd": ("static_bwd", "static"),
}
ATTENTION = {
    "attention_fwd": "attend_fwd_kernel",
    "attention_bwd": "attend_bwd_kernel",
    "attention_long": "attend_long_bwd_kernel",
}


@contextmanager
def seen(*modules, change: Callable = lambda name, options: options) -> Iterator[list]:
    """Kernels that `modules` start, after they ran: (name, function that starts it again)."""
    found, start = [], modules[0].launch

    def launch(kernel, grid, **options):
        name = kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__
        options = change(name, options)
        start(kernel, grid, **options)
        found.append((name, lambda: start(kernel, grid, **options)))

    for module in modules:
        module.launch = launch
    try:
        yield found
    finally:
        for module in modules:
            module.launch = start


def microseconds(call: Callable, repeats: int = 7, calls: int = 8) -> float:
    """Median of one call, in replays of a graph of several."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(100_000)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / calls)
    return sorted(times)[repeats // 2]


def insertion(kind: str, shape, dtype, device) -> Callable:
    """Forward and backward of a kind, by the wrappers of lpt_kernels alone."""
    generator = torch.Generator(device).manual_seed(0)
    masters = weights_of(kind, shape, dtype, device, generator)
    keep = kind in ("npg", "static")
    weights = [w if keep and w.dim() > 1 else w.to(dtype) for w in masters.values()]
    layout = insert.Layout(offsets(shape.lengths, device), shape.m)
    hidden = torch.randn(shape.T, shape.D, device=device, generator=generator).to(dtype)
    grad = torch.randn(shape.rows, shape.D, device=device, generator=generator).to(dtype)
    step = dict(T=shape.T, p_drop=0.0, seed=None)

    def run():
        out, *kept = insert.insert_fwd(kind, hidden, layout, weights, dtype=dtype, **step)
        needs = dict(need_weights=True, need_hidden=True)
        insert.insert_bwd(kind, grad, out, layout, weights, *kept, **needs, **step)

    return run


def insert_rows(part: str, shape, dtype, device) -> Iterator[tuple[str, Callable]]:
    kernel, kind = PARTS[part]
    run = insertion(kind, shape, dtype, device)
    table = insert_config.table_of(dtype)
    own = table[kernel]
    for config in dict.fromkeys((own, *insert_config.candidates(kernel, shape.D))):
        table[kernel] = replace(config, BLOCK_R=own.BLOCK_R)
        try:
            with seen(insert, insert_backward) as found:
                run()
        except Exception as error:  # too much shared memory, say
            print(f"{part}: {config}: {type(error).__name__}")
            continue
        finally:
            table[kernel] = own
        calls = [call for name, call in found if kernel.endswith(name.removesuffix("_kernel"))]
        said = f"T {config.BLOCK_T} D {config.BLOCK_D} warps {config.num_warps}"
        yield f"{said} stages {config.num_stages}{' *' if config == own else ''}", calls[0]


def attention_rows(part: str, shape, dtype, device) -> Iterator[tuple[str, Callable]]:
    operator = {op.name: op for op in attention_operators()}["attention.bwd"]
    inputs = operator.inputs(shape, dtype, device)
    for name in "qkv":
        inputs[name].requires_grad_()
    kernel = ATTENTION[part]
    for warps, stages in itertools.product((2, 4, 8), (1, 2, 3)):
        options = {"num_warps": warps, "num_stages": stages}
        change = lambda n, o, new=options: o | new if n == kernel else o  # noqa: E731
        try:
            with seen(attention, change=change) as found:
                out = operator.functions["triton"](inputs)
                out.backward(torch.ones_like(out))
        except Exception as error:
            print(f"{part}: {options}: {type(error).__name__}")
            continue
        calls = [call for name, call in found if name == kernel]
        yield f"warps {warps} stages {stages}", calls[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.tune_insert", description=__doc__
    )
    add = parser.add_argument
    add("--part", default=",".join((*PARTS, *ATTENTION)), help="several with commas")
    add("--shape", default=HEADLINE)
    add("--compile", action="store_true", help="run each configuration once, time nothing")
    add("--best", type=int, default=5, help="lines of each part")
    add("--list", action="store_true", help="print the names of the parts")
    options = parser.parse_args(arguments)
    if options.list:
        print(*PARTS, *ATTENTION)
        return 0
    if not torch.cuda.is_available():
        print("No CUDA device was found, and this finds configurations for one.")
        return 2
    device, dtype, shape = torch.device("cuda"), torch.bfloat16, shape_of(options.shape)
    for part in options.part.split(","):
        rows = (attention_rows if part in ATTENTION else insert_rows)(part, shape, dtype, device)
        if options.compile:
            print(part, len(list(rows)))
            continue
        found = sorted((microseconds(call), said) for said, call in rows)
        own = [line for line in found[options.best :] if line[1].endswith("*")]
        for time, said in found[: options.best] + own:
            print(f"{part:20} {time:8.1f} us  {said}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
