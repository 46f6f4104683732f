"""The generators by themselves: formulas, padding that holds NaN, precision, initialisation."""

from __future__ import annotations

import pytest
import torch

from lpt_fast import LPTConfig
from lpt_fast.method.config import GENERATORS
from lpt_fast.method.generators import build_generator
from tests.oracle import prompt_by_hand

D, R = 24, 16


def make(kind, m=5, causal=False, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    config = LPTConfig(generator=kind, num_virtual_tokens=m, bottleneck_size=R)
    return build_generator(config, D, dropout, causal)


def prompt(generator, hidden, tokens):
    """The prompt rows by themselves, [B, m, D]: they stand before each row's first token."""
    starts = tokens.int().argmax(1)
    rows = generator(hidden, tokens)
    m = generator.num_virtual_tokens
    return torch.stack([row[i : i + m] for row, i in zip(rows, starts.tolist(), strict=True)])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", GENERATORS)
def test_formula(kind, causal):
    generator = make(kind, causal=causal).double()
    hidden = torch.randn(4, 9, D, dtype=torch.float64)
    tokens = torch.arange(9) < torch.tensor([[9], [4], [1], [6]])
    weights = dict(generator.named_parameters())
    got = prompt(generator, hidden, tokens)
    for b in range(4):
        expected = prompt_by_hand(kind, weights, hidden[b][tokens[b]], 5, causal)
        torch.testing.assert_close(got[b], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", GENERATORS)
def test_padding_may_hold_anything(kind):
    """NaN and infinity in padding reach neither the prompt nor a gradient."""
    generator = make(kind)
    hidden = torch.randn(3, 6, D)
    tokens = torch.arange(6) < torch.tensor([[6], [2], [1]])
    clean = prompt(generator, hidden, tokens)
    clean.square().sum().backward()
    grads = [p.grad.clone() for p in generator.parameters()]
    generator.zero_grad()
    dirty = hidden.masked_fill(~tokens[..., None], float("nan"))
    dirty[1, 5] = float("inf")
    got = prompt(generator, dirty, tokens)
    torch.testing.assert_close(got, clean, atol=0, rtol=0)
    got.square().sum().backward()
    for p, grad in zip(generator.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", GENERATORS)
def test_half_precision_states(kind, dtype):
    """fp32 weights on half-precision states: the only error is the final rounding."""
    generator = make(kind)
    hidden = torch.randn(2, 7, D).to(dtype)
    tokens = torch.ones(2, 7, dtype=torch.bool)
    got = prompt(generator, hidden, tokens)
    assert got.dtype == dtype
    wide = prompt(generator, hidden.float(), tokens)
    torch.testing.assert_close(got, wide.to(dtype), atol=0, rtol=0)


def test_dropout_is_on_the_prompt():
    generator = make("npg", dropout=0.5).train()
    hidden, tokens = torch.randn(50, 4, D), torch.ones(50, 4, dtype=torch.bool)
    noisy = prompt(generator, hidden, tokens)
    plain = prompt(generator.eval(), hidden, tokens)
    kept = noisy != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(noisy[kept], 2 * plain[kept])


def test_initialisation_is_pytorchs_default():
    """Linear: uniform in +-1/sqrt(fan in), weight and bias. Embedding: standard normal."""
    torch.manual_seed(0)
    config = LPTConfig(generator="npg", num_virtual_tokens=10, bottleneck_size=64)
    generator = build_generator(config, 256, 0.0, False)
    for p, fan_in in (
        (generator.proj_down.weight, 256),
        (generator.proj_down.bias, 256),
        (generator.proj_up.weight, 64),
        (generator.proj_up.bias, 64),
    ):
        bound = fan_in**-0.5
        assert 0.85 * bound < p.abs().max() <= bound
        assert abs(p.std() / (bound / 3**0.5) - 1) < 0.15
    static = build_generator(LPTConfig(generator="static", num_virtual_tokens=40), 256, 0.0, False)
    weight = static.prompt_embedding.weight
    assert abs(weight.std() - 1) < 0.05 and abs(weight.mean()) < 0.05


def test_fold():
    generator = make("residual")
    static = generator.fold()
    hidden, tokens = torch.randn(2, 4, D), torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(static(hidden, tokens), generator(hidden, tokens))
    assert [n for n, _ in static.named_parameters()] == ["prompt_embedding.weight"]
