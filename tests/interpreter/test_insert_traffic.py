"""Bytes that the insertion kernels touch, counted in the interpreter, against those they must.

Compulsory in the forward pass: hidden read once, the packed output and what is saved for the
backward pass written once. Weights are counted apart, with how often each byte is read, and so is
what one kernel leaves for the next (h, partial sums): it is small and comes from the L2 cache.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("traffic is counted in Triton's interpreter", allow_module_level=True)

from lpt_kernels import insert, insert_config
from lpt_kernels.gather import Store, source_rows
from lpt_kernels.traffic import count_traffic

from lpt_fast.insertion.reference import pooling_bins

SAVED = ("units", "arg")
WEIGHTS = ("w_down", "b_down", "w_up", "b_up")
# D, r, m, average length, examples
SHAPES = [
    (384, 128, 20, 16, 12),
    (384, 64, 10, 32, 6),
    (1024, 128, 20, 64, 3),
    (1024, 128, 5, 16, 8),
]
# Channels of one program of npg's down-projection, each of which reads its row again.
NPG_CHANNELS = 32


def batch(D, r, m, average, B, kind, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(D + average)
    lengths = torch.randint(average // 2, 3 * average // 2 + 1, (B,), generator=g)
    lengths[-1] += average * B - lengths.sum()
    lengths = lengths.clamp(min=1).tolist()
    layout = insert.Layout(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), m)
    rows = m * D if kind == "npg" else D
    shapes = [(m, D)] if kind == "static" else [(r, D), (r,), (rows, r), (rows,)]
    # What the operator gives the kernels: masters for npg, rounded weights else.
    wide = torch.float32 if kind in ("npg", "static") else dtype
    weights = [torch.randn(s, generator=g).to(wide) for s in shapes]
    hidden = torch.randn(sum(lengths), D, generator=g).to(dtype)
    return hidden, layout, weights


def say(which, kind, shape, **ratios):
    """The figures, for `pytest -s`: touched bytes over compulsory bytes."""
    text = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
    print(f"\n{which:8} {kind:6} D, r, m, length, B = {shape}: {text}", end="")


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def name_all(traffic, hidden, out, saved, weights, layout):
    traffic.name("hidden", hidden)
    traffic.name("out", out)
    for label, tensor in (*zip(SAVED, saved), *zip(WEIGHTS, weights)):  # noqa: B905
        if tensor.numel():
            traffic.name(label, tensor)
    traffic.name("cu_seqlens", layout.cu_seqlens)
    return [s for s, tensor in zip(SAVED, saved, strict=True) if tensor.numel()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", insert.KINDS)
def test_forward(kind, shape):
    hidden, layout, weights = batch(*shape, kind)
    with count_traffic() as traffic:
        out, *saved = insert.insert_fwd(
            kind, hidden, layout, weights, T=len(hidden), dtype=hidden.dtype
        )
    name_all(traffic, hidden, out, saved, weights, layout)
    D, r, m, _, B = shape
    # npg: one row of each example; appg, mppg: all, for the copy (from the L2 cache).
    again = {"static": 0, "npg": -(-r // NPG_CHANNELS) * B * D * 2}.get(kind, size(hidden))
    assert traffic.loads["hidden"] == size(hidden) + again
    assert traffic.stores["out"] == size(out) and traffic.loads["out"] == 0
    units, arg = saved
    weight_bytes = sum(traffic.loads[w] for w, _ in zip(WEIGHTS, weights, strict=False))
    say("forward", kind, shape, weights=weight_bytes / size(hidden, out, units, arg))
    if kind == "static":
        assert traffic.unnamed() == {}
        return
    assert traffic.stores["units"] == size(units)
    if kind == "npg":
        assert traffic.unnamed() == {}
    else:
        assert traffic.stores["arg"] == size(arg) if kind == "mppg" else arg.numel() == 0
        # h is written once and pooled once.
        begin, end = pooling_bins(layout.cu_seqlens.diff().long(), m)
        pairs = int((end - begin).sum())
        assert traffic.stores["other"] == len(hidden) * r * 2
        # (A row that neighbours share in one load counts once.)
        assert traffic.loads["other"] <= pairs * r * 2
    # W_d once for each tile of 128 rows (npg: 16 examples); W_u once for each split of the rows,
    # each column of units once for each column block of W_u.
    name = "npg_up_fwd" if kind == "npg" else "up_fwd"
    config = insert_config.config_of(name, hidden.dtype, D)
    columns = -(-D // config.BLOCK_D) * (m if kind == "npg" else 1)
    rows = insert_config.block_p(len(units), config.BLOCK_T)
    _, splits = insert_config.chunks_of(len(units), rows, columns)
    assert traffic.reread("w_down") <= -(-B // 16 if kind == "npg" else -len(hidden) // 128)
    assert traffic.reread("w_up") == splits
    assert traffic.reread("units") == columns


@pytest.mark.parametrize("kind", insert.KINDS)
def test_in_place_touches_text_only_to_pool_it(kind):
    D, r, m, _, B = SHAPES[1]
    hidden, layout, weights = batch(*SHAPES[1], kind)
    out = torch.randn(len(hidden) + B * m, D).to(hidden.dtype)
    with count_traffic() as traffic:
        insert.insert_fwd(kind, None, layout, weights, T=len(hidden), dtype=hidden.dtype, out=out)
        traffic.name("out", out)
    assert traffic.stores["out"] == size(out) - size(hidden)  # the prompt rows
    rows = B * -(-r // NPG_CHANNELS)
    read = {"static": 0, "npg": rows * D * 2, "appg": size(hidden), "mppg": size(hidden)}[kind]
    assert traffic.loads["out"] == read


@pytest.mark.parametrize("kind", insert.KINDS)
def test_from_a_cache_reads_its_rows_once(kind):
    D, r, m, _, B = SHAPES[1]
    hidden, layout, weights = batch(*SHAPES[1], kind)
    lengths = layout.cu_seqlens.diff()
    cache = torch.randint(-127, 128, (3 * len(hidden), D), dtype=torch.int8)
    store_cu = torch.tensor([0, *lengths.tolist() * 3]).cumsum(0)
    store = Store(cache, store_cu, torch.rand(len(cache)), torch.rand(D))
    start = source_rows(store, torch.arange(B) + B)
    layout = insert.Layout(
        layout.cu_seqlens,
        m,
        source_start=start,
        token_scale=store.token_scale,
        channel_scale=store.channel_scale,
    )
    with count_traffic() as traffic:
        out, *_ = insert.insert_fwd(
            kind, cache, layout, weights, T=len(hidden), dtype=torch.bfloat16
        )
        traffic.name("cache", cache)
        traffic.name("out", out)
    # Its one row is read for the prompt and for the copy.
    extra = {"npg": B * D * -(-r // NPG_CHANNELS), "static": 0}.get(kind, len(hidden) * D)
    assert traffic.loads["cache"] == len(hidden) * D + extra
    assert traffic.stores["out"] == size(out)


@pytest.mark.parametrize("kind", insert.KINDS)
@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
def test_backward_of_weights(kind, shape):
    """Reads the prompt rows of the gradient twice (for dW_u and for dz; static: once) and no other
    row of it, each text row that the generator read once, and stores nothing where they are.
    """
    hidden, layout, weights = batch(*shape, kind)
    step = dict(T=len(hidden), p_drop=0.0, seed=None)
    out, *saved = insert.insert_fwd(kind, hidden, layout, weights, dtype=hidden.dtype, **step)
    grad = torch.randn(out.shape).to(out.dtype)
    needs = dict(need_weights=True, need_hidden=False)
    with count_traffic() as traffic:
        insert.insert_bwd(kind, grad, out, layout, weights, *saved, **needs, **step)
        traffic.name("grad", grad)
        name_all(traffic, hidden, out, saved, weights, layout)
    D, r, m, _, B = shape
    r_blocks = -(-r // 128)
    assert traffic.loads["grad"] == (1 if kind == "static" else 2 * r_blocks) * B * m * D * 2
    read = {"static": 0, "npg": B * D * 2}.get(kind, size(hidden))
    assert traffic.loads["out"] == r_blocks * read
    if kind == "mppg":  # the maxima of a bin are looked at by each of its rows
        begin, end = pooling_bins(layout.cu_seqlens.diff().long(), m)
        # (A bin that neighbours share in one load counts once.)
        assert size(saved[1]) <= traffic.loads["arg"] <= int((end - begin).sum()) * r * 4
    stored = traffic.stores
    assert all(stored.get(name, 0) == 0 for name in ("grad", "out", "hidden", *SAVED))


@pytest.mark.parametrize("kind", insert.KINDS)
def test_backward_of_hidden(kind):
    """Reads each row of the gradient's text once more and writes each row's gradient once (npg: the
    row that it read a second time).
    """
    shape = SHAPES[1]
    hidden, layout, weights = batch(*shape, kind)
    step = dict(T=len(hidden), p_drop=0.0, seed=None)
    out, *saved = insert.insert_fwd(kind, hidden, layout, weights, dtype=hidden.dtype, **step)
    grad = torch.randn(out.shape).to(out.dtype)
    needs = dict(need_weights=False, need_hidden=True)
    with count_traffic() as traffic:
        d_hidden, _ = insert.insert_bwd(kind, grad, out, layout, weights, *saved, **needs, **step)
        traffic.name("grad", grad)
        traffic.name("d_hidden", d_hidden)
    D, _, m, _, B = shape
    again = B * D * 2 if kind == "npg" else 0
    prompts = 0 if kind == "static" else B * m * D * 2
    assert traffic.loads["grad"] == size(hidden) + prompts + again
    assert traffic.stores["d_hidden"] == size(hidden) + again
