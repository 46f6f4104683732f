"""What `bench train` computes, by hand: payback, targets, operations, errors, batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.data import Figure, WrongResult
from bench.train.data import padding_ratio, plan_batches
from bench.train.flops import necessary_flops
from bench.train.gate import errors
from bench.train.targets import TARGETS, payback, target_of

# -- by hand ---------------------------------------------------------------------------------------


def test_payback():
    assert payback(12.0, 10.0, 4.0) == 2.0
    assert payback(12.0, 4.0, 4.0) == payback(12.0, 3.0, 4.0) == float("inf")
    assert Figure("payback", "never", float("inf")).to_json()["value"] is None


def test_targets():
    assert target_of("minilm", 3, "cpu", "fp32", "recipe") == 3.4
    assert target_of("minilm", 3, "cpu", "fp32", "lora") == 5
    assert target_of("minilm", 4, "cpu", "fp32", "recipe") == 5.5
    assert target_of("minilm", 4, "cpu", "fp32", "lora") == 8
    assert target_of("roberta-base", 9, "cpu", "fp32", "recipe") == 6.5
    assert target_of("roberta-base", 9, "cpu", "fp32", "lora") == 10
    assert target_of("roberta-large", 12, "cuda", "bf16", "recipe") == 3
    assert target_of("roberta-large", 18, "cuda", "bf16", "recipe") == 6
    for nothing in (
        ("roberta-large", 12, "cuda", "bf16", "lora"),
        ("roberta-large", 12, "cuda", "bf16", "recipe_bf16"),
        ("roberta-large", 12, "cuda", "fp32", "recipe"),
        ("minilm", 3, "cpu", "bf16", "recipe"),
        ("minilm", 2, "cpu", "fp32", "recipe"),
    ):
        assert target_of(*nothing) is None
    assert len(TARGETS) == 5


def test_flops_by_hand():
    """D = 4, two heads, one prompt row; texts of 2 and 3 tokens, so 3 and 4 rows."""
    shape = {"m": 1, "width": 4, "heads": 2, "layers": 3}
    full = 3 * (24 * 16 + 4 * 3 * 4) + 4 * (24 * 16 + 4 * 4 * 4)
    read = 2 * 24 * 16 + 4 * 2 * 4 * (3 + 4)
    # Backward of the first layer: output projection and feed-forward of all rows, the rest of one.
    first = 7 * (2 + 16) * 16 + (6 * 16 + 4 * 3 * 4) + (6 * 16 + 4 * 4 * 4)
    lengths = np.array([2, 3])
    assert necessary_flops(lengths, k=1, cached=True, **shape) == full + read + first + read
    held = necessary_flops(lengths, k=1, cached=True, held=True, **shape)
    assert held == full + read + first + read - 6 * 4**2 * int(lengths.sum())
    lower = 2 * (24 * 16 + 4 * 2 * 4) + 3 * (24 * 16 + 4 * 3 * 4)
    assert necessary_flops(lengths, k=1, cached=False, **shape) == 7392 + lower
    four = {**shape, "layers": 4}
    assert necessary_flops(lengths, k=1, cached=True, **four) == 7392 + 2 * full
    # One layer above: its one row, whose state before it is a constant.
    last = 2 * 20 * 16 + 2 * 4 * 2 * 4 * 1
    assert necessary_flops(lengths, k=2, cached=True, **shape) == read + last


def test_errors_by_hand():
    wanted = {
        "late_prompt.lpt_generator.w": torch.tensor([3.0, 4.0]),
        "classifier.w": torch.tensor([1.0]),
    }
    own = {
        "late_prompt.lpt_generator.w": torch.tensor([3.0, 4.5]),
        "classifier.w": torch.tensor([1.2]),
    }
    found = errors("x", (2.1, own), (2.0, wanted))
    assert found == pytest.approx({"loss": 0.05, "generator": 0.1, "head": 0.2})
    with pytest.raises(WrongResult, match="other parameters train"):
        errors("x", (2.0, own), (2.0, {"classifier.w": wanted["classifier.w"]}))
    with pytest.raises(WrongResult, match="not finite"):
        errors("x", (float("nan"), own), (2.0, wanted))


def test_batches():
    lengths = np.array([3, 1, 2, 5, 4, 2, 1])
    chosen = plan_batches(lengths, 5, 3, seed=1)
    assert [len(rows) for rows in chosen] == [3] * 5
    assert all(len(set(rows.tolist())) == 3 for rows in chosen)
    again = plan_batches(lengths, 5, 3, seed=1)
    assert all((a == b).all() for a, b in zip(chosen, again, strict=True))
    for rows in plan_batches(lengths, 9, 32, tokens=8):
        assert 8 - 5 < lengths[rows].sum() <= 8
    (large,) = plan_batches(lengths, 1, 32, tokens=100)
    assert 95 < lengths[large].sum() <= 100
    assert padding_ratio(lengths, [np.array([0, 1]), np.array([3])]) == (2 * 3 + 5) / (4 + 5)
