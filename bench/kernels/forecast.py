"""python -m bench forecast: what each insertion and attention kernel, and a training step, should
take on an H100 and an H200, by arithmetic, beside what it took (bench/results/gpu, an H200).

A kernel takes the longest of: its bytes of device memory at the speed of a copy, its bytes of the
L2 cache at that cache's speed, its operations at the rate of large products; and for each wave of
programs the wait for a chain of dependent loads. Bytes are those of the shape (bf16, fp32 masters
of npg), each read or written once, and again where a program cannot keep them; those that a kernel
has just written count as the L2 cache's. Shape: RoBERTa-large, 32k tokens, m = 20, texts as long as
those of SST-2.

The device's part of a step (cached, packed) is the sum of: products of the layers above k, forward
and for input gradients (24 D^2 operations a row and layer each; the last layer has a row a text,
and in the first only prompt rows go backward), at the rate of large products; what element-wise
kernels and attention read and write, 18 times a layer's rows forward and 25 backward, at the speed
of a copy; and the start of each launch.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..paths import RESULTS
from ..shapes import HEADLINE, shape_of

TUNED, TRAINED = RESULTS / "gpu" / "tune.txt", RESULTS / "gpu" / "train.jsonl"
# Bytes a second of a copy (read and written): measured on an H200 (kernels.jsonl); of an H100 from
# a measurement of others, not ours. L2 and products are guesses for the processor that both have.
COPY = {"H100": 3.0e12, "H200": 4.19e12}
L2, PRODUCTS = 5.5e12, 6.0e14
LOAD = 0.8e-6  # seconds of one load that goes to memory
START = 1.5e-6  # seconds from a short kernel's end to the next one's work, inside a CUDA graph
LAYERS, M, WIDTH = 6, 5, 1024  # of the measured steps: 24 layers, k = 18, D = 1024


@dataclass(frozen=True)
class Kernel:
    """What a kernel does at the headline's shape.

    Attributes:
        name: of a part of bench.kernels.tune_insert.
        memory: bytes to and from device memory. cache: bytes from L2, those of `memory` included.
        flops: of its products.
        chain: loads that wait for one another in a program's life, times waves of programs.
    """

    name: str
    memory: float
    cache: float
    flops: float
    chain: float

    def seconds(self, gpu: str) -> float:
        work = max(self.memory / COPY[gpu], self.cache / L2, self.flops / PRODUCTS)
        return work + self.chain * LOAD


def kernels(T: int, B: int, D: int, r: int, m: int) -> list[Kernel]:
    e, P = 2, B * m
    text, prompt = T * D * e, P * D * e
    h, u = T * r * e, P * r * e
    products = 2 * P * r * D
    blocks = lambda n, block: -(-n // block)  # noqa: E731
    return [
        Kernel("npg_down_fwd", 2 * text, 2 * text + blocks(B, 16) * r * D * 4, 2 * B * r * D, 6),
        Kernel(
            "pools_down_fwd",
            2 * text + h,
            3 * text + h + blocks(T, 128) * r * D * e,
            2 * T * r * D,
            6,
        ),
        # W_u (fp32) stays with its program; u is read for each of its column blocks.
        Kernel(
            "up_fwd_npg",
            prompt + m * D * r * 4,
            prompt + m * D * r * 4 + blocks(m * D, 64) * B * r * e,
            products,
            6,
        ),
        Kernel("up_fwd_mppg", prompt, prompt + u * blocks(D, 128), products, 5),
        Kernel(
            "up_bwd_npg",
            prompt + m * B * r * 4,
            prompt + m * B * r * 4 + blocks(B, 64) * m * D * r * 4,
            products,
            8,
        ),
        Kernel("up_bwd_mppg", prompt + u, prompt + u + blocks(P, 64) * D * r * e, products, 6),
        Kernel(
            "up_bwd_weight_npg",
            prompt + m * D * r * 4,
            prompt + m * D * r * 4 + blocks(m * D, 64) * B * r * e,
            products,
            6,
        ),
        Kernel(
            "up_bwd_weight_mppg",
            prompt,
            prompt + u * blocks(D, 128) + 33 * D * r * 4,
            products,
            5,
        ),
        Kernel("down_bwd_mppg", text, text + h * blocks(D, 128) + 33 * D * r * 4, 2 * T * r * D, 5),
        Kernel(
            "hidden_bwd_mppg", 2 * text, 2 * text + h + blocks(T, 64) * D * r * e, 2 * T * r * D, 6
        ),
        Kernel("hidden_bwd_static", 2 * text, 2 * text, 0, 6),
        Kernel("static_bwd", prompt, prompt, 0, 8),
        Kernel("attention_fwd", 4 * (text + prompt), 4 * (text + prompt), 0, 24),
        Kernel("attention_bwd", 7 * (text + prompt), 7 * (text + prompt), 0, 32),
    ]


def measured(path: Path = TUNED) -> dict[str, float]:
    """The best microseconds of each part."""
    found: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"(\w+) +([\d.]+) us", line)
        if match:
            name, time = match[1], float(match[2])
            found[name] = min(time, found.get(name, time))
    if "attention_long" in found:  # texts of more than a block: another kernel of the same backward
        found["attention_bwd"] += found.pop("attention_long")
    return found


def step_seconds(gpu: str, tokens: int, texts: int, launches: int) -> float:
    """The device's part of a training step."""
    rows, prompts = tokens + texts * M, texts * M
    forward = (LAYERS - 1) * rows + texts
    backward = (LAYERS - 2) * rows + prompts + texts
    products = 24 * WIDTH**2 * (forward + backward)
    moved = 2 * WIDTH * (18 * forward + 25 * backward)
    return products / PRODUCTS + moved / COPY[gpu] + launches * START


