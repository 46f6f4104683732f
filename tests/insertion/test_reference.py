"""The plain PyTorch oracle of prompt insertion against formulas written out example by example."""

from __future__ import annotations

import pytest
import torch

from lpt_fast.insertion.reference import insert_prompt, pooling_bins
from tests.insertion.cases import KINDS, by_hand, lengths_to_cu, make_hidden, make_weights

D, R = 24, 16
LENGTHS = ([1], [3, 1, 17, 8], list(range(1, 24)), [63, 1, 200])


def leaves(tensors):
    return {name: t.clone().requires_grad_() for name, t in tensors.items()}


def gradients(fn, hidden, weights, *args, **kwargs):
    hidden, weights = hidden.clone().requires_grad_(), leaves(weights)
    out = fn(hidden, *args[:2], weights, *args[2:], **kwargs)
    g = torch.Generator().manual_seed(5)
    out.backward(torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype))
    return out.detach(), hidden.grad, *(w.grad for w in weights.values())


@pytest.mark.parametrize("m", [1, 2, 5, 20])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}")
@pytest.mark.parametrize("kind", KINDS)
def test_formula(kind, lengths, m):
    """Output and every gradient to the last digits of float64, the first and last token of npg."""
    hidden, weights = make_hidden(lengths, D), make_weights(kind, D, R, m)
    for last in (False, True) if kind == "npg" else (False,):
        got = gradients(
            insert_prompt, hidden, weights, lengths_to_cu(lengths), kind, m, last_token=last
        )

        def expected(hidden, lengths, kind, weights, m, last=last):
            return by_hand(hidden, lengths, kind, weights, m, last=last)

        want = gradients(expected, hidden, weights, lengths, kind, m)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_context(kind):
    """Prompts are made from a range of each example's rows, and what is outside may be NaN."""
    lengths, context = [9, 4, 30, 1], [(0, 5), (2, 3), (7, 30), (0, 1)]
    hidden, weights = make_hidden(lengths, D), make_weights(kind, D, R, 5)
    cu = lengths_to_cu(lengths)
    outside = torch.ones(len(hidden), dtype=torch.bool)
    for start, (low, high) in zip(cu.tolist(), context, strict=False):
        outside[start + low : start + high] = False
    expected = by_hand(hidden, lengths, kind, weights, 5, context, last=True)
    clean = gradients(
        insert_prompt, hidden, weights, cu, kind, 5, context=torch.tensor(context), last_token=True
    )
    torch.testing.assert_close(clean[0], expected, atol=1e-12, rtol=1e-12)
    dirty = hidden.masked_fill(outside[:, None], float("nan"))
    got = gradients(
        insert_prompt, dirty, weights, cu, kind, 5, context=torch.tensor(context), last_token=True
    )
    for a, b in zip(got[2:], clean[2:], strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    text = ~torch.isnan(got[0]).any(1)
    torch.testing.assert_close(got[0][text], clean[0][text], atol=0, rtol=0)
    assert (~text).sum() == outside.sum()


def test_the_first_of_equal_maxima_gets_the_gradient():
    """As torch.nn.functional.adaptive_max_pool1d has it."""
    lengths, weights = [6], make_weights("mppg", D, R, 2)
    # Whole numbers: sums in another order would not be equal.
    for name in ("proj_down.weight", "proj_down.bias"):
        weights[name] = (4 * weights[name]).round()
    hidden = (4 * make_hidden([1], D)).round().expand(6, D).clone().requires_grad_()
    out = insert_prompt(hidden, lengths_to_cu(lengths), "mppg", weights, 2)
    out[:2].sum().backward()
    assert hidden.grad[[0, 3]].abs().sum(1).min() > 0
    assert hidden.grad[[1, 2, 4, 5]].abs().max() == 0


def test_nan_is_not_dropped_by_the_maximum():
    hidden = make_hidden([4, 4], D)
    hidden[1, 0] = float("nan")
    out = insert_prompt(hidden, lengths_to_cu([4, 4]), "mppg", make_weights("mppg", D, R, 2), 2)
    assert out[0].isnan().all() and not out[1].isnan().any() and not out[6:].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_mask_and_empty_batch(kind):
    lengths, m = [3, 5], 4
    hidden, weights = make_hidden(lengths, D), make_weights(kind, D, R, m)
    cu = lengths_to_cu(lengths)
    mask = torch.rand(2, m, D) > 0.4
    plain = insert_prompt(hidden, cu, kind, weights, m)
    got = insert_prompt(hidden, cu, kind, weights, m, dropout_p=0.4, dropout_mask=mask)
    for b, at in enumerate((0, 3 + m)):
        want = torch.where(mask[b], plain[at : at + m] / 0.6, 0)
        torch.testing.assert_close(got[at : at + m], want, atol=1e-14, rtol=1e-14)
    empty = insert_prompt(hidden[:0], lengths_to_cu([]), kind, weights, m)
    assert empty.shape == (0, D)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_wider_weights_are_not_narrowed(kind, dtype):
    """fp32 weights on half-precision states: the only error is the final rounding."""
    lengths = [2, 40]
    hidden = make_hidden(lengths, D, dtype)
    weights = make_weights(kind, D, R, 5, torch.float32)
    got = insert_prompt(hidden, lengths_to_cu(lengths), kind, weights, 5)
    wide = insert_prompt(hidden.float(), lengths_to_cu(lengths), kind, weights, 5)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wide.to(dtype), atol=0, rtol=0)


@pytest.mark.slow
def test_pooling_bins_are_torchs():
    """Every n from 1 to 50 and m from 1 to 25."""
    for m in range(1, 26):
        n = torch.arange(1, 51)
        start, end = pooling_bins(n, m)
        for b, size in enumerate(n.tolist()):
            x = torch.eye(size, dtype=torch.float64)[None]
            pooled = torch.nn.functional.adaptive_avg_pool1d(x, m)[0]
            for j in range(m):
                inside = pooled[:, j].nonzero().flatten()
                assert (inside[0], inside[-1] + 1) == (start[b, j], end[b, j])
