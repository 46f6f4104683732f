"""The insertion kernels in the packed form: outputs and gradients under the rule of insert_rule."""

from __future__ import annotations

import pytest
import torch
from lpt_kernels.insert import Layout, insert_bwd, insert_fwd

from lpt_fast.insertion import reference
from tests.interpreter.insert_rule import (
    BF16,
    DTYPES,
    F16,
    F32,
    GENERATORS,
    KINDS,
    POOLING,
    assert_equal,
    assert_rule,
    check,
    inputs,
    kernels,
    lengths_to_cu,
    make_hidden,
    make_weights,
    normal,
    packed_rows,
    results,
    whole,
)
from tests.interpreter.insert_rule import poisoned_memory as poisoned_memory

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Of these each kind takes one dtype, for the interpreter is slow.
CASES = [  # lengths, m, D, r
    ([1], 1, 24, 16),
    ([37], 20, 40, 16),
    ([19, 20, 21, 1, 2], 20, 48, 24),
    ([1] * 35, 5, 24, 16),
    ([63, 1, 1000], 5, 24, 16),
    ([70, 3], 5, 40, 130),
    ([5, 2], 1, 40, 300),
    ([3, 20], 5, 384, 64),
    ([2, 7], 1, 768, 48),
    ([9], 2, 1024, 16),
    ([3], 1, 4096, 16),
]


def ids(case):
    lengths, m, D, r = case
    return f"n{'_'.join(map(str, lengths[:4]))}-m{m}-D{D}-r{r}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rule(kind, dtype, device):
    lengths, m, D, r = [1, 4, 5, 6], 5, 33, 7
    check(kind, lengths, m, *inputs(kind, lengths, m, D, r, dtype, device))


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("kind", KINDS)
def test_rule_at_many_sizes(kind, case, device):
    dtype = DTYPES[(CASES.index(case) + KINDS.index(kind)) % 3]
    lengths, m, D, r = case
    if (D == 1024 and kind in ("static", "mppg")) or (D == 4096 and kind in ("npg", "appg")):
        pytest.skip("the other two have it")
    check(kind, lengths, m, *inputs(kind, lengths, m, D, r, dtype, device))


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("kind", GENERATORS)
def test_outputs_of_random_inputs_in_16_bits(kind, dtype, device):
    lengths, m, D, r = [70, 3, 5], 5, 40, 24
    hidden = make_hidden(lengths, D, dtype, 0, device)
    weights = make_weights(kind, D, r, m, dtype, 0, device)
    cu = lengths_to_cu(lengths, device)
    got = kernels(hidden, cu, kind, weights, m)
    same = reference.insert_prompt(hidden, cu, kind, weights, m)
    wide = {name: w.double() for name, w in weights.items()}
    oracle = reference.insert_prompt(hidden.double(), cu, kind, wide, m)
    assert_rule({"out": got}, {"out": same}, {"out": oracle})


@pytest.mark.parametrize("dtype", DTYPES)
def test_static_with_a_prompt_for_each_example(dtype, device):
    lengths, m, D = [3, 1, 40], 5, 33
    hidden = make_hidden(lengths, D, dtype, 0, device)
    prompt = normal(3, m, D, dtype=dtype, device=device)
    got = check("static", lengths, m, hidden, {"prompt_embedding.weight": prompt})
    _, rows = packed_rows(lengths, m, device)
    assert torch.equal(got["out"][rows], prompt)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind, device):
    m = 5
    hidden, weights = inputs(kind, [], m, 24, 16, F32, device)
    got = check(kind, [], m, hidden, weights)
    assert got["out"].shape == (0, 24)
    for name in weights:
        assert got[f"d {name}"].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_each_gradient_alone(kind, device):
    """Is there, and the same to the bit as together with the others; the others are not."""
    lengths, m = [3, 20, 1], 5
    hidden, weights = inputs(kind, lengths, m, 24, 16, F32, device)
    upstream = normal(len(hidden) + 3 * m, 24, device=device, seed=9)
    args = (lengths_to_cu(lengths, device), kind, m)
    every = results(kernels, hidden, weights, *args, upstream=upstream)
    assert len(every) == 2 + len(weights)
    for name in ("hidden", *weights):
        got = results(kernels, hidden, weights, *args, upstream=upstream, needs=[name])
        assert_equal(got, {key: every[key] for key in ("out", f"d {name}")})
    with torch.no_grad():
        assert torch.equal(kernels(hidden, args[0], kind, weights, m), every["out"])


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_are_equal_to_the_bit(kind, device):
    lengths, m, dtype = [3, 70, 1, 9], 5, BF16
    hidden, weights = inputs(kind, lengths, m, 40, 24, dtype, device)
    upstream = normal(len(hidden) + 4 * m, 40, dtype=dtype, device=device, seed=9)
    args = (lengths_to_cu(lengths, device), kind, m)
    first, second = (results(kernels, hidden, weights, *args, upstream=upstream) for _ in range(2))
    assert_equal(first, second)


