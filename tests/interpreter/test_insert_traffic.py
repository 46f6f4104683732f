"""Bytes that the insertion kernels touch, counted in the interpreter, against those they must.

Compulsory in the forward pass: hidden read once, the packed output and what is saved for the
backward pass written once. Weights are counted apart, with how often each byte is read.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("traffic is counted in Triton's interpreter", allow_module_level=True)

from lpt_kernels import insert
from lpt_kernels.gather import Store, source_rows
from lpt_kernels.traffic import count_traffic

SAVED = ("z", "arg", "left", "left_arg")
WEIGHTS = ("w_down", "b_down", "w_up", "b_up")
# D, r, m, average length, examples
SHAPES = [
    (384, 128, 20, 16, 12),
    (384, 64, 10, 32, 6),
    (1024, 128, 20, 64, 3),
    (1024, 128, 5, 16, 8),
]
# The bottleneck z is written and read once more; with r = D / 3, m = 20 and texts of 16 tokens
# that reading alone is a tenth of everything.
EXCEPTIONS = {("appg", 384, 128, 20, 16): 1.13}


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
    names = name_all(traffic, hidden, out, saved, weights, layout)
    z, arg = saved[:2]
    touched = traffic.touched(["hidden", "out", *names])
    compulsory = size(hidden, out, z, arg)
    weight_bytes = sum(traffic.loads[w] for w, _ in zip(WEIGHTS, weights, strict=False))
    say("forward", kind, shape, activations=touched / compulsory, weights=weight_bytes / compulsory)
    assert touched <= EXCEPTIONS.get((kind, *shape[:-1]), 1.10) * compulsory
    assert traffic.unnamed() == {}
    assert traffic.stores["out"] == size(out) and traffic.loads["out"] == 0
    if kind == "static":
        return
    _, _, m, _, B = shape
    # W_d once for each tile of 64 rows, W_u once for each 64 prompt rows; npg's once for each 16
    # and 64 examples.
    reads = (-(-B // 16), -(-B // 64))
    if kind != "npg":
        reads = (-(-len(hidden) // insert.TILE), -(-B * m // 64))
    assert traffic.reread("w_down") <= reads[0] + 0.01
    assert traffic.reread("w_up") <= reads[1] + 0.01


@pytest.mark.parametrize("kind", insert.KINDS)
def test_in_place_touches_text_only_to_pool_it(kind):
    D, _, m, _, B = SHAPES[1]
    hidden, layout, weights = batch(*SHAPES[1], kind)
    out = torch.randn(len(hidden) + B * m, D).to(hidden.dtype)
    with count_traffic() as traffic:
        insert.insert_fwd(kind, None, layout, weights, T=len(hidden), dtype=hidden.dtype, out=out)
        traffic.name("out", out)
    assert traffic.stores["out"] == size(out) - size(hidden)  # the prompt rows
    read = {"static": 0, "npg": B * D * 2, "appg": size(hidden), "mppg": size(hidden)}[kind]
    assert traffic.loads["out"] == read


@pytest.mark.parametrize("kind", insert.KINDS)
def test_from_a_cache_reads_its_rows_once(kind):
    D, _, m, _, B = SHAPES[1]
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
    extra = B * D if kind == "npg" else 0  # its one row is read for the prompt and for the copy
    assert traffic.loads["cache"] == len(hidden) * D + extra
    assert traffic.stores["out"] == size(out)


def backward(kind, shape):
    """Counted backward pass, and the compulsory bytes: of activations, and of all it touches."""
    hidden, layout, weights = batch(*shape, kind)
    out, *saved = insert.insert_fwd(
        kind, hidden, layout, weights, T=len(hidden), dtype=hidden.dtype
    )
    grad = torch.randn(out.shape).to(out.dtype)
    with count_traffic() as traffic:
        insert.insert_bwd(
            kind,
            grad,
            out,
            layout,
            weights,
            *saved,
            T=len(hidden),
            p_drop=0.0,
            seed=None,
            need_weights=True,
            need_hidden=False,
        )
        traffic.name("grad", grad)
        name_all(traffic, hidden, out, saved, weights, layout)
    D, _, m, _, B = shape
    pooled = B * D * 2 if kind == "npg" else size(hidden)
    activations = B * m * D * 2 + pooled + size(saved[0])
    return (
        traffic,
        activations,
        activations + size(weights[2]) + 4 * sum(w.numel() for w in weights),
    )


@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
def test_backward_of_npg(shape):
    """Everything it touches, the weights and their fp32 gradients included, under 1.2 times what it
    must. (The prompt rows of the gradient are read twice: once for dW_u, once for dz.)
    """
    traffic, _, compulsory = backward("npg", shape)
    touched = traffic.touched(["grad", "out", "z", "w_up", "b_down", "other"])
    say("backward", "npg", shape, everything=touched / compulsory)
    assert touched < 1.2 * compulsory
    B, m, D = shape[4], shape[2], shape[0]
    assert traffic.loads["grad"] == 2 * B * m * D * 2  # no text row of it
    assert traffic.loads["out"] == B * D * 2


@pytest.mark.parametrize(
    ("shape", "limit"),
    [(SHAPES[0], 2.0), (SHAPES[3], 1.5), ((1024, 128, 5, 64, 4), 1.2)],
    ids=str,
)
def test_backward_of_appg(shape, limit):
    """Reads each text row once and the prompt rows of the gradient twice, no other row of it.

    Under 1.2 times the compulsory bytes only where texts are long beside the prompt: see
    bench/results.
    """
    traffic, activations, _ = backward("appg", shape)
    D, _, m, _, B = shape
    assert traffic.loads["grad"] == 2 * B * m * D * 2
    assert reads_of_text(traffic, shape) <= 1.35
    touched = traffic.touched(["grad", "out", "z"])
    say("backward", "appg", shape, activations=touched / activations)
    assert touched < limit * activations


def reads_of_text(traffic, shape):
    """How often a text row is read: a tile is read again where many short texts meet in it."""
    D, _, _, average, B = shape
    return traffic.loads["out"] / (average * B * D * 2)
