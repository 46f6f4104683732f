"""How much a cached, packed training step launches on a GPU, counted without one.

The step runs on the device "meta": PyTorch's operations are counted where they are dispatched, our
own kernels where they are started. Ways that only CUDA takes are chosen by hand.
"""

from __future__ import annotations

import pytest
import torch
from lpt_kernels import launch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification, RobertaConfig

from lpt_fast.backbone.families import find_backbone, get_layers
from lpt_fast.insertion import api
from lpt_fast.insertion import ops as insertion_ops
from lpt_fast.packed import attention as packed_attention
from lpt_fast.packed import block as packed_block
from lpt_fast.packed import ops as packed_ops
from lpt_fast.packed import stack as packed
from lpt_fast.packed.last_layer import attend_one, attend_one_absorbed, pick
from lpt_fast.packed.plan import Plan
from lpt_fast.packing import PackedBatch
from tests.adapters import lpt

VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "detach"),
    *("squeeze", "alias", "as_strided", "permute", "empty", "empty_like", "new_empty", "unbind"),
    *("empty_strided", "new_empty_strided", "is_same_size", "split", "_reshape_alias", "view_as"),
}
SEVERAL = {"_flash_attention_backward": 3, "native_dropout": 1, "select_backward": 2}
OWN = {
    "lpt_fast::insert_prompt_into": insertion_ops._into,
    "lpt_fast::insert_prompt_bwd": insertion_ops._bwd,
}


class Count(TorchDispatchMode):
    """Counts kernels of PyTorch's; operators of ours are run, for what they start."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name in OWN:
            with self:
                return OWN[name](*args, **kwargs)
        name = name.removeprefix("aten::")
        out = func(*args, **kwargs)
        if name not in VIEWS and any(isinstance(t, torch.Tensor) for t in tree_leaves(out)):
            self.names += [name] * SEVERAL.get(name, 1)
        return out


def varlen(q, k, v, plan, *, heads, kv_heads, scale, causal, prompt_only=False, bias=None):
    assert bias is None
    return packed_attention._by_varlen(q, k, v, plan, heads, kv_heads, scale, causal)


@pytest.fixture
def as_on_cuda(monkeypatch):
    for module in (packed_ops, api):
        monkeypatch.setattr(module, "choose_impl", lambda impl, x: "triton")
    monkeypatch.setattr(packed_block, "attend", varlen)


def roberta_large():
    """In shape and number of layers, but narrow."""
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=24,
        num_attention_heads=4,
        intermediate_size=128,
        pad_token_id=1,
    )
    base = AutoModelForSequenceClassification.from_config(config)
    how = {"insertion_layer": 18, "generator": "npg", "upper": "packed"}
    model = get_peft_model(base, lpt(task_type="SEQ_CLS", **how)).train()
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    return model.to("meta")


def cached(model, lengths=(9, 4, 7, 1)):
    T, B, m = sum(lengths), len(lengths), 3
    return PackedBatch(
        torch.empty(T + B * m, 64, dtype=torch.bfloat16, device="meta"),
        torch.empty(B + 1, dtype=torch.int32, device="meta"),
        max(lengths),
        room=m,
        input_ids=torch.empty(T, dtype=torch.int64, device="meta"),
        layer=18,
    )


def test_launches_of_a_step(as_on_cuda):
    """305 and more before: each use of a row added its gradient by itself, and so on."""
    model = roberta_large()
    batch, labels = cached(model), torch.empty(4, dtype=torch.int64, device="meta")
    with launch.record() as kernels, Count() as count:
        loss = model(cached_hidden=batch, labels=labels).loss
        forward = len(kernels) + len(count.names)
        loss.backward()
    total = len(kernels) + len(count.names)
    assert total < 200, (forward, sorted(count.names), [k.name for k in kernels])
    assert len(kernels) >= 36  # so they did run that way
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in trained)


@pytest.mark.parametrize("way", ["absorbed", "rotary"])
@pytest.mark.parametrize("causal", [False, True])
def test_one_group_in_the_order_of_the_batch(monkeypatch, way, causal):
    """How a GPU, which does not sort, computes the last layer; on the CPU, against sorted texts."""
    lengths, m, heads, D = (5, 9, 1, 6, 6), 2, 2, 8
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = sum(lengths) + m * len(lengths)
    torch.manual_seed(0)
    own = {"dtype": torch.float64}  # (sums of another order)
    x, q = torch.randn(rows, D, **own), torch.randn(len(lengths), D, **own)
    w_k, w_v, b_v = (torch.randn(*n, **own) for n in ((D, D), (D, D), (D,)))
    place = torch.tensor([4, 3, 0, 2, 5])

    def run(is_sorted):
        monkeypatch.setattr(Plan, "sorted", property(lambda plan: is_sorted))
        plan = Plan(ends, max(lengths), m, rows)
        own, query = x.clone().requires_grad_(), q.clone().requires_grad_()
        how = {"heads": heads, "scale": 0.5, "causal": causal, "place": place}
        if way == "absorbed":
            places, picked = pick(own, plan.readout_rows(place), plan)
            out = attend_one_absorbed(query, places, w_k, w_v, b_v, plan, **how) + picked
        else:
            out = attend_one(query, own @ w_k, own @ w_v, plan, kv_heads=heads, **how)
        out.square().sum().backward()
        return out, own.grad, query.grad, plan.to_rows, plan.from_places(own[plan.to_places])

    for got, want in zip(run(False)[:3], run(True)[:3], strict=True):
        torch.testing.assert_close(got, want)
    for is_sorted in (False, True):
        *_, back = run(is_sorted)
        assert torch.equal(back, x)


@pytest.mark.parametrize("longest, size", [(6, 8), (7, 16), (14, 16)])
def test_a_gpu_has_rows_in_eights(monkeypatch, longest, size):
    """Products of other sizes read number by number there; each row's place is counted by hand."""
    monkeypatch.setattr(Plan, "sorted", property(lambda plan: False))
    plan = Plan(torch.tensor([0, 1, 5, 8], dtype=torch.int32), longest, 2, 14)
    assert (plan.size, plan.places, plan.longest) == (size, 3 * size, longest)
    # Texts of 3, 6 and 5 rows, prompts included.
    places = [*range(3), *range(size, size + 6), *range(2 * size, 2 * size + 5)]
    assert plan.to_rows.tolist() == places
    assert plan.to_places[plan.to_rows].tolist() == list(range(14))
    x = torch.full((plan.places, 1), float("nan"))
    x[places] = torch.arange(14.0)[:, None]  # (Nothing of what stands at padding comes back.)
    assert plan.from_places(x).flatten().tolist() == list(range(14))


