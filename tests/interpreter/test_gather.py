"""gather_rows against plain PyTorch, bit for bit."""

from __future__ import annotations

import pytest
import torch
from lpt_kernels import gather
from lpt_kernels.gather import (
    BLOCK_B,
    MAX_ROWS,
    GatherConfig,
    Store,
    gather_rows,
    gather_rows_fwd_kernel,
    source_rows,
    source_rows_fwd_kernel,
)
from lpt_kernels.launch import record

from tests.interpreter.insert_rule import on_device

BF16, F16, F32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
TYPES = ["bf16", "fp16", "fp32", "int8", "fp8"]
LENGTHS = [3, 300, 1, 17, 1, 64, 0, 5]
INDEX = [4, 1, 1, 7, 6, 0, 2, 4]
META = torch.device("meta")


def int8_quantise(x):
    """fp32 [N, D] -> int8 codes, token_scale [N], channel_scale [D]."""
    channel = x.abs().amax(0).clamp_min(1e-6)
    token = (x / channel).abs().amax(1).clamp_min(1e-6) / 127
    return (x / channel / token[:, None]).round().clamp(-127, 127).to(torch.int8), token, channel


def fp8_quantise(x):
    """fp32 [N, D] -> e4m3fn codes, token_scale [N]."""
    token = x.abs().amax(1).clamp_min(1e-6) / 448
    return (x / token[:, None]).to(E4M3), token


def moved(x, device):
    return on_device(x, device) if isinstance(x, torch.Tensor) else x


def make_store(kind, d, device, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), d, generator=generator)
    x[:, ::7] *= 30  # outlier channels, as hidden states have
    cu = torch.tensor([0, *lengths]).cumsum(0)
    if kind == "int8":
        codes, token, channel = int8_quantise(x)
        parts = (codes, cu, token, channel)
    elif kind == "fp8":
        codes, token = fp8_quantise(x)
        parts = (codes, cu, token)
    else:
        parts = (x.to({"bf16": BF16, "fp16": F16, "fp32": F32}[kind]), cu)
    return Store(*(part.to(device) for part in parts))


def dequantised(store, rows, dtype):
    if store.kind == "plain":
        return store.hidden[rows].to(dtype)
    value = store.codes[rows]
    value = (value.view(E4M3) if store.kind == "fp8" else value).float()
    if store.kind == "int8":
        value = value * store.channel_scale
    return (value * store.token_scale[rows, None]).to(dtype)


def reference(store, index, m, out):
    """What `out` must hold afterwards, and the cu_seqlens of the text rows."""
    out, cu = out.clone(), [0]
    spans = store.cu_seqlens.tolist()
    for b, e in enumerate(index):
        rows = torch.arange(spans[e], spans[e + 1], device=out.device)
        first = cu[-1] + m * (b + 1)
        out[first : first + len(rows)] = dequantised(store, rows, out.dtype)
        cu.append(cu[-1] + len(rows))
    return out, torch.tensor(cu, dtype=torch.int32, device=out.device)


def poisoned(rows, d, dtype, device):
    """Random contents: a row of text not written shows, and so does a free row written."""
    generator = torch.Generator().manual_seed(99)
    return (torch.randn(rows, d, generator=generator) * 1000).to(dtype).to(device)


