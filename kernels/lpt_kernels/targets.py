"""Compiles every kernel for the GPUs this package is meant for, without having one.

    python -m lpt_kernels.targets [--check] [--target sm_90] [--kernel NAME] [--case TEXT] [--once]

prints registers, spilled bytes, shared memory and use of tensor cores of each kernel in its default
configuration, how many programs it starts, and for sm_90 in how many waves and with how much in
flight (hopper.py). `--check` exits with 1 when one fails to compile, spills, needs more shared
memory than the target has, or was compiled to a race.

What is compiled is named by `CASES` of targets_cases.py.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import io
import json
import math
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import hopper, launch
from .common import INTERPRETED
from .launch import Launch, record
from .targets_cases import CASES


@dataclass(frozen=True)
class Target:
    """A GPU to compile for. shared: bytes of shared memory that one program may have."""

    gpu: GPUTarget
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
TENSOR_MEMORY_COLUMNS = 512  # sm_100 only


@dataclass(frozen=True)
class Report:
    """What one compilation gave.

    Attributes:
        registers: a thread; on gfx942 vector registers, accumulators included.
        spilled: bytes of local memory a thread (there are no local arrays in Triton, so all of it
            is spills), and the spilled registers where the compiler counts them.
        shared: bytes of shared memory a program.
        tensor_memory: columns of it (sm_100).
        tensor_cores: names of the matrix instructions, "" where there are none.
        programs: of the case's launch.
        waves, kb_in_flight, race: sm_90 only, as of hopper.py.
        error: why it did not compile, in one line.
    """

    kernel: str
    case: str
    target: str
    num_warps: int
    num_stages: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    tensor_memory: int = 0
    tensor_cores: str = ""
    programs: int = 0
    waves: float = 0.0
    kb_in_flight: float = 0.0
    race: str = ""
    seconds: float = 0.0
    error: str = ""

    def failure(self) -> str:
        """The reason why `--check` refuses it, "" where it does not."""
        limit = TARGETS[self.target].shared
        if self.error:
            why = self.error
        elif self.race:
            why = self.race
        elif self.spilled:
            why = f"spills {self.spilled} bytes a thread at {self.registers} registers"
        elif self.shared > limit:
            why = f"needs {self.shared} bytes of shared memory, {limit} are there"
        elif self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            why = f"needs {self.tensor_memory} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}"
        else:
            return ""
        return f"{self.kernel} ({self.case}) on {self.target}: {why}"


@dataclass(frozen=True)
class Variant:
    """A kernel to compile in one configuration and specialisation, for one target; `case` is the
    first that launched it."""

    case: str
    target: str
    launch: Launch

    def report(self, **figures) -> Report:
        """A report on this variant."""
        x = self.launch
        return Report(x.name, self.case, self.target, x.num_warps, x.num_stages, **figures)


def kernels() -> dict[str, JITFunction]:
    """Every `@triton.jit` function of this package whose name ends in `_kernel`."""
    found = {}
    package = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{__package__}.{info.name}")
        for name, value in vars(module).items():
            if (
                isinstance(value, JITFunction)
                and value.module == module.__name__
                and name.endswith("_kernel")
            ):
                found[name] = value
    return found


# --- compiling ------------------------------------------------------------------------------------


def specialise(launch: Launch, target: Target) -> tuple[ASTSource, dict]:
    """What the JIT would compile for this launch (its own code decides), and with which options."""
    backend = make_backend(target.gpu)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bound, specialisation, extra = bind(**launch.args, **options)
    _, signature, constexprs, attrs = kernel._pack_args(
        backend, extra, bound, specialisation, options
    )
    return ASTSource(kernel, signature, constexprs, attrs), options


@contextlib.contextmanager
def _chosen_for(target: str) -> Iterator[None]:
    """Heuristics ask launch.on_hopper and torch.version which GPU they choose for."""
    version = torch.version.cuda, torch.version.hip
    if TARGETS[target].gpu.backend == "hip":
        torch.version.cuda, torch.version.hip = None, "6.4"
    else:
        torch.version.cuda, torch.version.hip = "12.8", None
    launch.compiled_for = target
    try:
        yield
    finally:
        launch.compiled_for = None
        torch.version.cuda, torch.version.hip = version


def collect(
    cases: Mapping[str, Callable[[], object]], target: str
) -> tuple[list[Variant], list[str]]:
    """Distinct compilations that the cases ask for, and one line for each case that fails."""
    variants: dict[tuple, Variant] = {}
    failures = []
    for name, function in cases.items():
        try:
            with _chosen_for(target), record() as launches:
                function()
            if not launches:
                raise RuntimeError("it launches no kernel")
            for one in launches:
                source, options = specialise(one, TARGETS[target])
                key = (one.name, source.hash(), str(options))
                variants.setdefault(key, Variant(name, target, one))
        except Exception as error:
            failures.append(f"{name} on {target}: {one_line(error)}")
    return list(variants.values()), failures


def one_line(error: BaseException) -> str:
    """An error's type and reason in one line."""
    # Triton's messages quote the source first and end with the reason.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # ptxas' reasons are followed by the command that repeats them.
    reasons = [line for line in lines if re.search(r"\b(error|fatal)\b\s*:", line)] or lines[-1:]
    return " ".join([type(error).__name__, *reasons[:1]])[:300]


