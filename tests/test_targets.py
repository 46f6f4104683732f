"""Every kernel compiles for every target, without spills and within the shared memory there is.

Each kernel once in bf16 for every target, and in fp32 for sm_90; `python -m lpt_kernels.targets
--check` compiles all cases. Triton keeps what it has compiled: only the first run takes long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from lpt_kernels import hopper, targets
from lpt_kernels.common import INTERPRETED
from lpt_kernels.launch import launch
from lpt_kernels.targets_cases import meta

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

KERNELS = Path(__file__).parents[1] / "kernels"


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    # TRITON_INTERPRET must not come from outside.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    env["PYTHONPATH"] = os.pathsep.join([str(KERNELS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)


# --- the package's kernels ------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel_has_a_case(target):
    variants, failures = targets.collect(targets.CASES, target)
    assert not failures
    assert {v.launch.name for v in variants} == set(targets.kernels())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "only"),
    [(t, "RoBERTa-large bf16") for t in targets.TARGETS] + [("sm_90", "RoBERTa-large fp32")],
)
def test_check(target, only, tmp_path):
    file = tmp_path / "figures.json"
    command = ["--check", "--once", "--target", target, "--case", only, "--jobs", "2"]
    done = run("-m", "lpt_kernels.targets", *command, "--json", str(file))
    print(done.stdout.splitlines()[-1])  # how long it took
    failed = [line for line in done.stderr.splitlines() if line.startswith("FAILED")]
    assert not failed, "\n".join(failed)
    assert done.returncode == 0, done.stderr
    reports = json.loads(file.read_text())
    expected = set(targets.kernels())
    if "fp32" in only:  # attention takes half precision alone
        expected = {name for name in expected if not name.startswith("attend")}
    assert {r["kernel"] for r in reports} == expected
    assert all(r["registers"] > 0 for r in reports)
    assert done.stdout.count(f" {target} ") == len(reports)


@pytest.mark.slow
def test_no_gpu_is_asked_for_at_import():
    script = """
import importlib, pkgutil, torch, triton

def refuse(*args, **kwargs):
    raise AssertionError("a GPU was asked for")

for name in ("is_available", "device_count", "current_device", "get_device_properties",
             "get_device_capability", "get_device_name", "_lazy_init", "init"):
    setattr(torch.cuda, name, refuse)
type(triton.runtime.driver).active = property(refuse)
import lpt_kernels
for module in pkgutil.iter_modules(lpt_kernels.__path__):
    importlib.import_module(f"lpt_kernels.{module.name}")
print("imported")
"""
    done = run("-c", script)
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.slow
def test_says_why_not_in_the_interpreter():
    done = run("-m", "lpt_kernels.targets", "--check", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr


# --- the tool -------------------------------------------------------------------------------------


@triton.jit
def square_kernel(x_ptr, y_ptr, bias_ptr, n, D, scale, BLOCK: tl.constexpr, K: tl.constexpr):
    """y = scale x x^T (+ bias), of the first BLOCK rows."""
    i = tl.arange(0, BLOCK)
    k = tl.arange(0, K)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for j in range(0, D, K):
        a = tl.load(x_ptr + i[:, None] * D + (j + k)[None, :])
        b = tl.load(x_ptr + i[None, :] * D + (j + k)[:, None])
        acc = tl.dot(a, b, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + i)[None, :]
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], acc * scale, mask=(i < n)[:, None])


@triton.jit
def wrong_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), no_such_name)  # noqa: F821


def square(block=64, k=64, warps=4, stages=2, n=1, dtype=torch.bfloat16):
    x, y = meta(256, 1000, dtype=dtype), meta(256, 256)
    launch(
        square_kernel,
        (1,),
        x_ptr=x,
        y_ptr=y,
        bias_ptr=None,
        n=n,
        D=1024,
        scale=0.5,
        BLOCK=block,
        K=k,
        num_warps=warps,
        num_stages=stages,
    )


def survey_one(function, target="sm_90"):
    reports, failures = targets.survey({"it": function}, [target], jobs=1)
    assert not failures
    (report,) = reports
    return report


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("sm_80", "mma.bf16"),
        ("sm_90", "wgmma.bf16"),
        ("sm_100", "tcgen05.f16"),  # one name for both kinds of 16 bit
        ("gfx942", "mfma_f32_"),
    ],
)
def test_figures(target, instruction):
    report = survey_one(square, target)
    assert (report.kernel, report.case, report.target) == ("square_kernel", "it", target)
    assert report.tensor_cores.startswith(instruction)
    assert 16 < report.registers < 256 and report.shared >= 64 * 64 * 2
    assert report.spilled == 0 and not report.error and not report.failure()
    assert f"{report.registers}" in targets.table([report]).splitlines()[1].split()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_spill_is_a_failure(target):
    report = survey_one(partial(square, block=128, warps=1), target)
    assert report.spilled > 0
    assert report.failure().startswith(f"square_kernel (it) on {target}: spills {report.spilled}")


@triton.jit
def summing_kernel(x_ptr, y_ptr, s_ptr, D, BLOCK: tl.constexpr, K: tl.constexpr):
    """y = x^T x of 64 columns and the sums of the rows' columns, from one load."""
    i = tl.arange(0, BLOCK)
    k = tl.arange(0, K)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(0, D, K):
        a = tl.load(x_ptr + (j + k)[:, None] * BLOCK + i[None, :])
        b = tl.load(y_ptr + (j + k)[:, None] * BLOCK + i[None, :])
        acc = tl.dot(tl.trans(a), b, acc)
        total += tl.sum(a.to(tl.float32), axis=0)
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], acc)
    tl.store(s_ptr + i, total)


