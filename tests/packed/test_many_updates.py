"""Low-rank updates of several adapters, each on some of the rows: what each makes of them alone."""

from __future__ import annotations

import pytest
import torch

from lpt_fast.backbone.low_rank import LowRank
from lpt_fast.packed import low_rank
from lpt_fast.packed.low_rank import Among, Part, adapt

D, OUT, TEXTS = 6, 5, 7
# Rows of the adapters. 0 - 2 are alike; 3 has another scale, 4 another rank, 5 fewer rows, and 6
# stands apart: rows 23 and 24 are nobody's.
PLACES = [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 23), (25, 28)]
RANKS, ALPHAS = (2, 2, 2, 2, 3, 3, 3), (4.0, 4.0, 4.0, 6.0, 9.0, 9.0, 9.0)
ROWS = 28


def updates(seed: int) -> list[LowRank]:
    torch.manual_seed(seed)
    made = [LowRank(D, OUT, r, alpha) for r, alpha in zip(RANKS, ALPHAS, strict=True)]
    for update in made:
        torch.nn.init.normal_(update.lora_B.weight)
    return [update.double() for update in made]


def gradients(of: list[list[LowRank]], x, outs, pulls) -> list[torch.Tensor]:
    sum((out * pull).sum() for out, pull in zip(outs, pulls, strict=True)).backward()
    weights = [p for own in of for update in own for p in update.parameters()]
    found = [x.grad, *(p.grad.clone() for p in weights)]
    for p in weights:
        p.grad = None
    x.grad = None
    return found


@pytest.mark.parametrize("needs_x", [True, False])
def test_each_adapters_rows_get_its_update(needs_x, monkeypatch):
    """Of two products of one x; rows of nobody stay."""
    lengths, runs = [], low_rank._runs

    def seen(items):
        found = runs(items)
        lengths.append([len(run) for run in found])
        return found

    monkeypatch.setattr(low_rank, "_runs", seen)
    both = [updates(0), updates(1)]
    x = torch.randn(ROWS, D, dtype=torch.float64, requires_grad=True)
    plain = [torch.randn(ROWS, OUT, dtype=torch.float64) for _ in both]
    pulls = [torch.randn(ROWS, OUT, dtype=torch.float64) for _ in both]
    among = [Among(slice(a, b), slice(i, i + 1), ROWS) for i, (a, b) in enumerate(PLACES)]
    parts = [[Part(u, among=where) for u, where in zip(own, among, strict=True)] for own in both]
    given = x if needs_x else x.detach()
    outs = adapt(given, [out.clone() for out in plain], parts)
    assert lengths == [[3, 1, 1, 1, 1] * 2]
    if not needs_x:
        x.grad = torch.zeros_like(x)
    got = gradients(both, x, outs, pulls)
    expected = [out.clone() for out in plain]
    for own, out in zip(both, expected, strict=True):
        for update, (a, b) in zip(own, PLACES, strict=True):
            out[a:b] += update(given[a:b])
    for out, wanted in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-12)
        assert torch.equal(out[23:25], wanted[23:25])
    if not needs_x:
        x.grad = torch.zeros_like(x)
    wanted = gradients(both, x, expected, pulls)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_one_row_of_each_text():
    """Where x has a row for each text, the texts count: each its own adapter's, in one run."""
    torch.manual_seed(0)
    own = [LowRank(D, OUT, 2, 4.0).double() for _ in range(TEXTS)]
    for update in own:
        torch.nn.init.normal_(update.lora_B.weight)
    x = torch.randn(TEXTS, D, dtype=torch.float64)
    parts = [
        Part(u, among=Among(slice(9 * i, 9 * i + 9), slice(i, i + 1), 9 * TEXTS))
        for i, u in enumerate(own)
    ]
    items = [(0, part, part.place(TEXTS)) for part in parts]
    assert [len(run) for run in low_rank._runs(items)] == [TEXTS]
    out = adapt(x, [torch.zeros(TEXTS, OUT, dtype=torch.float64)], [parts])[0]
    wanted = torch.cat([update(x[i : i + 1]) for i, update in enumerate(own)])
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-12)
