"""LPTTrainer's `compute_dtype`: who decides, what a checkpoint says, what runs in bf16."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from lpt_fast import ActivationCache, LPTTrainer
from lpt_fast.train import compute_dtype
from lpt_fast.train.compute_dtype import bf16_gain, choose, has_bf16, parse
from lpt_fast.train.trainer import find_late_prompt
from lpt_fast.train.training_record import FILE
from tests.train.cases import Seen, Stop, arguments, collate, model_of, rows, trained

BF16 = torch.bfloat16


@pytest.fixture
def gain(monkeypatch):
    """What the self-test finds; tiny layers are not tested."""
    found = {"gain": 2.0}
    monkeypatch.setattr(compute_dtype, "gain_of", lambda layer: found["gain"])
    return found


def trainer_of(folder, model=None, *callbacks, cache=None, **settings) -> LPTTrainer:
    own = {n: settings.pop(n) for n in ("compute_dtype", "hold_projections") if n in settings}
    return LPTTrainer(
        model_of() if model is None else model,
        arguments(folder, **settings),
        collate,
        rows(),
        callbacks=list(callbacks),
        activation_cache=cache,
        **own,
    )


class Watching(Seen):
    """Also in what the layers run."""

    def __init__(self):
        super().__init__()
        self.dtypes: set = set()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.dtypes.add(find_late_prompt(model).compute_dtype)


def run(folder, **settings):
    model, seen = settings.pop("model", None) or model_of(), Watching()
    trainer_of(folder, model, seen, **settings).train()
    late = find_late_prompt(model)
    assert late.compute_dtype is None and late._copy is None  # not after the training
    return trained(model), seen


def test_names():
    assert parse(None) is parse("auto") is None
    assert parse("bf16") is parse("bfloat16") is parse(BF16) is BF16
    assert parse("fp32") is parse("float32") is parse(torch.float32) is torch.float32
    for wrong in ("int8", torch.float16, 3, ""):
        with pytest.raises(ValueError, match="bfloat16"):
            parse(wrong)
    with pytest.raises(ValueError, match="got|is 'half'"):
        trainer_of("out", compute_dtype="half")


def test_who_decides(gain, tmp_path, caplog):
    _, seen = run(tmp_path, compute_dtype="float32")
    assert seen.dtypes == {None}
    with caplog.at_level(logging.INFO, logger="lpt_fast"):
        fast, other = run(tmp_path)
    assert other.dtypes == {BF16}
    said = [r.getMessage() for r in caplog.records if "bfloat16" in r.getMessage()]
    assert len(said) == 1 and "2.0 times" in said[0]
    # Other numbers, and the same training; what trains is in fp32.
    assert other.losses == pytest.approx(seen.losses, abs=0.02) and other.losses != seen.losses
    assert {p.dtype for p in fast.values()} == {torch.float32}
    asked, third = run(tmp_path, compute_dtype="bf16")
    assert third.losses == other.losses
    assert all(torch.equal(p, asked[n]) for n, p in fast.items())
    gain["gain"] = 1.1  # not worth it
    assert run(tmp_path)[1].losses == seen.losses
    # Somebody's own bf16 goes the same way, without a test.
    assert run(tmp_path, bf16=True)[1].dtypes == {BF16}
    assert run(tmp_path, bf16=True, compute_dtype="float32")[1].dtypes == {None}


def test_models_that_cannot(gain, tmp_path):
    late = find_late_prompt(model_of("t5"))
    assert choose(late, None, None) is None
    with pytest.raises(ValueError, match="BertModel.*Leave it out"):
        trainer_of(tmp_path, model_of("t5"), compute_dtype="bf16")
    padded = model_of()
    find_late_prompt(padded).upper = "padded"
    with pytest.raises(ValueError, match="upper is 'padded'"):
        trainer_of(tmp_path, padded, compute_dtype="bf16")
    half = model_of().to(BF16)
    assert choose(find_late_prompt(half), None, None) is None
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        trainer_of(tmp_path, half, compute_dtype="bf16")
    assert choose(find_late_prompt(model_of()), None, torch.float16) is None
    sharded = trainer_of(tmp_path, compute_dtype="bf16")
    sharded.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="shards of its weights"):
        sharded._check_arguments()


def test_the_self_test():
    """Less than a second; a narrow layer is none, nor a processor without instructions."""
    assert bf16_gain(64, 32, 1) == 0
    gain = bf16_gain(512, 256, torch.get_num_threads())
    assert gain > 0 if has_bf16() else gain == 0


def test_a_processor_without(monkeypatch, tmp_path):
    monkeypatch.setattr(compute_dtype.Path, "read_text", lambda self: "flags : avx2 avx512f fma")
    for function in (has_bf16, bf16_gain):
        function.cache_clear()
    try:
        assert not has_bf16() and bf16_gain(512, 256, 1) == 0
        assert run(tmp_path)[1].dtypes == {None}
    finally:
        for function in (has_bf16, bf16_gain):
            function.cache_clear()


@pytest.mark.parametrize("family", ["bert", "qwen3"])
@pytest.mark.parametrize("updates", [{}, {"lora_r": 2}], ids=["prompt", "both"])
def test_from_the_cache_as_from_the_text(gain, family, updates, tmp_path):
    """Rows in bf16 are those that the layers below give, rounded; held projections change no bit;
    evaluation runs so too.
    """
    ends, losses = [], []
    for i, how in enumerate(
        (
            {"cache": tmp_path / "cache", "hold_projections": False},
            {"cache": tmp_path / "cache", "hold_projections": True},
            {},
        )
    ):
        seen = Watching()
        model = model_of(family, **updates)
        trainer = trainer_of(tmp_path / f"{i}", model, seen, **how)
        trainer.train()
        assert seen.dtypes == {BF16}
        ends.append(trained(model))
        losses.append([*seen.losses, trainer.evaluate(rows(16, seed=1))["eval_loss"]])
    assert losses[0] == losses[1]
    assert all(torch.equal(p, ends[1][n]) for n, p in ends[0].items())
    assert losses[2] == pytest.approx(losses[0], abs=0.03)


def test_the_cache_is_filled_in_bf16_too(gain, tmp_path):
    run(tmp_path, cache=tmp_path / "cache")
    filled = ActivationCache.open(tmp_path / "cache", model_of(), compute_dtype="bfloat16")
    assert filled.rows(rows()).shape == (32,)
    assert len(ActivationCache.open(tmp_path / "cache", model_of())) == 0
    # One that is there serves as it is.
    other = ActivationCache.open(tmp_path / "other", model_of())
    other.ensure(model_of(), rows())
    _, seen = run(tmp_path, cache=tmp_path / "other")
    assert seen.dtypes == {BF16}
    again = ActivationCache.open(tmp_path / "other", model_of())
    assert len(again) == 32
    assert len(ActivationCache.open(tmp_path / "other", model_of(), compute_dtype="bfloat16")) == 0


@pytest.mark.slow
def test_a_resumed_training_goes_on_as_it_began(gain, tmp_path):
    """Bit for bit, on a machine that would have chosen otherwise too."""
    settings = {"cache": tmp_path / "cache", "save_strategy": "steps", "save_steps": 4}
    whole, _ = run(tmp_path / "whole", **settings)
    stopped = model_of()
    trainer_of(tmp_path / "part", stopped, Stop(4), **settings).train()
    checkpoint = tmp_path / "part" / "checkpoint-4"
    assert json.loads((checkpoint / FILE).read_text())["compute_dtype"] == "bfloat16"
    gain["gain"] = 0.0
    model, seen = model_of(), Watching()
    again = trainer_of(tmp_path / "part", model, seen, **settings)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert seen.dtypes == {BF16}
    assert all(torch.equal(p, whole[n]) for n, p in trained(model).items())
    with pytest.raises(ValueError, match="other compute_dtype"):
        trainer_of(tmp_path / "part", None, compute_dtype="float32", **settings).train(
            resume_from_checkpoint=str(checkpoint)
        )