def compile_variant(variant: Variant) -> Report:
    """Compiles, and reads the figures from the machine code."""
    target = TARGETS[variant.target]
    started = time.perf_counter()
    try:
        # A failing ptxas makes Triton print the whole program.
        with contextlib.redirect_stdout(io.StringIO()):
            source, options = specialise(variant.launch, target)
            compiled = triton.compile(source, target=target.gpu, options=options)
        read = _read_hsaco if target.gpu.backend == "hip" else _read_cubin
        figures = read(compiled.asm) | {"programs": math.prod(variant.launch.grid)}
        if variant.target == "sm_90":
            figures |= hopper.figures(variant.launch, figures, compiled)
        return variant.report(
            **figures,
            shared=compiled.metadata.shared,
            tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
            seconds=round(time.perf_counter() - started, 2),
        )
    except Exception as error:
        return variant.report(error=one_line(error))


def _read_cubin(asm) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    # wgmma.mma_async..., tcgen05.mma..., mma.sync...; the type of the last operand but the sum.
    found = re.findall(r"\b(wgmma|tcgen05|mma)\.(?:mma(?:_async)?|sync)\.([\w.:]*)", asm["ptx"])
    names = {f"{name}.{_operand_type(rest)}" for name, rest in found}
    return {
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]) + int(usage["LOCAL"]),
        "tensor_cores": " ".join(sorted(names)),
    }


def _operand_type(rest: str) -> str:
    kinds = re.findall(r"kind::(\w+)|\b(bf16|f16|tf32|f64|s8|u8|e4m3|e5m2)\b", rest)
    return next((a or b for a, b in kinds), "f32")


def _read_hsaco(asm) -> dict:
    text = asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)[1])

    names = set(re.findall(r"\bv_(mfma_\w+)", text))
    return {
        # The accumulation registers are counted in it, for both are one file there.
        "registers": number("vgpr_count"),
        # Registers spilled to other registers (scalar to vector, vector to accumulator) cost no
        # memory and are left out.
        "spilled": number("private_segment_fixed_size"),
        "tensor_cores": " ".join(sorted(names)),
    }