def measured_steps(path: Path = TRAINED) -> list[tuple[dict, dict]]:
    """The latest figures of cached_packed at each size: (its batch, its times)."""
    found, batch = {}, {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["what"] == "batches":
            batch[row["size"]] = row
        elif row.get("who") == "cached_packed" and "device_ms" in row:
            found[row["size"]] = row
    return [(batch[size], row) for size, row in found.items()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench forecast", description=__doc__)
    parser.add_argument("--file", type=Path, default=TUNED, help="output of tune_insert")
    options = parser.parse_args(arguments)
    if not options.file.is_file():
        print(f"There is no {options.file}; bench/first_light.sh tune prints such a file.")
        return 1
    shape, took = shape_of(HEADLINE), measured(options.file)
    print("| kernel | MB | H100 us | H200 us | measured on an H200 us | forecast over measured |")
    print("|---|---|---|---|---|---|")
    for kernel in kernels(shape.T, shape.B, shape.D, shape.r, shape.m):
        times = [1e6 * kernel.seconds(gpu) for gpu in ("H100", "H200")]
        own = took.get(kernel.name)
        said = "- | -" if own is None else f"{own:.1f} | {times[1] / own:.0%}"
        row = " | ".join(f"{t:.1f}" for t in times)
        print(f"| {kernel.name} | {kernel.memory / 1e6:.0f} | {row} | {said} |")
    print()
    print(
        "| step | texts | tokens | H100 ms | H200 ms | measured on an H200 ms | forecast over it |"
    )
    print("|---|---|---|---|---|---|---|")
    for batch, took in measured_steps():
        counts = (batch["tokens"], batch["texts"], took["launches"])
        times = [1e3 * step_seconds(gpu, *counts) for gpu in ("H100", "H200")]
        row = " | ".join(f"{t:.2f}" for t in times)
        own = took["device_ms"]
        said = f"{own:.2f} | {times[1] / own:.0%}"
        print(f"| {batch['size']} | {batch['texts']:,} | {batch['tokens']:,} | {row} | {said} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
