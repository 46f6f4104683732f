"""Prompt insertion without a GPU: the door, and the forms of the operator on plain PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lpt_fast.insertion import (
    gather_insert_prompt,
    insert_prompt,
    insert_prompt_,
    insert_prompt_padded,
)
from tests.insertion.cases import KINDS, by_hand, lengths_to_cu, make_hidden, make_weights

LENGTHS, D, R, M = [3, 1, 17, 8], 24, 16, 5


def arguments(kind="appg", dtype=torch.float64):
    hidden, weights = make_hidden(LENGTHS, D, dtype), make_weights(kind, D, R, M, dtype)
    return hidden, lengths_to_cu(LENGTHS), kind, weights, M


@pytest.mark.parametrize("kind", KINDS)
def test_packed(kind):
    got = insert_prompt(*arguments(kind))
    expected = by_hand(arguments(kind)[0], LENGTHS, *arguments(kind)[2:])
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_in_place(kind):
    """Only the gaps are written, and the generator's gradients are those of the packed form."""
    hidden, cu, _, weights, m = arguments(kind)
    weights = {name: w.requires_grad_() for name, w in weights.items()}
    whole = insert_prompt(hidden, cu, kind, weights, m)
    grads = torch.autograd.grad(whole.square().sum(), list(weights.values()))
    buffer = whole.detach().clone()
    for b, start in enumerate(cu[:-1].tolist()):
        buffer[start + b * m : start + (b + 1) * m] = float("nan")
    given = buffer
    filled = insert_prompt_(buffer, cu, kind, weights, m)
    assert filled.data_ptr() == given.data_ptr()
    torch.testing.assert_close(filled, whole, atol=0, rtol=0)
    again = torch.autograd.grad(filled.square().sum(), list(weights.values()))
    for a, b in zip(again, grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded(kind, side):
    """The packed answer, example by example, before each row's first token."""
    hidden, cu, _, weights, m = arguments(kind)
    S = 20
    padded = torch.full((len(LENGTHS), S, D), float("nan"), dtype=hidden.dtype)
    mask = torch.zeros(len(LENGTHS), S, dtype=torch.long)
    torch.manual_seed(0)
    for b, n in enumerate(LENGTHS):
        place = torch.arange(n)
        if side == "left":
            place += S - n
        if side == "holes":
            place = torch.randperm(S)[:n].sort().values
        padded[b, place] = hidden[cu[b] : cu[b + 1]]
        mask[b, place] = 1
    rows, longer = insert_prompt_padded(padded, mask, kind, weights, m)
    packed = insert_prompt(hidden, cu, kind, weights, m)
    torch.testing.assert_close(rows[longer.bool()], packed, atol=1e-12, rtol=1e-12)
    assert longer.sum() == len(packed) and rows[~longer.bool()].isnan().all()


def test_from_a_cache_in_plain_pytorch():
    """All stores, against gathering by hand; also where no Triton kernel can run."""
    gather = pytest.importorskip("lpt_kernels.gather")
    lengths = [4, 1, 9]
    store_cu = lengths_to_cu(lengths).long()
    torch.manual_seed(0)
    floats = torch.randn(14, D)
    token, channel = torch.rand(14) + 0.5, torch.rand(D) + 0.5
    codes = torch.randint(-127, 128, (14, D), dtype=torch.int8)
    fp8 = floats.to(torch.float8_e4m3fn)
    stores = [
        (gather.Store(floats, store_cu), floats),
        (gather.Store(codes, store_cu, token, channel), codes * channel * token[:, None]),
        (gather.Store(fp8, store_cu, token), fp8.float() * token[:, None]),
    ]
    index, weights = torch.tensor([2, 0, 2]), make_weights("appg", D, R, M, torch.float32)
    cu = lengths_to_cu([9, 4, 9])
    for store, rows in stores:
        got = gather_insert_prompt(
            store, index, cu, 22, "appg", weights, M, dtype=torch.float32, impl="reference"
        )
        hidden = torch.cat([rows[5:], rows[:4], rows[5:]])
        torch.testing.assert_close(got, insert_prompt(hidden, cu, "appg", weights, M))
    for wrong, match in (
        (torch.tensor([3, 0, 2]), "index"),
        (torch.tensor([0, 2, 2]), "cu_seqlens.*lengths of the examples"),
    ):
        with pytest.raises(ValueError, match=match):
            gather_insert_prompt(stores[0][0], wrong, cu, 22, "appg", weights, M, impl="reference")


def changed(**changes):
    names = ("hidden", "cu_seqlens", "kind", "weights", "num_virtual_tokens")
    return dict(zip(names, arguments(), strict=True)) | changes


def weight(name, tensor):
    return {**arguments()[3], name: tensor}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(hidden=torch.zeros(29, D).long()), "`hidden` must be torch.float16.*int64"),
        (dict(hidden=torch.zeros(2, 29, D)), r"`hidden` must have the shape \[T, D\].*2, 29"),
        (dict(cu_seqlens=torch.tensor([0, 29])), "`cu_seqlens` must be torch.int32.*int64"),
        (dict(cu_seqlens=lengths_to_cu([3, 1, 17])), "end at 29.*got 0 and 21"),
        (dict(cu_seqlens=lengths_to_cu([3, 0, 18, 8])), "increase.*at least one row"),
        (dict(cu_seqlens=lengths_to_cu([3, 19, -1, 8])), "increase"),
        (dict(cu_seqlens=torch.zeros(0, dtype=torch.int32)), "B \\+ 1 numbers"),
        (dict(kind="lstm"), "`kind` must be one of static, npg, appg, mppg, got 'lstm'"),
        (dict(num_virtual_tokens=0), "at least 1, got 0"),
        (dict(num_virtual_tokens=2.0), "whole number"),
        (dict(weights={}), "`weights` of appg must hold proj_down.weight.*nothing"),
        (
            dict(weights=weight("proj_down.weight", torch.zeros(R, D + 1))),
            rf"`proj_down.weight` must have the shape \[{R}, {D}\].*{D + 1}",
        ),
        (dict(weights=weight("proj_up.bias", torch.zeros(M * D))), "`proj_up.bias`.*shape"),
        (
            dict(weights=weight("proj_down.bias", torch.zeros(R, device="meta"))),
            "`proj_down.bias` must be on cpu.*got meta",
        ),
        (
            dict(weights=weight("proj_down.bias", torch.zeros(R).long())),
            "`proj_down.bias` must be torch.float16",
        ),
        (dict(dropout_p=1.0), r"`dropout_p` must be in \[0, 1\), got 1.0"),
        (dict(seed=torch.tensor([1])), "`seed`.*impl='reference'"),
        (dict(impl="cuda"), "`impl` must be one of auto, triton, reference, got 'cuda'"),
        (dict(impl="triton"), "`hidden` must be one of.*float64.*impl='reference'"),
        (dict(context=torch.tensor([[0, 1]] * 3)), r"`context` must have the shape \[4, 2\]"),
        (dict(context=torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1]])), "`context` must hold"),
        (dict(context=torch.tensor([[0, 1], [1, 1], [0, 1], [0, 1]])), "`context` must hold"),
    ],
)
def test_wrong_input(changes, match):
    with pytest.raises(ValueError, match=match):
        insert_prompt(**changed(**changes))