def survey(
    cases: Mapping[str, Callable[[], object]] = CASES,
    targets: Iterable[str] = TARGETS,
    kernel: str | None = None,
    jobs: int | None = None,
    once: bool = False,
) -> tuple[list[Report], list[str]]:
    """Compiles what the cases launch. Returns the reports and one line for each failing case.

    kernel: only kernels whose name contains it. jobs: processes, as many as cores by default.
    once: the first case of each kernel alone.
    """
    work, failures = [], []
    for target in targets:
        variants, failed = collect(cases, target)
        if once:
            variants = list({v.launch.name: v for v in reversed(variants)}.values())
        work += [v for v in variants if kernel is None or kernel in v.launch.name]
        failures += failed
    jobs = min(jobs or os.cpu_count() or 1, len(work))
    if jobs <= 1 or "fork" not in multiprocessing.get_all_start_methods():
        return [compile_variant(variant) for variant in work], failures
    reports = _in_processes(work, jobs)
    # A crash of the compiler takes the pool with it and all that was waiting: find the culprit.
    for i, report in enumerate(reports):
        if report is None:
            alone = _in_processes(work[i : i + 1], 1)[0]
            reports[i] = alone or work[i].report(error="the compiler crashed")
    return reports, failures


_work: list[Variant] = []


def _compile_item(i: int) -> Report:
    return compile_variant(_work[i])


def _in_processes(work: list[Variant], jobs: int) -> list[Report | None]:
    """Reports, None where the process died."""
    global _work
    _work = work  # forked processes see it; jit functions cannot be sent
    context = multiprocessing.get_context("fork")
    reports = []
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for future in [pool.submit(_compile_item, i) for i in range(len(work))]:
            try:
                reports.append(future.result())
            except BrokenProcessPool:
                reports.append(None)
    return reports


# --- command line ---------------------------------------------------------------------------------


def table(reports: Iterable[Report]) -> str:
    """The reports as a table of text."""
    head = ["kernel", "case", "target", "warps", "stages", "registers", "spilled B", "shared B"]
    head += ["programs", "waves", "KB in flight"]
    rows = [[*head, "tensor cores"]]
    for r in reports:
        numbers = [r.num_warps, r.num_stages, r.registers, r.spilled, r.shared, r.programs]
        numbers += [f"{r.waves:.2f}", f"{r.kb_in_flight:.0f}"] if r.target == "sm_90" else "--"
        last = r.error or r.tensor_cores or "-"
        rows.append([r.kernel, r.case, r.target, *map(str, numbers), last])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [
            c.ljust(w) if i < 3 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 where --check fails, 2 in the interpreter."""
    parser = argparse.ArgumentParser(
        prog="python -m lpt_kernels.targets",
        description="Compiles every kernel for each target, without a GPU, and says what it needs.",
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 on a failure")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one")
    parser.add_argument("--kernel", metavar="NAME", help="only kernels whose name contains it")
    parser.add_argument("--case", metavar="TEXT", help="only cases whose name contains it")
    parser.add_argument("--once", action="store_true", help="the first case of each kernel alone")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    parser.add_argument("--jobs", type=int, help="processes that compile (default: all cores)")
    options = parser.parse_args(argv)
    if INTERPRETED:
        print(
            "TRITON_INTERPRET=1 is set, which leaves nothing to compile: unset it.", file=sys.stderr
        )
        return 2
    started = time.perf_counter()
    cases = {name: f for name, f in CASES.items() if (options.case or "") in name}
    reports, failures = survey(
        cases,
        options.target or TARGETS,
        kernel=options.kernel,
        jobs=options.jobs,
        once=options.once,
    )
    print(table(reports))
    seconds = time.perf_counter() - started
    print(f"{len(reports)} compilations, Triton {triton.__version__}, {seconds:.0f} s")
    if options.json:
        with open(options.json, "w") as file:
            json.dump([asdict(r) for r in reports], file, indent=1)
    failures += [r.failure() for r in reports if r.failure()]
    if options.kernel is None and options.case is None:
        seen = {r.kernel for r in reports}
        failures += [f"{name}: no case launches it" for name in kernels() if name not in seen]
    elif not reports:
        failures.append("no kernel or case has that in its name")
    for line in failures:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if options.check and failures else 0


if __name__ == "__main__":
    # Under `python -m` this file is a second module; the cases are the imported one's.
    from lpt_kernels.targets import main as imported_main

    sys.exit(imported_main())
