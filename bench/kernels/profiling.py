"""python -m bench profile: where the time of an insertion goes, kernel by kernel, as a table."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..machine import describe
from ..shapes import HEADLINE, QUICK, shape_of
from .main import interpreted
from .registry import OPERATORS


def table(kind: str, provider: str, shape_name: str, device: torch.device, steps: int) -> str:
    """torch.profiler's table of `steps` forward and backward passes of an insertion."""
    operator, shape = OPERATORS[f"insert_{kind}.bwd_hidden"], shape_of(shape_name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = operator.make(shape, dtype, device, torch.Generator(device).manual_seed(0))
    x["hidden"].requires_grad_()
    for weight in x["weights"].values():
        weight.requires_grad_()
    leaves = [x["hidden"], *x["weights"].values()]

    def step():
        out = operator.functions[provider](x)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize()
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    head = f"insert_{kind}, {provider}, {shape_name}, {dtype}, {steps} x (forward + backward)"
    averages = seen.key_averages()
    return f"{head}\n{averages.table(sort_by=key, row_limit=25, max_name_column_width=60)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench profile", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--kind", default="npg,appg,mppg,static")
    add("--provider", help="of eager, triton; default triton, on the CPU eager")
    add("--shape", help=f"default {HEADLINE}, on the CPU {QUICK[0]}")
    add("--steps", type=int, default=10)
    add("--out", help="a text file; default: the screen")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("No CUDA device was found; --device cpu profiles plain PyTorch.")
        return 2
    on_gpu = device.type == "cuda"
    provider = options.provider or ("triton" if on_gpu else "eager")
    if provider == "triton" and not on_gpu and not interpreted():
        parser.error("`--provider triton` needs a CUDA device, got cpu.")
    shape = options.shape or (HEADLINE if on_gpu else QUICK[0])
    about = describe()
    parts = [f"{about['machine']}, commit {about['commit']}, {about['versions']}"]
    for kind in options.kind.split(","):
        parts.append(table(kind, provider, shape, device, options.steps))
    text = "\n\n".join(parts) + "\n"
    if options.out is None:
        print(text)
    else:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(text, encoding="utf-8")
        print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