def test_branches_of_frozen_layers():
    """As by PyTorch's own layers; the gradient of x is written once."""
    torch.manual_seed(0)
    linears = [torch.nn.Linear(4, n).requires_grad_(False) for n in (3, 5)]
    linears.append(torch.nn.Linear(4, 2, bias=False).requires_grad_(False))
    x = torch.randn(6, 4)

    def run(own, unused=()):
        given = x.clone().requires_grad_()
        if own:
            kept, *made = packed_ops.branches(given, *linears, keep=True)
        else:
            kept, *made = given, *(m(given) for m in linears)
        kept = torch.tanh(kept)
        used = [t.square().sum() for i, t in enumerate((kept, *made)) if i not in unused]
        sum(used).backward()
        return given.grad

    for unused in ((), (0,), (1, 3), (0, 2)):
        torch.testing.assert_close(run(True, unused), run(False, unused))
    again = x.clone().requires_grad_()
    out = packed_ops.branches(again, *linears, keep=True)
    total = sum(t.square().sum() for t in out)
    (first,) = torch.autograd.grad(total, again, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, again)[0], first)


def test_own_half(monkeypatch):
    """Autocast is off only where it would cast nothing."""
    monkeypatch.setattr(packed, "fused", lambda x: True)
    model = roberta_large()
    _, backbone, family = find_backbone(model)
    rows = torch.zeros(2, 64, dtype=torch.bfloat16)

    def own(rows=rows):
        return packed.own_half(backbone, family, 18, rows)

    for watched in (False, True):
        if watched:
            late = backbone.late_prompt
            assert packed.why_padded(backbone, family, 18, 9, False, late.plain) is None
        assert own() and not own(rows.float()) and not own(rows.half())
        with torch.autocast("cpu", torch.bfloat16):
            assert own()
        with torch.autocast("cpu", torch.float16):
            assert not own()
        norm = get_layers(backbone, family)[20].output.LayerNorm
        for dtype, wanted in ((torch.float32, False), (torch.bfloat16, True)):
            norm.bias.data = norm.bias.data.to(dtype)
            assert own() == wanted
    monkeypatch.setattr(packed, "fused", lambda x: False)
    assert not own()