# --- contexts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, last", [*((kind, False) for kind in KINDS), ("npg", True)])
def test_context(kind, last, device):
    """Prompts are made from a range of rows alone: what is outside may be NaN."""
    lengths, m, D = [9, 4, 70, 1], 5, 24
    context = torch.tensor([(0, 5), (2, 3), (7, 60), (0, 1)], device=device)
    hidden, weights = inputs(kind, lengths, m, D, 16, F32, device)
    clean = check(kind, lengths, m, hidden, weights, context=context, last_token=last)
    outside = torch.ones(len(hidden), dtype=torch.bool, device=device)
    cu = lengths_to_cu(lengths, device)
    for start, (low, high) in zip(cu.tolist(), context.tolist(), strict=False):
        outside[start + low : start + high] = False
    dirty = hidden.masked_fill(outside[:, None], float("nan"))
    upstream = normal(*clean["out"].shape, device=device, seed=9)
    got = results(
        kernels, dirty, weights, cu, kind, m, upstream=upstream, context=context, last_token=last
    )
    text, prompt = packed_rows(lengths, m, device)
    assert torch.equal(got["out"][prompt], clean["out"][prompt])
    torch.testing.assert_close(got.pop("out")[text], dirty, atol=0, rtol=0, equal_nan=True)
    assert_equal(got, {key: clean[key] for key in got})