def assert_same_bits(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    assert torch.equal(got.contiguous().view(bits), want.contiguous().view(bits))


def check(store, index, m, dtype, device, index_dtype=torch.int64):
    spans = store.cu_seqlens.tolist()
    total = sum(spans[e + 1] - spans[e] for e in index)
    out = poisoned(total + m * len(index), store.hidden.shape[1], dtype, device)
    want, cu = reference(store, index, m, out)
    where = torch.tensor(index, dtype=index_dtype, device=device)
    got, got_cu = gather_rows(store, where, m, out=out)
    assert got is out
    assert_same_bits(got, want)
    assert_same_bits(got_cu, cu)


@pytest.mark.parametrize("m", [0, 1, 5, 20])
@pytest.mark.parametrize("d", [24, 384, 1000])
@pytest.mark.parametrize("kind", TYPES)
def test_equals_pytorch_bit_for_bit(kind, d, m, device):
    store = make_store(kind, d, device)
    dtype = store.hidden.dtype if store.kind == "plain" else BF16
    index_dtype = torch.int32 if m == 5 else torch.int64
    # The interpreter is slow: the long example twice, once or not at all by the width of a row.
    index = INDEX if d == 24 else [4, 7, 1, 6, 0, 2, 4] if m in (0, 5) else [4, 3, 3, 6, 0, 2]
    check(store, index, m, dtype, device, index_dtype)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("kind", TYPES)
def test_output_dtype(kind, dtype, device):
    store = make_store(kind, 24, device, [3, 1, 9])
    if store.kind == "plain":  # ties, subnormals and what overflows or is lost in 16 bits
        # (the interpreter widens bf16 subnormals wrongly: none of those).
        tiny = 2e-38 if kind == "bf16" else 1e-40
        edge = [65519.9, 65520.0, 1e30, 3e38, 6e-8, tiny, 0.0, -0.0, 1.00390625, 1.01171875]
        store.hidden[0, : len(edge)] = torch.tensor(edge, device=device).to(store.hidden.dtype)
    check(store, [2, 0, 0, 1], 2, dtype, device)
    packed, _ = gather_rows(store, torch.tensor([1], device=device), dtype=dtype)
    assert packed.dtype == dtype
    assert_same_bits(packed, dequantised(store, torch.tensor([3], device=device), dtype))


def test_nan_and_infinity_stay(device):
    store = make_store("fp32", 24, device, [2])
    store.hidden[1, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    for dtype in (BF16, F16, F32):
        got, _ = gather_rows(store, torch.tensor([0], device=device), dtype=dtype)
        assert torch.equal(got[1].float().isnan(), store.hidden[1].isnan())
        assert got[1, 1:3].tolist() == [float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("given", [torch.uint8, E4M3])
def test_every_fp8_code(given, dtype, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).repeat(3, 1)
    token_scale = torch.tensor([1.0, 0.0137, 2e-38], device=device)
    store = Store(codes.view(given), torch.tensor([0, 3], device=device), token_scale)
    got, _ = gather_rows(store, torch.tensor([0], device=device), dtype=dtype)
    want = (codes.view(E4M3).float() * token_scale[:, None]).to(dtype)
    assert want[0].isnan().sum() == 2 and (want[0] == 2**-9).sum() == 1
    assert torch.equal(got.isnan(), want.isnan())
    assert_same_bits(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_int8_is_scaled_in_the_documented_order(device):
    codes = torch.arange(-128, 128, device=device).to(torch.int8)[:, None].repeat(1, 24)
    generator = torch.Generator().manual_seed(1)
    token = torch.rand(256, generator=generator).to(device)
    channel = torch.rand(24, generator=generator).to(device)
    store = Store(codes, torch.tensor([0, 256], device=device), token, channel)
    want = codes.float() * channel * token[:, None]
    assert not torch.equal(want, codes.float() * token[:, None] * channel)  # the order shows
    got, _ = gather_rows(store, torch.tensor([0], device=device), dtype=F32)
    assert_same_bits(got, want)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("m", [0, 5])
def test_empty_batches(kind, m, device):
    store = make_store(kind, 24, device)
    got, cu = gather_rows(store, torch.tensor([], dtype=torch.int64, device=device), m)
    assert got.shape == (0, 24) and cu.tolist() == [0] and cu.dtype == torch.int32
    check(store, [6, 6], m, got.dtype, device)  # no text, only free rows


def test_a_store_without_examples(device):
    store = Store(torch.empty(0, 24, device=device), torch.zeros(1, dtype=torch.int32).to(device))
    none = torch.tensor([], dtype=torch.int32, device=device)
    assert gather_rows(store, none, 3)[0].shape == (0, 24)
    with pytest.raises(ValueError, match="index has 1 entries.*fill the store"):
        gather_rows(store, none.new_zeros(1))


@pytest.mark.parametrize("kind", TYPES)
def test_rows_further_apart_than_d(kind, device):
    full = make_store(kind, 40, device)
    channel = None if full.channel_scale is None else full.channel_scale[8:32]
    store = Store(full.hidden[:, 8:32], full.cu_seqlens.int(), full.token_scale, channel)
    assert store.hidden.stride(0) == 40
    wide = poisoned(30, 50, F32, device)
    out = wide[2:22, 10:34]  # 9 + 1 + 5 rows of text, but 20 are asked for below
    want, _ = reference(store, [5 - 1, 7, 0], 3, out[: 1 + 5 + 3 + 9])
    kept = wide.clone()
    gather_rows(store, torch.tensor([4, 7, 0], device=device), 3, out=out[:18])
    assert_same_bits(out[:18], want)
    kept[2:20, 10:34] = want
    assert_same_bits(wide, kept)  # and nothing beside it


def test_total_and_cu_seqlens_by_the_caller(device):
    store = make_store("bf16", 24, device)
    index = torch.tensor(INDEX, device=device)
    want, cu = gather_rows(store, index)
    for given in ({"total": len(want)}, {"cu_seqlens": cu}, {"total": len(want), "cu_seqlens": cu}):
        got, got_cu = gather_rows(store, index, **given)
        assert_same_bits(got, want)
        assert_same_bits(got_cu, cu)


def test_source_rows(device):
    store = make_store("fp8", 24, device)
    index = torch.tensor([7, 0, 2], dtype=torch.int32, device=device)
    got = source_rows(store, index)
    assert got.dtype == torch.int64 and got.tolist() == [386, 0, 303]
    cu = torch.tensor([0, 5, 8, 9], dtype=torch.int32, device=device)
    assert torch.equal(source_rows(store, index, cu_seqlens=cu, total=9), got)
    if device.type == "cpu":
        for given in ({"total": 8}, {"cu_seqlens": cu - 1}):
            with pytest.raises(ValueError, match="expected .*9"):
                source_rows(store, index, **given)


def test_more_examples_than_a_look_up_takes_at_a_time(device):
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(0, 3, (500,), generator=generator).tolist()
    store = make_store("fp16", 24, device, lengths)
    index = torch.randint(0, 500, (2 * BLOCK_B + 3,), generator=generator)
    check(store, index.tolist(), 1, F16, device)
    strided = index.to(device)[::2]
    assert torch.equal(source_rows(store, strided), store.cu_seqlens[strided])


@pytest.mark.parametrize(
    "config", [GatherConfig(1, 16), GatherConfig(2, 256), GatherConfig(64, 32)]
)
def test_every_cut_gives_the_same(config, device, monkeypatch):
    monkeypatch.setattr(GatherConfig, "default", classmethod(lambda cls, d: config))
    check(make_store("int8", 40, device), [4, 7, 3, 6, 0], 2, BF16, device)


def test_candidates_fit_any_width():
    for d in (1, 24, 384, 1000, 5120):
        for config in (GatherConfig.default(d), *GatherConfig.candidates(d)):
            for block in (config.BLOCK_T, config.BLOCK_D):
                assert block > 0 and block & (block - 1) == 0
            assert config.BLOCK_T * config.BLOCK_D <= 16384


def test_source_past_2_to_31_elements(device):
    d, n = 1000, 2_200_000  # 2.2e9 elements; untouched pages take no memory
    hidden = torch.empty(n, d, dtype=torch.int8, device=device)
    hidden[-5:] = torch.arange(-60, 65, device=device).repeat(40).view(5, d)
    cu = torch.tensor([0, n - 5, n - 2, n], device=device)
    token = torch.full((n,), 0.5, device=device)
    store = Store(hidden, cu, token, torch.ones(d, device=device))
    got, _ = gather_rows(store, torch.tensor([2, 1], device=device), 1, total=5)
    want = hidden[-5:].to(BF16) / 2
    assert_same_bits(got[1:3], want[3:])
    assert_same_bits(got[4:], want[:3])


def test_target_past_2_to_31_elements(device):
    store = make_store("bf16", 24, device, [2, 3])
    stride = 2**29 + 8
    out = torch.empty(5 * stride, dtype=BF16, device=device).as_strided((5, 24), (stride, 1))
    gather_rows(store, torch.tensor([1, 0], device=device), out=out)
    assert_same_bits(out, store.hidden[[2, 3, 4, 0, 1]])


def test_recorded_with_meta_tensors(device):
    for kind in TYPES:
        store = make_store(kind, 384, META)
        index = torch.empty(8, dtype=torch.int64, device=META)
        cu = torch.empty(9, dtype=torch.int32, device=META)
        with record() as launches:
            packed, _ = gather_rows(store, index, 5, cu_seqlens=cu, total=700)
            again, own = gather_rows(store, index, 5, total=700)
        assert packed.shape == again.shape == (740, 384) and packed.is_meta and own.shape == (9,)
        look_up, copy = launches[:2]
        assert [x.kernel for x in launches[2:]] == [look_up.kernel, copy.kernel]
        assert look_up.kernel is source_rows_fwd_kernel and look_up.grid == (1,)
        assert copy.kernel is gather_rows_fwd_kernel and copy.args["STORE"] == store.kind
        assert copy.grid == (-(-700 // GatherConfig.default(384).BLOCK_T),)


@pytest.mark.parametrize(
    "kind, parts, message",
    [
        ("bf16", {"hidden": torch.zeros(4, 2).double()}, "store.hidden has dtype torch.float64"),
        ("bf16", {"hidden": torch.zeros(4, 2, 2)}, r"store.hidden has shape \(4, 2, 2\).*\[N, D\]"),
        ("bf16", {"hidden": torch.zeros(24, 392).T}, r"strides \(1, 392\).*contiguous"),
        ("bf16", {"cu_seqlens": torch.zeros(3)}, "store.cu_seqlens is torch.float32"),
        (
            "bf16",
            {"cu_seqlens": torch.zeros(0).int()},
            r"store.cu_seqlens is .*\(0,\).*one entry more than ex",
        ),
        ("bf16", {"token_scale": torch.ones(391)}, "store.token_scale was given.*leave it out"),
        ("fp8", {"channel_scale": torch.ones(24)}, "store.channel_scale was given.*leave it out"),
        (
            "fp8",
            {"token_scale": None},
            r"store.token_scale is None, expected contiguous float32 \[391\]",
        ),
        (
            "int8",
            {"channel_scale": None},
            r"store.channel_scale is None, expected contiguous float32 \[24\]",
        ),
        ("int8", {"token_scale": torch.ones(390)}, r"store.token_scale is .*\(390,\).*\[391\]"),
        ("int8", {"channel_scale": torch.ones(24).half()}, "store.channel_scale is torch.float16"),
        ("int8", {"channel_scale": torch.ones(48)[::2]}, r"strides \(2,\).*contiguous"),
        ("int8", {"token_scale": torch.ones(391, device=META)}, "token_scale is on meta, expected"),
    ],
)
def test_a_bad_store_is_refused(kind, parts, message, device):
    good = vars(make_store(kind, 24, device))
    bad = Store(**(good | {name: moved(x, device) for name, x in parts.items()}))
    for call in (bad.check, lambda: gather_rows(bad, torch.tensor([0], device=device))):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"index": torch.tensor([0.0])}, r"index is torch.float32 \(1,\).*int32 or int64 \[B\]"),
        ({"index": torch.tensor([[0]])}, r"index is torch.int64 \(1, 1\)"),
        ({"index": torch.tensor([0], device=META)}, "index is on meta, expected"),
        ({"m": -1}, "m is -1, expected an int >= 0"),
        ({"m": 1.0}, "m is 1.0, expected an int >= 0"),
        ({"dtype": torch.int8}, "dtype is torch.int8, expected .*bfloat16 or float16"),
        ({"dtype": F16, "out": torch.zeros(4, 24)}, "dtype is torch.float16 and out is torch.fl"),
        ({"out": torch.zeros(4, 24).double()}, "dtype is torch.float64 and out is torch.float64"),
        ({"out": torch.zeros(4, 25)}, r"out is .*\(4, 25\) .*expected \[T \+ B m, 24\]"),
        ({"total": 4, "out": torch.zeros(5, 24)}, r"out is .*\(5, 24\) .*4 \+ 0 rows"),
        ({"out": torch.zeros(24, 4).T}, r"strides \(1, 4\).*contiguous rows"),
        ({"out": torch.zeros(1, 24).expand(4, 24)}, r"strides \(0, 1\).*do not overlap"),
        ({"out": torch.zeros(4, 24, device=META)}, "out is on meta, expected"),
        ({"out": torch.zeros(1, 24), "m": 1}, "total is -1 rows .* 2 free ones.*size of out"),
        ({"total": -1}, "total is -1 rows"),
        ({"total": MAX_ROWS}, f"total is {MAX_ROWS} rows.*split the batch"),
        ({"cu_seqlens": torch.tensor([0, 3, 4])}, r"cu_seqlens is torch.int64 \(3,\).*int32 \[3\]"),
        ({"cu_seqlens": torch.tensor([0, 4]).int()}, r"cu_seqlens is .*\(2,\).*int32 \[3\]"),
        ({"cu_seqlens": torch.zeros(6).int()[::2]}, "cu_seqlens is .*expected contiguous"),
        ({"cu_seqlens": torch.zeros(3, device=META).int()}, "cu_seqlens is on meta, expected"),
    ],
)
def test_bad_arguments_are_refused(given, message, device):
    store = make_store("bf16", 24, device)
    given = {"index": torch.tensor([0, 2])} | given
    given = {name: moved(x, device) for name, x in given.items()}
    with pytest.raises(ValueError, match=message):
        gather_rows(store, **given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"index": torch.tensor([0, -1])}, r"index has \[-1\], expected 0 .. 7"),
        ({"index": torch.tensor([8, 0], dtype=torch.int32)}, r"index has \[8\], expected 0 .. 7"),
        ({"cu_seqlens": torch.tensor([1, 3, 4]).int()}, r"cu_seqlens is \[1, 3, 4\]"),
        ({"total": 5}, "total is 5, expected 4 for this index"),
        ({"out": torch.zeros(3, 24)}, "total is 3, expected 4 for this index"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 4]).int()},
            r"cu_seqlens is \[0, 2, 4\], expected \[0, 3, 4\]",
        ),
    ],
)
def test_values_are_looked_at_on_the_cpu(given, message, device):
    if device.type == "cuda":
        pytest.skip("a device assert there, after which the process is of no more use")
    with pytest.raises(ValueError, match=message):
        gather_rows(make_store("bf16", 24, device), **({"index": torch.tensor([0, 2])} | given))
    if "index" in given:
        with pytest.raises(ValueError, match=message):
            source_rows(make_store("bf16", 24, device), given["index"])