def test_kernels_need_a_gpu_or_the_interpreter():
    with pytest.raises(ValueError, match="impl='triton' needs.*CUDA.*got cpu.*TRITON_INTERPRET"):
        insert_prompt(*arguments(dtype=torch.float32), impl="triton")


def test_wrong_masks_and_buffers():
    weights = arguments()[3]
    hidden = torch.zeros(2, 6, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape \[2, 6\]"):
        insert_prompt_padded(hidden, torch.ones(2, 5), "appg", weights, M)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [0] * 6])
    with pytest.raises(ValueError, match="`attention_mask` must have a token in each row"):
        insert_prompt_padded(hidden, mask, "appg", weights, M)
    with pytest.raises(ValueError, match=r"`hidden` must have the shape \[B, S, D\]"):
        insert_prompt_padded(hidden[0], None, "appg", weights, M)
    buffer = torch.zeros(29 + 4 * M, D, dtype=torch.float64)
    cu = lengths_to_cu(LENGTHS)
    with pytest.raises(ValueError, match="`buffer` requires a gradient.*use insert_prompt"):
        insert_prompt_(buffer.requires_grad_(), cu, "appg", weights, M)
    with pytest.raises(ValueError, match="`buffer` must be contiguous"):
        insert_prompt_(buffer.detach()[:, ::2], cu, "appg", make_weights("appg", 12, R, M), M)
    with pytest.raises(ValueError, match="end at 28"):
        insert_prompt_(buffer.detach()[:-1], cu, "appg", weights, M)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind):
    """Forward and backward of the plain PyTorch way, another length included."""
    compiled = torch.compile(insert_prompt, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([3, 9], [5, 1, 12]):
        hidden, weights = make_hidden(lengths, D), make_weights(kind, D, R, M)
        results = []
        for function in (insert_prompt, compiled):
            x = hidden.clone().requires_grad_()
            w = {name: v.clone().requires_grad_() for name, v in weights.items()}
            out = function(x, lengths_to_cu(lengths), kind, w, M)
            out.square().sum().backward()
            results.append((out.detach(), x.grad, *(v.grad for v in w.values())))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.slow
def test_importing_asks_for_no_gpu():
    """Neither the kernels nor the operator look for a device, or import more than they need."""
    code = """
import sys, torch
def refuse(*a, **k): raise AssertionError("asked for a GPU at import")
for name in ("is_available", "device_count", "current_device", "get_device_capability", "init",
             "get_device_properties"):
    setattr(torch.cuda, name, refuse)
import lpt_kernels.insert, lpt_kernels.gather, lpt_kernels.frozen, lpt_kernels.targets
assert not any(m == "lpt_fast" or m.startswith("transformers") for m in sys.modules)
import lpt_fast.insertion
assert "peft" not in sys.modules and "transformers" not in sys.modules
"""
    env_path = [p for p in sys.path if p]
    code = f"import sys; sys.path[:0] = {env_path!r}\n" + code
    subprocess.run([sys.executable, "-c", code], check=True)
