"""Attention within short packed texts against PyTorch's, text by text."""

from __future__ import annotations

import pytest
import torch
from lpt_kernels import attention
from lpt_kernels.attention import attend, takes
from torch.nn import functional as F

from tests.interpreter.insert_rule import (
    BF16,
    F16,
    F32,
    assert_rule,
    lengths_to_cu,
    normal,
    poisoned_memory,
)

__all__ = ["poisoned_memory"]  # a fixture
SHORT, LONG = (1, 5, 64, 17), (65, 3, 130)


def plain(q, k, v, lengths, heads, kv_heads, scale, causal):
    """[N, H d], by the definition in the dtype of the inputs."""
    outs = []
    parts = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    for q_, k_, v_ in parts:
        q_ = q_.view(len(q_), heads, -1).transpose(0, 1)
        k_, v_ = (x.view(len(x), kv_heads, -1).transpose(0, 1) for x in (k_, v_))
        k_, v_ = (x.repeat_interleave(heads // kv_heads, 0) for x in (k_, v_))
        o = F.scaled_dot_product_attention(
            q_[None], k_[None], v_[None], scale=scale, is_causal=bool(causal)
        )
        outs.append(o[0].transpose(0, 1).flatten(1))
    return torch.cat(outs)


def make(lengths, heads, kv_heads, size, dtype, device):
    N = sum(lengths)
    sizes = (heads, kv_heads, kv_heads)
    tensors = [normal(N, n * size, dtype=dtype, device=device, seed=i) for i, n in enumerate(sizes)]
    upstream = normal(N, heads * size, dtype=dtype, device=device, seed=9)
    return tensors, upstream


def outcome(function, tensors, upstream):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    out.backward(upstream)
    found = (out.detach(), *(x.grad for x in leaves))
    return dict(zip(("out", "d q", "d k", "d v"), found, strict=True))


def ours(lengths, heads, kv_heads, scale, causal, most=None, longest=None):
    def function(q, k, v):
        cu = lengths_to_cu(lengths, q.device)
        how = dict(heads=heads, kv_heads=kv_heads, scale=scale, causal=causal, most=most)
        return attend(q, k, v, cu, longest or max(lengths), **how)

    return function


RULE = [(dtype, x, c, 2, 2, 32) for dtype in (F32, BF16) for x in (SHORT, LONG) for c in (0, 1)]
RULE += [(F16, SHORT, False, 2, 2, 64), (F32, LONG, True, 4, 2, 24), (BF16, SHORT, False, 4, 2, 16)]
RULE += [(F32, (7,), True, 1, 1, 64), (BF16, (1, 1), False, 3, 1, 64)]


@pytest.mark.parametrize("dtype, lengths, causal, heads, kv_heads, size", RULE, ids=str)
def test_rule(dtype, lengths, causal, heads, kv_heads, size, device):
    tensors, upstream = make(lengths, heads, kv_heads, size, dtype, device)
    how = (lengths, heads, kv_heads, size**-0.5, causal)
    got = outcome(ours(*how), tensors, upstream)
    same = outcome(lambda *x: plain(*x, *how), tensors, upstream)
    double = [x.double() for x in tensors]
    assert_rule(got, same, outcome(lambda *x: plain(*x, *how), double, upstream.double()))


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=str)
def test_a_bound_that_is_no_text_s_own(lengths, device):
    """As a graph has it: shapes hold fast, texts change."""
    tensors, upstream = make(lengths, 2, 2, 32, F32, device)
    want = outcome(ours(lengths, 2, 2, 0.2, False), tensors, upstream)
    got = outcome(ours(lengths, 2, 2, 0.2, False, longest=256), tensors, upstream)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths, most", [(SHORT, 5), (LONG, 70)], ids=str)
def test_gradients_of_the_first_rows_alone(lengths, most, causal, device, poisoned_memory):
    tensors, upstream = make(lengths, 4, 2, 32, F32, device)
    want = outcome(ours(lengths, 4, 2, 0.2, causal), tensors, upstream)
    got = outcome(ours(lengths, 4, 2, 0.2, causal, most=most), tensors, upstream)
    torch.testing.assert_close(got["out"], want["out"], rtol=0, atol=0)
    starts = lengths_to_cu(lengths)[:-1].tolist()
    for name in ("d q", "d k", "d v"):
        for start, n in zip(starts, lengths, strict=True):
            kept, rest = slice(start, start + min(n, most)), slice(start + min(n, most), start + n)
            assert torch.equal(got[name][kept], want[name][kept])
            assert got[name][rest].isnan().all()  # nothing was stored


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=str)
def test_texts_do_not_see_each_other(lengths, device):
    """NaN and infinity stay where they are; the others are equal to the bit."""
    tensors, upstream = make(lengths, 2, 2, 32, BF16, device)
    want = outcome(ours(lengths, 2, 2, 0.2, False), tensors, upstream)
    start = lengths[0]
    poisoned = [x.clone() for x in tensors]
    for x in poisoned:
        x[start : start + lengths[1]] = float("nan")
    got = outcome(ours(lengths, 2, 2, 0.2, False), poisoned, upstream)
    for name, x in want.items():
        own = slice(start, start + lengths[1])
        assert got[name][own].isnan().all()
        for part in (slice(0, start), slice(start + lengths[1], None)):
            assert torch.equal(got[name][part], x[part])


def test_two_runs_are_equal_and_columns_may_have_strides(device):
    tensors, upstream = make(LONG, 2, 2, 32, BF16, device)
    run = ours(LONG, 2, 2, 0.2, True)
    first = outcome(run, tensors, upstream)
    for name, x in outcome(run, tensors, upstream).items():
        assert torch.equal(x, first[name])
    # Parts of one tensor, as GPT-2's projection gives them, and a transposed gradient.
    whole = torch.cat(tensors, 1)
    parts = list(whole.split([x.shape[1] for x in tensors], 1))
    strided = outcome(run, parts, upstream.t().contiguous().t())
    for name, x in strided.items():
        assert torch.equal(x, first[name])


def test_who_takes_it():
    assert takes(96 * 4, 4, 200, 64)
    assert not takes(96 * 4 + 1, 4, 200, 64)  # long in the mean
    assert not takes(40, 4, attention.MAX_ROWS + 1, 64)
    assert not takes(40, 4, 20, 80)