def test_a_buffer_that_is_filled_too_soon_is_a_failure():
    x, y = meta(4096, 64, dtype=torch.bfloat16), meta(4096, 64, dtype=torch.bfloat16)
    how = dict(x_ptr=x, y_ptr=y, s_ptr=meta(64), D=4096, BLOCK=64, K=64, num_stages=3)
    report = survey_one(lambda: launch(summing_kernel, (1,), **how))
    assert "filled again too soon" in report.failure()
    assert not survey_one(partial(square, stages=3)).race


def test_waves_and_bytes_in_flight():
    report = survey_one(square)
    assert report.programs == 1 and 0 < report.waves < 0.01
    # Two buffers each of [64, 64] bf16 for both factors; more where a product is waited for later.
    assert report.kb_in_flight * 1024 in (4 * 64 * 64 * 2, 6 * 64 * 64 * 2)
    assert hopper._size("3x64x128xbf16") == 3 * 64 * 128 * 2


def test_too_much_shared_memory_is_a_failure():
    report = survey_one(partial(square, block=128, k=128, warps=8, stages=5))
    assert report.shared > targets.TARGETS["sm_90"].shared == 232448
    assert f"needs {report.shared} bytes of shared memory, 232448 are there" in report.failure()


def test_what_does_not_compile_is_a_failure():
    report = survey_one(lambda: launch(wrong_kernel, (1,), x_ptr=meta(64), BLOCK=64))
    assert report.registers == 0 and "\n" not in report.error
    assert "no_such_name" in report.failure()


def test_cases_that_fail():
    def broken():
        raise ValueError("got x\nexpected y")

    cases = {"broken": broken, "empty": lambda: None, "good": square}
    variants, failures = targets.collect(cases, "sm_80")
    assert failures == [
        "broken on sm_80: ValueError expected y",
        "empty on sm_80: RuntimeError it launches no kernel",
    ]
    assert [v.case for v in variants] == ["good"]


def test_equal_launches_are_compiled_once():
    cases = {
        "first": square,
        "same": square,
        "other sizes": partial(square, n=17),
        "same again": partial(square, n=33),
        "divisible": partial(square, n=32),
        "other options": partial(square, warps=8),
        "other dtype": partial(square, dtype=torch.float16),
    }
    variants, _ = targets.collect(cases, "sm_90")
    kept = ["first", "other sizes", "divisible", "other options", "other dtype"]
    assert [v.case for v in variants] == kept


def test_specialised_as_the_jit_does():
    ((variant,), _) = targets.collect({"it": square}, "sm_90")
    source, options = targets.specialise(variant.launch, targets.TARGETS["sm_90"])
    assert source.signature == {
        "x_ptr": "*bf16",
        "y_ptr": "*fp32",
        "bias_ptr": "constexpr",  # None
        "n": "constexpr",  # 1
        "D": "i32",
        "scale": "fp32",
        "BLOCK": "constexpr",
        "K": "constexpr",
    }
    assert source.constants == {(2,): None, (3,): 1, (6,): 64, (7,): 64}
    divisible = {place for place, attrs in source.attrs.items() if attrs}
    assert divisible == {(0,), (1,), (4,)}
    assert options == {"num_warps": 4, "num_stages": 2}


def test_heuristics_see_the_targets_vendor():
    seen, version = {}, (torch.version.cuda, torch.version.hip)
    for target in targets.TARGETS:
        look = lambda t=target: seen.update({t: torch.version.hip is not None})  # noqa: E731
        targets.collect({"it": look}, target)
    assert seen == {"sm_80": False, "sm_90": False, "sm_100": False, "gfx942": True}
    assert version == (torch.version.cuda, torch.version.hip)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_crash_of_the_compiler_hits_one_kernel(monkeypatch):
    def compile_or_die(variant):
        if variant.case == "deadly":
            os._exit(139)
        return variant.report(registers=1)

    monkeypatch.setattr(targets, "compile_variant", compile_or_die)
    names = ["one", "deadly", "two", "three"]
    cases = {name: partial(square, warps=2**i) for i, name in enumerate(names)}
    reports, _ = targets.survey(cases, ["sm_90"], jobs=2)
    assert [r.case for r in reports] == names
    assert [r.error for r in reports] == ["", "the compiler crashed", "", ""]


def test_command_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(targets, "CASES", {"fine": square, "bad": partial(square, 128, warps=1)})
    monkeypatch.setattr(targets, "kernels", lambda: {"square_kernel": None, "lost_kernel": None})
    file = tmp_path / "out.json"
    command = ["--target", "sm_90", "--jobs", "1"]
    assert targets.main([*command, "--json", str(file)]) == 0  # no --check
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4 and "2 compilations" in out
    assert "FAILED lost_kernel: no case launches it" in err and "(bad) on sm_90: spills" in err
    assert [r["case"] for r in json.loads(file.read_text())] == ["fine", "bad"]
    assert targets.main([*command, "--check"]) == 1
    assert targets.main([*command, "--check", "--case", "fine"]) == 0
    assert targets.main([*command, "--check", "--kernel", "squ", "--case", "bad"]) == 1
    assert targets.main([*command, "--check", "--kernel", "nothing"]) == 1
