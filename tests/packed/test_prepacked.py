"""Frozen bf16 weights that are arranged once: both products, and where they are used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lpt_fast.backbone.families import find_backbone
from lpt_fast.packed import ops, prepacked
from lpt_fast.packed.prepacked import Prepacked, prepack
from tests.packed.cases import outcome, pair, still
from tests.tiny import batch

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not prepacked.known(), reason="not in this PyTorch")


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(BF16)


def near(got, expected):
    """Sums are in fp32 and rounded once: half a unit in the last place, and a little for sums in
    another order.
    """
    expected = expected.double()
    bound = 2**-8 * expected.abs() + 2**-14 * expected.abs().max()
    assert got.dtype == BF16 and ((got.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("rows", [1, 64, 129, 1100])
@pytest.mark.parametrize("bias", [True, False])
def test_both_products(rows, bias):
    w, b = drawn(37, 48, seed=1), drawn(37, seed=2) if bias else None
    x, g, y = drawn(rows, 48, seed=3), drawn(rows, 37, seed=4), drawn(rows, 48, seed=5)
    packed = Prepacked(w, b)
    near(packed.forward(x), x.double() @ w.double().t() + (b.double() if bias else 0))
    back = g.double() @ w.double()
    near(packed.backward(g), back)
    kept = y.clone()
    near(packed.backward(g, y), back + y.double())
    assert torch.equal(y, kept)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_layer_with_its_gradient(kind):
    """As the layer without; an expanded gradient too, and none where nothing trains."""
    layer = (nn.Linear(48, 37) if kind == "linear" else Conv1D(37, 48)).to(BF16)
    layer.requires_grad_(False)
    layer.bias.copy_(drawn(37))
    x = drawn(70, 48).requires_grad_()
    expected = layer(x)
    (wanted,) = torch.autograd.grad(expected.float().sum(), x)
    prepack([layer, nn.LayerNorm(48)], BF16)
    assert prepacked.of(layer, x) is not None and prepacked.of(layer, x.float()) is None
    got = ops.linear(layer, x)
    near(got, expected.float())
    (grad,) = torch.autograd.grad(got.float().sum(), x)
    near(grad, wanted.float())
    assert ops.linear(layer, x.detach()).grad_fn is None
    with torch.no_grad():
        assert ops.linear(layer, x).grad_fn is None


def test_other_dtypes_stay_as_they_are(monkeypatch):
    layer = nn.Linear(8, 8)
    prepack([layer], torch.float32)
    assert prepacked.of(layer, torch.randn(3, 8)) is None
    monkeypatch.setattr(prepacked, "known", lambda: False)
    layer.to(BF16)
    prepack([layer], BF16)
    assert prepacked.of(layer, drawn(3, 8)) is None


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_weights_that_change_afterwards(kind):
    """Written to, or another tensor: what the layer holds counts, arranged or not."""
    layer = (nn.Linear(48, 37) if kind == "linear" else Conv1D(37, 48)).to(BF16)
    layer.requires_grad_(False)
    prepack([layer], BF16)
    x = drawn(70, 48)
    before = ops.linear(layer, x)
    assert prepacked.of(layer, x) is not None
    copied = copy.deepcopy(layer)
    assert prepacked.of(copied, x) is None and torch.equal(copied(x), layer(x))
    layer.weight.mul_(2).add_(1)
    assert prepacked.of(layer, x) is None
    assert torch.equal(ops.linear(layer, x), layer(x)) and not torch.equal(before, layer(x))
    prepack([layer], BF16)
    assert prepacked.of(layer, x) is not None
    near(ops.linear(layer, x), layer(x).float())
    layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)
    assert prepacked.of(layer, x) is None
    prepack([layer], BF16)
    layer.weight = nn.Parameter(layer.weight * 3, requires_grad=False)
    assert prepacked.of(layer, x) is None


def test_operators_that_are_gone_or_wrong(monkeypatch):
    prepacked.known.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(prepacked, "_arranged", lambda weight: missing())
            assert not prepacked.known()
        prepacked.known.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(Prepacked, "backward", lambda self, g, other=None: g @ self._weight * 2)
            assert not prepacked.known()
    finally:
        prepacked.known.cache_clear()
    assert prepacked.known()


def missing():
    return torch.ops.mkldnn.no_such_operator()


@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "llama"])
def test_in_layers_that_compute_in_bf16(family, monkeypatch):
    """Used in both directions, and as near as without."""
    calls = []
    for name in ("forward", "backward"):
        own = getattr(Prepacked, name)
        monkeypatch.setattr(
            Prepacked,
            name,
            lambda self, *a, name=name, own=own: calls.append(name) or own(self, *a),
        )
    results = []
    for known in (True, False):
        monkeypatch.setattr(prepacked, "known", lambda known=known: known)
        model = still(pair(family, "SEQ_CLS", k=1)[1])
        find_backbone(model)[1].late_prompt.compute_dtype = BF16
        results.append(outcome(model, "packed", **batch()))
        assert (set(calls) == {"forward", "backward"}) == known
        calls.clear()
    (value, _, grads), (plain, _, others) = results
    torch.testing.assert_close(value, plain, atol=3e-2, rtol=3e-2)
    whole, wanted = (torch.cat([g.flatten() for g in x.values()]) for x in (grads, others))
    assert (whole - wanted).norm() <= 5e-2 * wanted.norm()
