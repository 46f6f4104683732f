"""Prompt insertion as an operator of PyTorch: opcheck, torch.compile, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from lpt_fast.insertion import (
    gather_insert_prompt,
    insert_prompt,
    insert_prompt_,
    insert_prompt_padded,
)
from tests.interpreter.insert_rule import (
    BF16,
    F16,
    F32,
    GENERATORS,
    KINDS,
    assert_equal,
    inputs,
    kernels,
    lengths_to_cu,
    make_weights,
    normal,
    on_device,
    packed_rows,
    results,
)
from tests.interpreter.test_gather import make_store

IMPLS = ("triton", "reference")
OPS = torch.ops.lpt_fast

# --- opcheck --------------------------------------------------------------------------------------


def samples(kind, device):
    """Arguments of the forward operator, at two of its forms."""
    m, D, lengths = 2, 24, [3, 5]
    hidden, weights = inputs(kind, lengths, m, D, 16, F32, device)
    cu, weights = lengths_to_cu(lengths, device), list(weights.values())
    seed = torch.tensor([3], device=device)
    start = torch.tensor([1, 3], dtype=torch.int32, device=device)
    count = torch.tensor([2, 4], dtype=torch.int32, device=device)
    order = torch.arange(8, dtype=torch.int32, device=device)
    source = torch.tensor([4, 0], device=device)
    places, settings = (None,) * 4, (kind, m, 8, False, 0.0)
    yield hidden, cu, weights, *places, None, None, None, None, *settings, F32
    places, settings = (start, start, count, order), (kind, m, 8, True, 0.5)
    yield hidden, cu, weights, *places, None, None, None, seed, *settings, F32
    codes, token, channel = hidden.to(torch.int8), normal(8, device=device).abs(), hidden[0].abs()
    settings = (kind, m, 8, False, 0.0)
    narrow = [w.to(F16) for w in weights]
    yield codes, cu, narrow, *(None,) * 4, source, token, channel, None, *settings, F16


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, device):
    for i, args in enumerate(samples(kind, device)):
        # Rows of `left` that no bin goes on in are not written, so that two runs differ there; what
        # is left out is below, with torch.compile.
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(OPS.insert_prompt_fwd, args, test_utils=utils)
        if i == 2:
            continue
        _, cu, weights, *places, _, _, _, seed = args[:11]
        settings = args[11:16]
        out, *saved = OPS.insert_prompt_fwd(*args)
        buffer = out.clone()
        torch.library.opcheck(
            OPS.insert_prompt_into,
            (buffer, cu, weights, *places, seed, *settings),
            test_utils=utils,
        )
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                OPS.insert_prompt_bwd,
                (out, out, cu, weights, *places, *saved, seed, *settings, *needs),
            )


# --- torch.compile --------------------------------------------------------------------------------


def form(name, impl):
    """A form as a function of (hidden, cu, kind, weights, m)."""
    if name == "padded":

        def function(hidden, cu, kind, weights, m):
            B = cu.shape[0] - 1
            padded = hidden.view(B, -1, hidden.shape[1])
            mask = torch.ones_like(padded[..., 0], dtype=torch.int64)
            mask[:, 0] = 0
            return insert_prompt_padded(padded, mask, kind, weights, m, impl=impl)[0].flatten(0, 1)
    else:

        def function(hidden, cu, kind, weights, m):
            return insert_prompt(hidden, cu, kind, weights, m, impl=impl)

    return function


COMPILED = [(kind, "aot_eager", impl, "packed") for kind in KINDS for impl in IMPLS]
COMPILED += [("appg", "eager", impl, "packed") for impl in IMPLS]
COMPILED += [("mppg", "eager", "triton", "packed")]
COMPILED += [("mppg", "aot_eager", impl, "padded") for impl in IMPLS]


@pytest.mark.parametrize("kind, backend, impl, name", COMPILED)
@pytest.mark.usefixtures("ordered_sums")
def test_compiled_without_graph_breaks(kind, backend, impl, name, device):
    """Forward and backward equal to eager, also when T and B change."""
    torch._dynamo.reset()
    m, D = 5, 24
    ours = form(name, impl)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for lengths in ([3, 3], [7, 7], [35, 35, 35]):
        hidden, weights = inputs(kind, lengths, m, D, 16, F32, device)
        upstream = normal(len(hidden) + len(lengths) * m, D, device=device, seed=9)
        args = (lengths_to_cu(lengths, device), kind, m)
        got = results(compiled, hidden, weights, *args, upstream=upstream)
        want = results(ours, hidden, weights, *args, upstream=upstream)
        if name == "packed":
            assert_equal(got, want)
        else:  # a graph orders the rows as for masks with holes, and sums in that order
            for key, tensor in want.items():
                torch.testing.assert_close(got[key], tensor)


def test_a_change_of_length_does_not_compile_again_and_again(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(form("packed", "triton"), fullgraph=True, backend=counter)
    for n in (3, 5, 8, 13, 21):
        hidden, weights = inputs("mppg", [n, 2 * n], 2, 24, 16, F32, device)
        compiled(hidden, lengths_to_cu([n, 2 * n], device), "mppg", weights, 2)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind, backend", [("static", "eager"), *((k, "aot_eager") for k in KINDS)])
def test_compiled_in_place(kind, backend, device):
    """With dropout of a given seed; the gradient reaches the weights through the buffer."""
    torch._dynamo.reset()
    lengths, m, D = [3, 20], 2, 24
    hidden, weights = inputs(kind, lengths, m, D, 16, F32, device)
    cu, seed = lengths_to_cu(lengths, device), torch.tensor([3], device=device)
    text, _ = packed_rows(lengths, m, device)

    def ours(hidden, cu, kind, weights, m):
        buffer = hidden.new_zeros(len(hidden) + 2 * m, D).index_copy(0, text, hidden)
        return insert_prompt_(buffer, cu, kind, weights, m, dropout_p=0.5, seed=seed, impl="triton")

    upstream = normal(len(hidden) + 2 * m, D, device=device, seed=9)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    args = (cu, kind, m)
    got = results(compiled, hidden, weights, *args, upstream=upstream, needs=weights)
    want = results(ours, hidden, weights, *args, upstream=upstream, needs=weights)
    assert_equal(got, want)
    assert len(want) == 1 + len(weights)


# --- second derivatives ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused(kind, device):
    """Rather than wrong."""
    lengths, m = [3, 5], 2
    hidden, weights = inputs(kind, lengths, m, 24, 16, F32, device)
    tensors = [hidden.requires_grad_(), *(w.requires_grad_() for w in weights.values())]
    out = kernels(hidden, lengths_to_cu(lengths, device), kind, weights, m)
    with pytest.raises((RuntimeError, NotImplementedError), match="deriv|differentia|autograd"):
        first = torch.autograd.grad(out.pow(2).sum(), tensors, create_graph=True)
        torch.autograd.grad(sum(g.pow(2).sum() for g in first), tensors)


# --- bad input ------------------------------------------------------------------------------------

CU, META = torch.tensor([0, 3, 8], dtype=torch.int32), torch.device("meta")


def w(kind="npg", D=24, r=16, m=2, **changes):
    weights = make_weights(kind, D, r, m, F32)
    return {name: t for name, t in (weights | changes).items() if t is not None}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# The argument changed, by its name; what it becomes; the message: argument, expected, got.
SHAPES_AND_TYPES = [
    ("hidden", torch.zeros(8, 24, dtype=torch.int64), "`hidden` must be .*float16.*got .*int64"),
    ("hidden", torch.zeros(8, 24, dtype=torch.bool), "`hidden` must be .*float16.*got .*bool"),
    (
        "hidden",
        torch.zeros(8, 24, dtype=torch.float64),
        "`hidden` must be .*float32.*got .*float64",
    ),
    ("hidden", torch.zeros(1, 8, 24), r"`hidden` must .*\[T, D\].*got \[1, 8, 24\]"),
    ("hidden", torch.zeros(24), r"`hidden` must .*\[T, D\].*got \[24\]"),
    ("hidden", torch.zeros(8, 20), r"`proj_down.weight` must .*20\], got \[16, 24\]"),
    ("cu_seqlens", CU.long(), "`cu_seqlens` must be .*int32, got .*int64"),
    ("cu_seqlens", CU[None], r"`cu_seqlens` must .*\[any\], got \[1, 3\]"),
    ("cu_seqlens", CU[:0], "`cu_seqlens` must hold .*got none"),
    ("cu_seqlens", CU.to(META), "`cu_seqlens` must be on (cpu|cuda).*got meta"),
    ("kind", "lstm", "`kind` must be one of static, npg.*got 'lstm'"),
    ("kind", "static", "`weights` of static must hold prompt_embedding.weight, got proj_down"),
    ("weights", {}, "`weights` of npg must hold proj_down.weight.*got nothing"),
    ("weights", w(**{"proj_up.bias": None}), "`weights` of npg must hold .*proj_up.bias, got"),
    ("weights", w(m=3), r"`proj_up.weight` must .*\[48, 16\], got \[72, 16\]"),
    ("weights", w("appg"), r"`proj_up.weight` must .*\[48, 16\], got \[24, 16\]"),
    ("weights", w(D=20), r"`proj_down.weight` must .*24\], got \[16, 20\]"),
    ("weights", w(r=0), "`proj_down.weight` must have at least one row"),
    (
        "weights",
        w(**{"proj_down.bias": torch.zeros(15)}),
        r"`proj_down.bias` must .*\[16\], got \[15\]",
    ),
    (
        "weights",
        w(**{"proj_up.bias": torch.zeros(48, dtype=torch.int32)}),
        "`proj_up.bias` must be .*float16.*got .*int32",
    ),
    (
        "weights",
        w(**{"proj_down.weight": torch.zeros(16, 24, device=META)}),
        "`proj_down.weight` must be on (cpu|cuda).*got meta",
    ),
    ("num_virtual_tokens", 0, "`num_virtual_tokens` must .*at least 1, got 0"),
    ("num_virtual_tokens", -2, "`num_virtual_tokens` must .*at least 1, got -2"),
    ("num_virtual_tokens", 2.0, "`num_virtual_tokens` must .*at least 1, got 2.0"),
    ("num_virtual_tokens", True, "`num_virtual_tokens` must .*at least 1, got True"),
    ("context", torch.zeros(2, 3).int(), r"`context` must .*\[2, 2\], got \[2, 3\]"),
    ("context", torch.ones(2, 2), "`context` must be .*int32.*got .*float32"),
    ("dropout_p", 1.0, r"`dropout_p` must be in \[0, 1\), got 1.0"),
    ("dropout_p", -0.1, r"`dropout_p` must be in \[0, 1\), got -0.1"),
    ("dropout_p", float("nan"), r"`dropout_p` must be in \[0, 1\), got nan"),
    ("seed", torch.tensor(3), r"`seed` must .*\[1\], got \[\]"),
    ("seed", int32(3), "`seed` must be .*int64, got .*int32"),
    ("seed", torch.tensor([3], device=META), "`seed` must be on (cpu|cuda).*got meta"),
    ("impl", "cuda", "`impl` must be one of auto, triton, reference, got 'cuda'"),
]
# Looked at on the CPU alone; on CUDA these would be assertions in the stream.
VALUES = [
    ("cu_seqlens", int32(0, 3, 9), "`cu_seqlens` must .*end at 8.*got 0 and 9"),
    ("cu_seqlens", int32(1, 3, 8), "`cu_seqlens` must begin with 0.*got 1 and 8"),
    ("cu_seqlens", int32(0, 5, 3, 8), r"`cu_seqlens` must increase.*got \[0, 5, 3, 8\]"),
    ("cu_seqlens", int32(0, 3, 3, 8), r"`cu_seqlens` must increase.*got \[0, 3, 3, 8\]"),
    ("cu_seqlens", int32(0), "`cu_seqlens` must .*end at 8.*got 0 and 0"),
    ("context", int32(0, 3, 0, 6).view(2, 2), r"`context` must .*got .*6.*lengths \[3, 5\]"),
    ("context", int32(0, 3, -1, 5).view(2, 2), "`context` must .*got .*-1"),
    ("context", int32(0, 3, 2, 2).view(2, 2), r"`context` must .*got .*\[2, 2\]"),
    ("context", int32(2, 1, 0, 5).view(2, 2), r"`context` must .*got \[\[2, 1\]"),
]


def moved(value, device):
    """To the device, but for what is elsewhere on purpose."""
    if isinstance(value, dict):
        return {name: moved(t, device) for name, t in value.items()}
    return on_device(value, device) if isinstance(value, torch.Tensor) else value


def call(name, value, device, impl="triton"):
    arguments = {
        "hidden": torch.zeros(8, 24),
        "cu_seqlens": CU,
        "kind": "npg",
        "weights": w(),
        "num_virtual_tokens": 2,
        "impl": impl,
        "dropout_p": 0.5 if name == "seed" else 0.0,
    }
    return insert_prompt(**moved(arguments | {name: value}, device))


@pytest.mark.parametrize("name, value, message", SHAPES_AND_TYPES, ids=lambda v: str(v)[:24])
def test_bad_shapes_and_types(name, value, message, device):
    with pytest.raises(ValueError, match=message):
        call(name, value, device)
    if name != "seed" and getattr(value, "dtype", None) != torch.float64:
        with pytest.raises(ValueError, match=message):
            call(name, value, device, impl="cuda" if name == "impl" else "reference")


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("name, value, message", VALUES, ids=lambda v: str(v)[:24])
def test_bad_values(name, value, message, impl, device):
    if device.type == "cuda":
        pytest.skip("an assertion in the stream, which would end the process")
    with pytest.raises(ValueError, match=message):
        call(name, value, device, impl)


def test_the_seed_is_that_of_the_kernels(device):
    seed = torch.tensor([3], device=device)
    with pytest.raises(ValueError, match="`seed` .*impl='reference'.*leave it out"):
        call("seed", seed, device, impl="reference")


def test_static_prompts_of_the_wrong_size(device):
    for shape in ((3, 24), (2, 20), (3, 2, 24), (2, 3, 24), (48,)):
        weights = {"prompt_embedding.weight": torch.zeros(shape, device=device)}
        args = (torch.zeros(8, 24, device=device), CU.to(device), "static", weights, 2)
        got = r"`prompt_embedding.weight` must .*2, 24\], got \[" + str(shape[0])
        with pytest.raises(ValueError, match=got):
            insert_prompt(*args)


def test_bad_buffers(device):
    cu, weights = CU.to(device), moved(w(), device)
    buffer = torch.zeros(12, 24, device=device)

    def run(buffer, impl="triton"):
        return insert_prompt_(buffer, cu, "npg", weights, 2, impl=impl)

    for impl in ("triton", "reference"):
        with pytest.raises(ValueError, match="`buffer` must be contiguous, got strides"):
            run(torch.zeros(24, 12, device=device).t(), impl)
        with pytest.raises(ValueError, match=r"`buffer` must .*\[T \+ B m, D\], got \[2, 6, 24\]"):
            run(buffer.view(2, 6, 24), impl)
        with pytest.raises(ValueError, match="`buffer` must be .*float16.*got .*int64"):
            run(buffer.long(), impl)
        with pytest.raises(ValueError, match="`buffer` requires a gradient, expected a constant"):
            run(buffer.clone().requires_grad_(), impl)
        if device.type == "cpu":
            with pytest.raises(ValueError, match="`cu_seqlens` must .*end at 7.*got 0 and 8"):
                run(buffer[:11], impl)


def test_bad_masks(device):
    hidden, weights = torch.zeros(2, 4, 24, device=device), moved(w(), device)
    ones = torch.ones(2, 4, device=device)

    def run(hidden, mask, **kwargs):
        return insert_prompt_padded(hidden, mask, "npg", weights, 2, **kwargs)

    for impl in ("triton", "reference"):
        with pytest.raises(ValueError, match=r"`hidden` must .*\[B, S, D\], got \[8, 24\]"):
            run(hidden.view(8, 24), None, impl=impl)
        with pytest.raises(ValueError, match=r"`attention_mask` must .*\[2, 4\], got \[2, 3\]"):
            run(hidden, ones[:, :3], impl=impl)
        with pytest.raises(ValueError, match=r"`context_mask` must .*\[2, 4\], got \[4, 2\]"):
            run(hidden, None, context_mask=ones.t(), impl=impl)
        with pytest.raises(ValueError, match="`attention_mask` must be .*got .*float64"):
            run(hidden, ones.double(), impl=impl)
        if device.type == "cpu":
            empty = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
            for kwargs in ({}, {"context_mask": empty}):
                with pytest.raises(ValueError, match="_mask` must have a token in each row"):
                    run(hidden, ones if kwargs else empty, impl=impl, **kwargs)


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_cache_gets_no_gradient(kind, device):
    store = make_store("int8", 24, device, [3, 5])
    weights = moved(make_weights(kind, 24, 16, 2, BF16), device)
    index = torch.tensor([0, 1], device=device)
    out = gather_insert_prompt(store, index, CU.to(device), 8, kind, weights, 2, impl="triton")
    assert out.dtype == BF16 and not out.requires_grad