@pytest.mark.parametrize("spans", [[0, 3, 8], [0, 5, 3], [-1, 3, 5]])
def test_a_store_that_does_not_fit_its_rows_is_seen_on_the_cpu(spans, device):
    if device.type == "cuda":
        pytest.skip("a device assert there, after which the process is of no more use")
    store = Store(torch.zeros(5, 24), torch.tensor(spans))
    with pytest.raises(ValueError, match="store.cu_seqlens is .*rising from 0 to 5"):
        gather_rows(store, torch.tensor([0, 1]))


def test_the_cpu_is_refused_where_triton_does_not_interpret(monkeypatch):
    monkeypatch.setattr(gather, "INTERPRETED", False)
    with pytest.raises(ValueError, match="store.hidden is on cpu, expected a GPU.*INTERPRET"):
        gather_rows(make_store("bf16", 24, torch.device("cpu")), torch.tensor([0]))


def test_a_negative_index_is_seen_whatever_lies_before_the_table(device):
    if device.type == "cuda":
        pytest.skip("a device assert there, after which the process is of no more use")
    store = Store(torch.zeros(5, 24), torch.tensor([0, 0, 3, 5])[1:])
    with pytest.raises(ValueError, match=r"index has \[-1\], expected 0 .. 1"):
        gather_rows(store, torch.tensor([0, -1]))
