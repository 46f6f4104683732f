"""Prompt insertion in place, padded and from a cache; dropout; weights of another dtype."""

from __future__ import annotations

import pytest
import torch
from lpt_kernels.gather import gather_rows

from lpt_fast.insertion import gather_insert_prompt, insert_prompt_, insert_prompt_padded, reference
from tests.interpreter.insert_rule import (
    BF16,
    DTYPES,
    F16,
    F32,
    GENERATORS,
    KINDS,
    assert_equal,
    assert_rule,
    inputs,
    kernels,
    lengths_to_cu,
    make_weights,
    normal,
    packed_rows,
    results,
)
from tests.interpreter.insert_rule import poisoned_memory as poisoned_memory
from tests.interpreter.test_gather import make_store

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAN = float("nan")

# --- in place -------------------------------------------------------------------------------------


def filled(rows, lengths, m):
    """A packed buffer with the text in place and NaN where prompts go."""
    buffer = rows.new_full((len(rows) + len(lengths) * m, rows.shape[1]), NAN)
    buffer[packed_rows(lengths, m, rows.device)[0]] = rows
    return buffer


@pytest.mark.parametrize("case", [([1], 1), ([3, 70, 1], 5), ([2, 66], 20), ([], 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_in_place_equals_the_packed_form(kind, case, device):
    """To the bit: output and the gradients of the weights."""
    lengths, m = case
    dtype = DTYPES[(m + KINDS.index(kind)) % 3]
    hidden, weights = inputs(kind, lengths, m, 40, 24, dtype, device)
    cu = lengths_to_cu(lengths, device)
    seen = []

    def ours(hidden, cu, kind, weights, m):
        buffer = filled(hidden, lengths, m)
        out = insert_prompt_(buffer, cu, kind, weights, m, impl="triton")
        seen.append(out is buffer)
        return out

    upstream = normal(len(hidden) + len(lengths) * m, 40, dtype=dtype, device=device, seed=9)
    args = (cu, kind, m)
    got = results(ours, hidden, weights, *args, upstream=upstream, needs=weights)
    want = results(kernels, hidden, weights, *args, upstream=upstream, needs=weights)
    assert_equal(got, want)
    assert seen == [True]
    with torch.no_grad():
        buffer = filled(hidden, lengths, m)
        out = insert_prompt_(buffer, cu, kind, weights, m, impl="triton")
    assert out is buffer and torch.equal(buffer, want["out"])


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_with_context_and_dropout(kind, device):
    lengths, m = [9, 70], 5
    hidden, weights = inputs(kind, lengths, m, 40, 24, F32, device)
    cu = lengths_to_cu(lengths, device)
    kwargs = {
        "context": torch.tensor([(2, 5), (3, 69)], device=device, dtype=torch.int32),
        "last_token": True,
        "dropout_p": 0.25,
        "seed": torch.tensor([5], device=device),
    }
    got = insert_prompt_(filled(hidden, lengths, m), cu, kind, weights, m, impl="triton", **kwargs)
    assert torch.equal(got, kernels(hidden, cu, kind, weights, m, **kwargs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("ordered_sums")
def test_in_place_by_the_reference(kind, device):
    lengths, m = [3, 20, 1], 5
    hidden, weights = inputs(kind, lengths, m, 24, 16, F32, device)
    cu = lengths_to_cu(lengths, device)
    buffer = filled(hidden, lengths, m)
    out = insert_prompt_(buffer, cu, kind, weights, m, impl="reference")
    want = reference.insert_prompt(hidden, cu, kind, weights, m)
    assert out is buffer and torch.equal(out, want)


# --- padded ---------------------------------------------------------------------------------------

LEFT = [[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 0, 0, 1]]
RIGHT = [[1, 1, 1, 1, 0, 0, 0], [1] * 7, [1, 0, 0, 0, 0, 0, 0]]
HOLES = [[0, 1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0]]
CONTEXT = [[0, 0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0]]
MASKS = {
    "none": (None, None),
    "left": (LEFT, None),
    "right": (RIGHT, None),
    "holes": (HOLES, None),
    "context": (None, CONTEXT),
    "holes-context": (HOLES, [[0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0, 0], HOLES[2]]),
}


def masks_of(name, S, device):
    """The seven columns each stretched to S / 7."""
    attention, context = (
        None if mask is None else torch.tensor(mask, device=device).repeat_interleave(S // 7, 1)
        for mask in MASKS[name]
    )
    return attention, None if context is None else context.bool()


def padded_by(impl, **kwargs):
    def function(hidden, mask, kind, weights, m):
        return insert_prompt_padded(hidden, mask, kind, weights, m, impl=impl, **kwargs)[0]

    return function


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_padded(kind, name, device):
    """Under the rule against the reference; padding rows are copied whatever they hold."""
    turn = KINDS.index(kind) + list(MASKS).index(name)
    m, D, S, dtype = (2, 5, 1)[turn % 3], 33, 14, DTYPES[turn % 3]
    hidden, weights = inputs(kind, [S] * 3, m, D, 16, dtype, device)
    hidden = hidden.view(3, S, D)
    attention, context = masks_of(name, S, device)
    readable = context if context is not None else attention
    kwargs = {"context_mask": context, "last_token": turn % 2 == 0}
    upstream = normal(3, m + S, D, dtype=dtype, device=device, seed=9)
    args = (attention, kind, m)
    ours, plain = padded_by("triton", **kwargs), padded_by("reference", **kwargs)
    got = results(ours, hidden, weights, *args, upstream=upstream)
    same = results(plain, hidden, weights, *args, upstream=upstream)
    wide = {key: w.double() for key, w in weights.items()}
    oracle = results(plain, hidden.double(), wide, *args, upstream=upstream.double())
    assert_rule(got, same, oracle)

    out, mask = insert_prompt_padded(hidden, *args[:2], weights, m, impl="triton", **kwargs)
    _, want = insert_prompt_padded(hidden, *args[:2], weights, m, impl="reference", **kwargs)
    assert torch.equal(out, got["out"])
    assert mask is want is None if attention is None else torch.equal(mask, want)
    starts = [0] * 3 if attention is None else attention.int().argmax(1).tolist()
    for row, text, at in zip(out, hidden, starts, strict=True):
        assert torch.equal(torch.cat((row[:at], row[at + m :])), text)

    if readable is not None:
        dirty = hidden.masked_fill(~readable.bool()[..., None], NAN)
        again = results(ours, dirty, weights, *args, upstream=upstream)
        assert again["out"].isnan().sum() == dirty.isnan().sum()
        del again["out"]
        assert_equal(again, {key: got[key] for key in again})


@pytest.mark.parametrize("kind", KINDS)
def test_padded_equals_packed(kind, device):
    """What the rows of each example hold, where nothing is padded; and with strides of its own."""
    hidden, weights = inputs(kind, [70] * 2, 5, 24, 16, F32, device)
    cu = lengths_to_cu([70] * 2, device)
    packed = kernels(hidden, cu, kind, weights, 5)
    out, mask = insert_prompt_padded(hidden.view(2, 70, 24), None, kind, weights, 5, impl="triton")
    assert mask is None and torch.equal(out.flatten(0, 1), packed)
    across = hidden.view(2, 70, 24).transpose(0, 1).contiguous().transpose(0, 1)
    assert not across.is_contiguous()
    ones = torch.ones(2, 70, device=device, dtype=torch.bool)
    out, mask = insert_prompt_padded(across, ones, kind, weights, 5, impl="triton")
    assert torch.equal(out.flatten(0, 1), packed) and mask.dtype == torch.bool and mask.all()


# --- from a cache ---------------------------------------------------------------------------------

STORES = ["bf16", "fp16", "fp32", "int8", "fp8"]
LENGTHS, INDEX = [3, 33, 1, 17, 5], [4, 1, 1, 0, 2]


@pytest.mark.parametrize(
    "kind, store_kind",
    [(k, s) for i, k in enumerate(KINDS) for j, s in enumerate(STORES) if j > 2 or (i + j) % 2],
)
@pytest.mark.usefixtures("ordered_sums")
def test_gather_insert_prompt_equals_gather_and_insert(kind, store_kind, device):
    """To the bit, by the kernels and by the reference; output and gradients of the weights.

    For codes of 8 bits a GPU's tensor cores are handed the columns in another order than for rows
    of 16 bits, and sum in it: there the text is equal to the bit and the rest is under the rule.
    """
    D, m = 40, 5
    store = make_store(store_kind, D, device, LENGTHS)
    index = torch.tensor(INDEX, device=device)
    lengths = [LENGTHS[e] for e in INDEX]
    cu, total = lengths_to_cu(lengths, device), sum(lengths)
    dtype = F16 if (store_kind, kind) in (("int8", "npg"), ("fp8", "mppg")) else None
    context = torch.tensor([(0, n) if n < 9 else (2, 9) for n in lengths], device=device)
    kwargs = {"context": context, "last_token": store_kind == "int8"}
    out_dtype = dtype or (store.hidden.dtype if store.kind == "plain" else BF16)
    weights = make_weights(kind, D, 24, m, out_dtype, 0, device)
    upstream = normal(total + len(lengths) * m, D, dtype=out_dtype, device=device, seed=9)

    for impl in ("triton", "reference"):

        def fused(_, cu, kind, weights, m, impl=impl):
            return gather_insert_prompt(
                store, index, cu, total, kind, weights, m, dtype=dtype, impl=impl, **kwargs
            )

        if impl == "triton":
            packed = gather_rows(store, index, dtype=dtype, cu_seqlens=cu, total=total)[0]
            two_steps = kernels
        else:
            scales = (store.token_scale, store.channel_scale)
            packed = reference.gather_rows(
                store.hidden, store.cu_seqlens, index, cu, total, out_dtype, *scales
            )
            two_steps = reference.insert_prompt
        args = (cu, kind, m)
        got = results(fused, packed, weights, *args, upstream=upstream, needs=weights)
        want = results(
            two_steps, packed, weights, *args, upstream=upstream, needs=weights, **kwargs
        )
        assert got["out"].dtype == out_dtype
        if impl == "triton" and device.type == "cuda" and store_kind in ("int8", "fp8"):
            text = packed_rows(lengths, m, device)[0]
            assert torch.equal(got["out"][text], packed)
            wide = {name: w.double() for name, w in weights.items()}
            plain = [(packed, weights, upstream), (packed.double(), wide, upstream.double())]
            same, oracle = (
                results(reference.insert_prompt, x, w, *args, upstream=g, needs=weights, **kwargs)
                for x, w, g in plain
            )
            assert_rule(got, same, oracle)
        else:
            assert_equal(got, want)


def test_gather_insert_prompt_refuses_what_the_store_does_not_hold(device):
    store = make_store("bf16", 24, device, LENGTHS)
    weights = make_weights("npg", 24, 16, 2, BF16, 0, device)
    cu = lengths_to_cu([3, 33], device)
    if device.type == "cpu":
        for impl in ("triton", "reference"):
            for index, want in (([0, 9], "index.*9"), ([0, 3], r"cu_seqlens.*3[36]\]")):
                index = torch.tensor(index)
                with pytest.raises(ValueError, match=want):
                    gather_insert_prompt(store, index, cu, 36, "npg", weights, 2, impl=impl)
    with pytest.raises(ValueError, match=r"`proj_down.weight` must .*24\], got \[16, 20\]"):
        narrow = make_weights("npg", 20, 16, 2, BF16, 0, device)
        gather_insert_prompt(
            store, torch.tensor([0, 1], device=device), cu, 36, "npg", narrow, 2, impl="triton"
        )


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_a_fraction_and_scales_it(p, device):
    """Of a prompt of ones for each example, whose gradient is the same mask, made again."""
    lengths, m, D = [1, 70, 3], 10, 120
    hidden, prompt = normal(74, D, device=device), torch.ones(3, m, D, device=device)
    upstream = torch.ones(74 + 3 * m, D, device=device)
    cu, seed = lengths_to_cu(lengths, device), torch.tensor([7], device=device)
    got = results(
        kernels,
        hidden,
        {"prompt_embedding.weight": prompt},
        *(cu, "static", m),
        upstream=upstream,
        dropout_p=p,
        seed=seed,
    )
    text, rows = packed_rows(lengths, m, device)
    mask = got["out"][rows]
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
    n, spread = mask.numel(), (p * (1 - p)) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 4 * spread / n**0.5
    # No row, column or example stands out, and none repeats another.
    for dims in ((0, 1), (0, 2), (1, 2)):
        share = kept.double().mean(dims)
        assert (share - (1 - p)).abs().max() < 5 * spread / (n / share.numel()) ** 0.5
    assert len(kept.view(-1, D).unique(dim=0)) == 3 * m
    assert torch.equal(got["d prompt_embedding.weight"], mask)
    assert torch.equal(got["out"][text], hidden)
    assert torch.equal(got["d hidden"], torch.ones_like(hidden))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_under_the_rule(kind, device):
    """Output and gradients with the kernels' own mask given to the reference."""
    lengths, m, p = [1, 70, 3], 5, 0.4
    dtype = DTYPES[KINDS.index(kind) % 3]
    hidden, weights = inputs(kind, lengths, m, 40, 24, dtype, device)
    upstream = normal(74 + 3 * m, 40, dtype=dtype, device=device, seed=9)
    args = (lengths_to_cu(lengths, device), kind, m)
    seed = torch.tensor([11], device=device)
    got = results(kernels, hidden, weights, *args, upstream=upstream, dropout_p=p, seed=seed)
    again = results(kernels, hidden, weights, *args, upstream=upstream, dropout_p=p, seed=seed)
    assert_equal(got, again)
    mask = got["out"][packed_rows(lengths, m, device)[1]] != 0
    assert 0.4 < mask.double().mean() < 0.8
    plain = {"dropout_p": p, "dropout_mask": mask}
    same = results(reference.insert_prompt, hidden, weights, *args, upstream=upstream, **plain)
    wide = {name: w.double() for name, w in weights.items()}
    oracle = results(
        reference.insert_prompt,
        hidden.double(),
        wide,
        *args,
        upstream=upstream.double(),
        **plain,
    )
    assert_rule(got, same, oracle)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds(kind, device):
    lengths, m = [3, 20], 5
    hidden, weights = inputs(kind, lengths, m, 40, 24, F32, device)
    cu = lengths_to_cu(lengths, device)

    def run(p=0.5, seed=None):
        seed = None if seed is None else torch.tensor([seed], device=device)
        return kernels(hidden, cu, kind, weights, m, dropout_p=p, seed=seed)

    assert torch.equal(run(seed=3), run(seed=3))
    assert not torch.equal(run(seed=3), run(seed=4))
    assert torch.equal(run(p=0.0, seed=3), run(p=0.0))
    torch.manual_seed(0)
    first, second = run(), run()
    torch.manual_seed(0)
    assert torch.equal(run(), first) and torch.equal(run(), second)
    assert not torch.equal(first, second)
    # Without dropout nothing is drawn.
    state = torch.random.get_rng_state()
    run(p=0.0)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- weights of another dtype ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_wider_weights_are_rounded_first(kind, dtype, device):
    """fp32 masters on 16-bit states; their gradients are fp32."""
    lengths, m = [3, 70], 5
    hidden, _ = inputs(kind, lengths, m, 40, 24, dtype, device)
    weights = make_weights(kind, 40, 24, m, F32, 0, device)
    upstream = normal(73 + 2 * m, 40, dtype=dtype, device=device, seed=9)
    args = (lengths_to_cu(lengths, device), kind, m)
    got = results(kernels, hidden, weights, *args, upstream=upstream)
    narrow = {name: w.to(dtype) for name, w in weights.items()}
    want = results(kernels, hidden, narrow, *args, upstream=upstream)
    for name in ("out", "d hidden"):
        assert torch.equal(got[name], want[name])
    for name in weights:
        assert got[f"d {name}"].dtype == F32
        assert torch.equal(got[f"d {name}"].to(dtype), want[f"d {name}"])


@pytest.mark.parametrize("kind", GENERATORS)
def test_narrower_weights(kind, device):
    lengths, m = [3, 20], 5
    hidden, _ = inputs(kind, lengths, m, 40, 24, F32, device)
    weights = make_weights(kind, 40, 24, m, BF16, 0, device)
    upstream = normal(23 + 2 * m, 40, device=device, seed=9)
    args = (lengths_to_cu(lengths, device), kind, m)
    got = results(kernels, hidden, weights, *args, upstream=upstream)
    wide = {name: w.float() for name, w in weights.items()}
    want = results(kernels, hidden, wide, *args, upstream=upstream)
    assert torch.equal(got["out"], want["out"])
    for name in weights:
        assert torch.equal(got[f"d {name}"], want[f"d {name}"].to(BF16))
