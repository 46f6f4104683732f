"""Packed layers in bf16 beside a model in fp32 (packed/compute.py)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lpt_fast.backbone.families import find_backbone, get_layers
from tests.method.cases import M, cached
from tests.packed.cases import labels_for, outcome, pair, still
from tests.packed.test_late_lora import adapted
from tests.packed.test_packed import DECODERS, ENCODERS
from tests.tiny import batch

BF16 = torch.bfloat16
LORA = {"lora_r": 2, "lora_target_modules": "all-linear"}
HOW = {"npg": {}, "both": {"generator": "mppg", **LORA}, "alone": {"generator": "none", **LORA}}


def late_of(model):
    return find_backbone(model)[1].late_prompt


def by_place(outcome) -> dict[str, torch.Tensor]:
    """The value, and gradients as one vector for each part, in fp64: single small matrices are off
    by more than twice each other by chance."""
    places: dict = {"lpt_generator": [], "lpt_lora": [], "head": []}
    for name, grad in sorted(outcome[2].items()):
        place = next((p for p in places if p in name), "head")
        places[place].append(grad.double().flatten())
    parts = {place: torch.cat(found) for place, found in places.items() if found}
    return parts | {"value": outcome[0].double().flatten()}


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("head", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_the_error_rule(family, head, how):
    """At most twice as far from fp64 as the model's own code in bf16."""
    config, inputs = HOW[how], batch(lengths=(9, 4, 7, 1, 3))
    room, labels = 0 if how == "alone" else M, labels_for(head, inputs)
    at = None if head == "SEQ_CLS" else inputs["attention_mask"].bool()
    base, model = adapted(family, head, **{"lora_r": None, **config})
    rows = cached(base, inputs, room=room)
    rows = rows.to("cpu").to(BF16)  # as a cache keeps them: the same inputs for all
    exact = still(pair(family, head, torch.float64, **config)[1])
    exact.load_state_dict(model.state_dict())
    truth = by_place(outcome(exact, "packed", at, cached_hidden=rows.to(torch.float64), **labels))
    half = copy.deepcopy(model).to(BF16)  # as PEFT leaves one that is loaded so
    late_of(half).lpt_generator.float()
    late_of(half).lpt_lora.float()
    peer = by_place(outcome(half, "padded", at, cached_hidden=rows, **labels))
    late_of(model).compute_dtype = BF16
    found = by_place(outcome(model, "packed", at, cached_hidden=rows, **labels))
    assert found.keys() == truth.keys() == peer.keys()
    for name, value in truth.items():
        errors = [float((x[name] - value).norm()) for x in (found, peer)]
        assert errors[0] <= 2 * errors[1] + 2**-8 * float(value.norm()), (name, errors)


@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "qwen3"])
def test_the_model_stays_as_it_is(family):
    inputs = batch()
    model = still(pair(family, "SEQ_CLS")[1])
    late, before = late_of(model), {n: p.clone() for n, p in model.state_dict().items()}
    expected = outcome(model, "packed", **inputs)
    late.compute_dtype = BF16
    got = outcome(model, "packed", **inputs)
    assert not torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[0], expected[0], atol=0.1, rtol=0.1)
    assert got[0].dtype == torch.float32 and {g.dtype for g in got[2].values()} == {torch.float32}
    assert got[2].keys() == expected[2].keys()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(p, after[n]) and p.dtype == after[n].dtype for n, p in before.items())
    assert late_of(copy.deepcopy(model))._copy is None
    late.compute_dtype = None
    assert late._copy is None
    assert torch.equal(outcome(model, "packed", **inputs)[0], expected[0])


class Products(TorchDispatchMode):
    """Shapes of the large products in bf16, and how many are of groups of texts."""

    def __init__(self):
        super().__init__()
        self.rows: set[int] = set()
        self.grouped = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        mats = [x for x in args if isinstance(x, torch.Tensor) and x.dtype == BF16]
        if name in ("mm", "addmm", "addmm_") and mats:
            self.rows |= {max(x.shape[0] for x in mats if x.dim() == 2)}
        if name == "mkldnn::_linear_pointwise":
            self.rows |= {len(args[0])}
        self.grouped += bool(mats) and name in ("bmm", "baddbmm", "baddbmm_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "qwen3"])
def test_batches_share_their_products(family, how):
    """Of whatever numbers of tokens: oneDNN compiles each size by itself."""
    model = still(pair(family, "SEQ_CLS", k=1, **HOW[how])[1])
    late_of(model).compute_dtype = BF16
    seen = []
    for lengths in ((9, 4, 7, 1, 3), (9, 9, 8, 4, 2)):
        with Products() as products:
            outcome(model, "packed", **batch(lengths=lengths))
        assert products.grouped == 0
        seen.append({n for n in products.rows if n > 20})
    assert seen[0] == seen[1] and 64 in seen[0] and len(seen[0]) <= 3, seen


def test_changed_weights_are_cast_again():
    inputs = batch()
    model = still(pair("bert", "SEQ_CLS")[1])
    late = late_of(model)
    late.compute_dtype = BF16
    first = outcome(model, "packed", **inputs)[0]
    kept = late._copy
    assert torch.equal(outcome(model, "packed", **inputs)[0], first) and late._copy is kept
    with torch.no_grad():
        get_layers(late.backbone, late.family)[-1].output.dense.weight.mul_(2)
    changed = outcome(model, "packed", **inputs)[0]
    assert late._copy is not kept and not torch.equal(changed, first)
    late.compute_dtype = None
    torch.testing.assert_close(outcome(model, "packed", **inputs)[0], changed, atol=0.1, rtol=0.1)


def test_under_autocast_layers_compute_the_same():
    """Nothing is cast that is in the dtype already; the head runs as the caller says."""
    inputs = batch()
    model = still(pair("bert", "base")[1])
    late_of(model).compute_dtype = BF16
    expected = outcome(model, "packed", inputs["attention_mask"].bool(), **inputs)
    rows = cached(pair("bert", "base")[0], inputs, room=M)
    plain = model(cached_hidden=rows).last_hidden_state
    with torch.autocast("cpu", BF16):
        cast = model(cached_hidden=rows).last_hidden_state
    # (The generator runs under autocast.)
    torch.testing.assert_close(cast, plain, atol=0.05, rtol=0.05)
    assert expected[0].dtype == torch.float32


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "qwen3"])
def test_backward_under_autocast(family, how):
    """PyTorch advises against it; it is no error, and gives what backward outside gives."""
    inputs = batch()
    model = still(pair(family, "SEQ_CLS", k=1, **HOW[how])[1])
    late_of(model).upper = "packed"
    found = []
    for within in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = model(**inputs).logits.square().sum()
            if within:
                loss.backward()
        if not within:
            loss.backward()
        found.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert (found[0] - found[1]).norm() <= 0.02 * found[1].norm()