@pytest.mark.parametrize("dtype", DTYPES)
def test_last_token(dtype, device):
    lengths, m = [1, 4, 70], 5
    hidden, weights = inputs("npg", lengths, m, 24, 16, dtype, device)
    got = check("npg", lengths, m, hidden, weights, last_token=True)
    first = kernels(hidden, lengths_to_cu(lengths, device), "npg", weights, m)
    _, prompt = packed_rows(lengths, m, device)
    same = (got["out"][prompt] == first[prompt]).all(2).all(1)
    assert same.tolist() == [True, False, False]


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("equal", ["all", "many"])
def test_the_first_of_equal_maxima_gets_the_gradient(equal, m, device):
    """Also where equals lie in different tiles of 64 rows. Numbers are whole, so sums are exact."""
    lengths = [200, 7]
    hidden, weights = whole("mppg", lengths, m, 24, 16, F32, device)
    weights["proj_up.weight"] = (3 * weights["proj_up.weight"]).round()
    weights["proj_up.bias"] = (3 * weights["proj_up.bias"]).round()
    if equal == "all":
        hidden = hidden[:1].expand(len(hidden), -1)
    upstream = normal(len(hidden) + 2 * m, 24, device=device, seed=9).round()
    text, prompt = packed_rows(lengths, m, device)
    args = (lengths_to_cu(lengths, device), "mppg", m)
    got = results(kernels, hidden, weights, *args, upstream=upstream)
    want = results(reference.insert_prompt, hidden, weights, *args, upstream=upstream)
    assert_equal(got, want)
    # Beyond the gradient of the row itself.
    chosen = (got["d hidden"] != upstream[text]).any(1).nonzero().flatten().tolist()
    if equal == "all":
        first = [j * n // m + at for n, at in ((200, 0), (7, 200)) for j in range(m)]
        assert set(chosen) <= set(first) and set(chosen) & set(first[m:])
    assert {0, 200} & set(chosen) and upstream[prompt].abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", POOLING)
def test_all_negative_rows(kind, dtype, device):
    """Projections of every row are below zero; the bias lifts them past the ReLU."""
    lengths, m = [3, 70], 5
    hidden, weights = inputs(kind, lengths, m, 24, 16, dtype, device)
    hidden = -hidden.abs() - 1
    weights["proj_down.weight"] = weights["proj_down.weight"].abs()
    weights["proj_down.bias"] = torch.full_like(weights["proj_down.bias"], 32.5)
    down = hidden.double() @ weights["proj_down.weight"].double().T
    assert (down.max() <= 0 and (down + 32.5).min() > 0) or kind == "mppg"
    got = check(kind, lengths, m, hidden, weights)
    assert got["d proj_down.weight"].abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_huge_values(kind, dtype, device):
    lengths, m = [3, 70], 5
    hidden, weights = inputs(kind, lengths, m, 24, 16, dtype, device)
    # Powers of two: exact projections stay so. Products must fit, in fp16 below 65,504.
    hidden = hidden * (2.0**9 if dtype == F16 else 2.0**100)
    got = check(kind, lengths, m, hidden, weights)
    assert all(g.isfinite().all() for g in got.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_nan_makes_the_prompts_of_its_example_nan(kind, dtype, device):
    lengths, m = [4, 70, 5], 2
    hidden, weights = inputs(kind, lengths, m, 24, 16, dtype, device)
    # The row that npg reads; for the others also one in a later tile than its bin begins in.
    for at in (4,) if kind == "npg" else (4, 70):
        dirty = hidden.clone()
        dirty[at, 3] = float("nan")
        out = kernels(dirty, lengths_to_cu(lengths, device), kind, weights, m)
        text, prompt = packed_rows(lengths, m, device)
        torch.testing.assert_close(out[text], dirty, atol=0, rtol=0, equal_nan=True)
        bins = [0, 1] if kind == "npg" else [0] if at == 4 else [1]
        assert out[prompt[1, bins]].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_examples_do_not_depend_on_their_neighbours(kind, device):
    lengths, m, D = [3, 70, 20, 1], 5, 24
    hidden, weights = inputs(kind, lengths, m, D, 16, F32, device)
    cu = lengths_to_cu(lengths, device)
    upstream = normal(len(hidden) + 4 * m, D, device=device, seed=9)
    first = results(kernels, hidden, weights, cu, kind, m, upstream=upstream)
    other = hidden.clone()
    other[3:73] = normal(70, D, device=device, seed=11)
    second = results(kernels, other, weights, cu, kind, m, upstream=upstream)
    changed = slice(3 + m, 73 + 2 * m)
    keep = torch.ones(len(upstream), dtype=torch.bool, device=device)
    keep[changed] = False
    assert torch.equal(first["out"][keep], second["out"][keep])
    rows = [*range(3), *range(73, 94)]
    assert torch.equal(first["d hidden"][rows], second["d hidden"][rows])
    assert not torch.equal(first["out"], second["out"])


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_not_contiguous(kind, device):
    """Hidden states, weights and the incoming gradient: to the bit as their copies."""
    lengths, m, D, dtype = [3, 6], 2, 24, F16
    _, weights = inputs(kind, lengths, m, D, 16, dtype, device)
    across = {
        name: torch.stack((w, w), -1).select(-1, 0) if w.dim() == 1 else w.t().contiguous().t()
        for name, w in weights.items()
    }
    wide = normal(18, 50, dtype=dtype, device=device)
    views = (
        wide[:9, 3 : 3 + D],
        wide[:9, ::2][:, :D],
        normal(D, 9, dtype=dtype, device=device).t(),
        wide[:1, :D].expand(9, D),
    )
    grads = (
        normal(13, 30, dtype=dtype, device=device, seed=2)[:, 3 : 3 + D],
        normal(D, 13, dtype=dtype, device=device, seed=3).t(),
        normal(1, 1, dtype=dtype, device=device, seed=4).expand(13, D),
        normal(13, 2 * D, dtype=dtype, device=device, seed=6)[:, ::2],
    )
    args = (lengths_to_cu(lengths, device), kind, m)
    for view, grad in zip(views, grads, strict=True):
        assert not view.is_contiguous() and not grad.is_contiguous()
        got = results(kernels, view, across, *args, upstream=grad)
        copied = {name: w.contiguous() for name, w in across.items()}
        want = results(kernels, view.contiguous(), copied, *args, upstream=grad.contiguous())
        assert_equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_sources_past_2_31_elements(kind, device):
    """A cache of more than 2^31 elements, of which only the last rows are ever touched."""
    D, m, lengths = 64, 2, [3, 5]
    hidden, weights = inputs(kind, lengths, m, D, 16, F16, device)
    cache = torch.empty(2**25 + 16, D, dtype=F16, device=device)
    start = torch.tensor([2**25 + 10, 2**25 + 1], device=device)
    cache[start[0] : start[0] + 3], cache[start[1] : start[1] + 5] = hidden[:3], hidden[3:]
    cu = lengths_to_cu(lengths, device)
    layout, packed = Layout(cu, m, source_start=start), Layout(cu, m)
    values = list(weights.values())
    got = insert_fwd(kind, cache, layout, values, T=8, dtype=F16)
    want = insert_fwd(kind, hidden, packed, values, T=8, dtype=F16)
    for a, b in zip(got[:1], want[:1], strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_destinations_past_2_31_elements(kind, device):
    """Rows and prompts of a buffer beyond its first 2^31 elements, forward and backward."""
    D, m, lengths, far = 64, 2, [3, 5], 2**25 + 8
    hidden, weights = inputs(kind, lengths, m, D, 16, F16, device)
    values, cu = list(weights.values()), lengths_to_cu(lengths, device)
    insert_at = cu[:-1] + far
    order = torch.arange(far, far + 8, dtype=torch.int32, device=device)
    layout = Layout(cu, m, insert_at, order=order)
    buffer = torch.empty(far + 8 + 2 * m, D, dtype=F16, device=device)
    text, _ = packed_rows(lengths, m, device)
    buffer[far + text] = hidden
    common = dict(T=8, dtype=F16)
    out, *saved = insert_fwd(kind, None, layout, values, out=buffer, **common)
    want, *want_saved = insert_fwd(kind, hidden, Layout(cu, m), values, **common)
    assert torch.equal(out[far:], want)

    # The output serves as its own gradient, for a second buffer would be in the way.
    common = dict(T=8, p_drop=0.0, seed=None, need_weights=True, need_hidden=False)
    _, got = insert_bwd(kind, out, out, layout, values, *saved, **common)
    _, want = insert_bwd(kind, want, want, Layout(cu, m), values, *want_saved, **common)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0
