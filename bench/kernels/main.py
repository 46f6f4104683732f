"""python -m bench kernels: what each operator's providers need, a JSON line each.

For every operator and shape: the correctness gate first (error against float64 at most twice that
of same-dtype PyTorch; who fails is not timed); then all providers are warmed; then all are timed,
interleaved, and with them a plain copy, whose bandwidth theirs is a share of.

Needs torch alone, and triton for the kernels: `python -m bench.kernels.main` runs where typer, peft
and transformers are not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import time
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from .. import timing
from ..case import Operator
from ..machine import describe
from ..paths import RESULTS
from ..shapes import DEFAULTS, QUICK, Shape, shape_of
from . import gate
from .registry import OPERATORS, copy, copy_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROVIDERS = ("eager", "compile", "varlen", "triton")


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench kernels",
        description="Time the kernels beside PyTorch and torch.compile; append to a results file.",
        epilog="Lists are separated by commas; operators, shapes and providers may hold * and ?.",
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--op", default="*", help=f"of {', '.join(OPERATORS)}")
    add("--shape", help="MODEL-TOKENS-mPROMPTS-TASK; default: all of the device's default shapes")
    add(
        "--provider",
        help="of eager, compile, varlen, triton; default: all that run there",
    )
    add("--dtype", help="of bf16, fp16, fp32; default bf16, on the CPU fp32")
    add("--repeats", type=int, default=30, help="rounds, at most")
    add("--seconds", type=float, default=0.5, help="of timing for each contestant, at most")
    add("--limit", type=float, help="seconds after which no other operator is begun")
    add("--graph", action=argparse.BooleanOptionalAction, default=True, help="replay CUDA graphs")
    add("--quick", action="store_true", help="a tiny shape, five rounds: does it all run?")
    add("--check-only", action="store_true", help="the correctness gate alone, nothing written")
    add("--out", default=str(RESULTS / "kernels.jsonl"), help="JSON lines are appended to it")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = options.device == "cpu"
    options.shapes = options.shape or ",".join(QUICK if options.quick else DEFAULTS[options.device])
    options.dtypes = (options.dtype or ("fp32" if on_cpu else "bf16")).split(",")
    options.provider = options.provider or ("eager,triton" if on_cpu else ",".join(PROVIDERS))
    if options.quick:
        options.repeats, options.seconds = min(options.repeats, 5), min(options.seconds, 0.1)
    try:
        options.shapes = [shape_of(name) for name in options.shapes.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if unknown := set(options.dtypes) - set(DTYPES):
        parser.error(f"`--dtype` must be of {', '.join(DTYPES)}, got {', '.join(sorted(unknown))}.")
    options.ops = [op for name, op in OPERATORS.items() if _matches(name, options.op)]
    if not options.ops:
        parser.error(f"`--op` fits none of {', '.join(OPERATORS)}, got {options.op!r}.")
    return options


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split(","))


def providers_of(operator: Operator, dtype: torch.dtype, options) -> dict[str, object]:
    """Functions of the providers asked for that can run here; eager is always among them, for the
    gate needs its error.
    """
    functions = dict(operator.functions)
    if options.device == "cpu" or dtype == torch.float32:
        functions.pop("varlen", None)  # PyTorch's kernel is for half precision on CUDA
        if not interpreted():
            functions.pop("triton", None)
    if operator.name != "copy" and _matches("compile", options.provider):
        functions["compile"] = _compiled(functions["eager"])
    return {
        name: function
        for name, function in functions.items()
        if name == "eager" or _matches(name, options.provider)
    }


def _compiled(function):
    # A plain function of our own: what is compiled may be a functools.partial.
    def compiled(inputs):
        return function(inputs)

    # A backward pass is called again and again on one graph, which compiled graphs refuse when
    # they have given buffers of the forward pass away.
    import torch._functorch.config as functorch

    functorch.donated_buffer = False
    # A function is compiled for a few shapes, then silently runs uncompiled.
    torch._dynamo.reset()
    return torch.compile(compiled, dynamic=False)


def run_operator(operator: Operator, shape: Shape, dtype_name: str, options, stream) -> list[dict]:
    """Rows of one operator on one shape: gate, warm-up, timing, memory."""
    device, dtype = torch.device(options.device), DTYPES[dtype_name]
    inputs = operator.inputs(shape, dtype, device)
    nbytes = operator.nbytes(shape, inputs, dtype.itemsize)
    functions = providers_of(operator, dtype, options)
    gradients, errors, failures = gate.check(operator, functions, shape, dtype, device)
    limits = None
    if "eager" in errors:
        limits = gate.allowed(errors["eager"], dtype, operator.ties)
    rows, ready = [], {}
    for name in sorted(functions, key=lambda name: name != "eager"):
        row = {"op": operator.name, "provider": name, "shape": shape.name, "dtype": dtype_name}
        row |= {"status": "ok", "reason": "", "sizes": shape.describe(), "bytes": nbytes}
        if name in failures:
            row |= failures[name]
        else:
            row |= {"error": errors[name], "allowed": limits}
            if limits is None or not gate.passes(errors[name], limits):
                row |= {"status": "wrong", "reason": gate.why(row)}
        if row["status"] == "ok" and _is_timed(name, options):
            ready[name] = row
        rows.append(row)
    if not options.check_only and ready:
        _time(operator, shape, dtype, options, functions, ready, inputs, gradients, stream)
    rows = [row for row in rows if _matches(row["provider"], options.provider)]
    # What was right but not timed (kernels in the interpreter) is nothing to keep.
    return [row for row in rows if options.check_only or row["status"] != "ok" or "ms" in row]


def _is_timed(provider: str, options) -> bool:
    if provider == "triton" and interpreted():
        return False  # the interpreter's speed says nothing
    return _matches(provider, options.provider)


def _contestant(operator, name, function, sets, device, row) -> timing.Contestant:
    """A provider ready to be warmed; its memory and whether it waits go into its row."""

    def make(i=0):
        return timing.prepare(operator, function, *sets[i])

    # A backward pass counts with its forward pass, an overwritten input does not count.
    row["peak_bytes"] = timing.peak_memory((lambda: make()()) if operator.wrt else make(), device)
    calls = [make(i) for i in range(len(sets))]
    calls[0]()
    row["waits_for_device"] = timing.waits_for_device(calls[0], device)
    return timing.Contestant(name, calls)


def _time(operator, shape, dtype, options, functions, ready, inputs, gradients, stream) -> None:
    """Fills in times, memory and bandwidth of the rows that passed."""
    device = torch.device(options.device)
    nbytes = next(iter(ready.values()))["bytes"]
    sets = [(inputs, gradients)]
    for _ in range(timing.sets_needed(nbytes, device) - 1):
        again = operator.inputs(shape, dtype, device)
        sets.append((again, None if gradients is None else [g.clone() for g in gradients]))
    contestants = []
    for name, row in ready.items():
        try:
            contestant = _contestant(operator, name, functions[name], sets, device, row)
            contestant.warm(device, options.graph, stream)
        except Exception as error:  # as at the gate
            row |= gate.failure(error)
        else:
            contestants.append(contestant)
    # The copy's tensors are the biggest shape's, whatever this operator's are.
    biggest = max(options.shapes, key=lambda s: s.rows * s.D)
    source = OPERATORS["copy"].inputs(biggest, dtype, device)
    copier = timing.Contestant("copy", [lambda: [copy(source)]])
    copier.warm(device, options.graph, stream)
    timing.time_interleaved([*contestants, copier], device, options.repeats, options.seconds)
    copy_speed = copy_bytes(biggest, source, dtype.itemsize)
    copy_speed /= timing.percentiles(copier.seconds)["p50"] * 1e9
    for contestant in contestants:
        found = timing.percentiles(contestant.seconds)
        speed = nbytes / found["p50"] / 1e9
        ready[contestant.name] |= {
            "reason": contestant.note,
            "ms": {name: round(1e3 * value, 6) for name, value in found.items()},
            "gbps": round(speed, 3),
            "copy_gbps": round(copy_speed, 3),
            "copy_shape": biggest.name,
            "share": round(speed / copy_speed, 4),
            "graph": contestant.graph,
            "rounds": len(contestant.seconds),
            "calls": contestant.count,
            "input_sets": len(sets),
        }


def _line(row: dict) -> str:
    head = f"{row['op']:28} {row['provider']:8} {row['shape']:26} {row['dtype']:5}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason'].splitlines()[0]}"
    if "ms" not in row:
        return f"{head} right (error {row['error']['rms']:.2e})"
    return (
        f"{head} {row['ms']['p50']:10.4f} ms {row['gbps']:9.1f} GB/s {100 * row['share']:6.1f} %"
        f" {row['reason']}"
    )


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("No CUDA device was found; --device cpu runs the benchmark's plain PyTorch part.")
        return 2
    if device.type == "cpu" and not interpreted():
        print("On the CPU without TRITON_INTERPRET=1 there are no kernels: triton is left out.")
    elif interpreted() and not options.check_only:
        print("Triton's interpreter is checked, not timed: its speed says nothing.")
    common = {
        "device": options.device,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe(),
    }
    start, bad, left = time.perf_counter(), 0, 0
    # One stream for all: backward passes run on their forward pass's, and capture needs its own.
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        for shape in options.shapes:
            for operator in options.ops:
                for dtype_name in options.dtypes:
                    if options.limit and time.perf_counter() - start > options.limit:
                        left += 1
                        continue
                    rows = _rows_or_failure(operator, shape, dtype_name, options, stream)
                    bad += sum(row["status"] != "ok" for row in rows)
                    for row in rows:
                        print(_line(row), flush=True)
                    if not options.check_only:
                        _append(options.out, [row | common for row in rows])
                    if device.type == "cuda":
                        gc.collect()
                        torch.cuda.empty_cache()
    if left:
        print(f"{left} operator(s) and shapes were left out: {options.limit:g} s are over.")
    print(f"{time.perf_counter() - start:.0f} s; {bad} contestant(s) wrong or failed.")
    return 1 if bad else 0


def _rows_or_failure(operator, shape, dtype_name, options, stream) -> list[dict]:
    try:
        return run_operator(operator, shape, dtype_name, options, stream)
    except Exception as error:  # too little memory for the oracle, say; the others still run
        row = {"op": operator.name, "provider": "*", "shape": shape.name, "dtype": dtype_name}
        return [row | gate.failure(error) | {"sizes": shape.describe()}]


def _append(path: str, rows: list[dict]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)


def _finite(value):
    """JSON knows no infinity: an error of a wrong shape or a NaN, a limit that is none."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    raise SystemExit(main())
