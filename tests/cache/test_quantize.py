"""How stores keep numbers: what is lost, what never is."""

from __future__ import annotations

import pytest
import torch

from lpt_fast.cache import CacheError
from lpt_fast.cache.quantize import (
    FLOATS,
    calibrate,
    check_finite,
    decode,
    encode,
    exact_for,
    torch_dtype,
)
from lpt_fast.cache.shard import QUANTISED, STORES
from lpt_fast.insertion import reference

T, D = 64, 48


def hidden(dtype=torch.float32, seed=0) -> torch.Tensor:
    """As models have them: a few channels are far larger than the others, tokens differ."""
    own = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, generator=own)
    x[:, 5] = x[:, 5] * 300 + 900
    x[:, 11] *= 40
    x[:, 20] = 0  # a silent channel
    x *= torch.logspace(-2, 2, T)[torch.randperm(T, generator=own)][:, None]
    return x.to(dtype)


def coded(x, store, channel=None):
    if store == "int8c" and channel is None:
        channel = calibrate(x)
    codes, scale = encode(x, store, channel)
    return codes, scale if store in QUANTISED else None, channel if store == "int8c" else None


def there_and_back(x, store, dtype=torch.float32):
    codes, scale, channel = coded(x, store)
    return decode(codes, dtype, scale, channel)


@pytest.mark.parametrize("store", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_floats(store, dtype):
    """Rounded once, or not at all; what is called exact is."""
    x = hidden().clamp(-6e4, 6e4).to(dtype)
    if dtype == torch.float64:
        x *= 1 + 1e-10
    codes, top = encode(x, store, None)
    assert codes.dtype == torch_dtype(store) and top.dtype == torch.float32
    assert torch.equal(codes, x.to(FLOATS[store]))
    assert torch.equal(top, codes.float().abs().amax(1))
    back = decode(codes, dtype)
    assert back.dtype == dtype
    if exact_for(store, dtype):
        assert torch.equal(back, x)
    elif dtype in (torch.float32, torch.float64):
        assert not torch.equal(back, x)
    bound = {"fp32": 2**-24, "fp16": 2**-11, "bf16": 2**-8}[store]
    error = (back.double() - x.double()).abs()
    assert (error <= bound * x.double().abs() + 2**-24).all()


def test_what_is_exact():
    F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
    exact = {(s, d) for s in STORES for d in (F32, F16, BF16, F64, None) if exact_for(s, d)}
    assert exact == {("fp32", F32), ("fp32", F16), ("fp32", BF16), ("fp16", F16), ("bf16", BF16)}


@pytest.mark.parametrize("store", QUANTISED)
def test_error_bounds(store):
    """int8c: half a step of its channel and token; fp8: four bits, and a step of the token's."""
    x = hidden()
    codes, scale, channel = coded(x, store)
    assert codes.dtype == torch_dtype(store)
    error = (decode(codes, torch.float32, scale, channel) - x).abs()
    if store == "int8c":
        step = scale[:, None] * channel
        assert (error <= 0.5001 * step).all() and (error > 0.4 * step).any()
        assert codes.min() >= -127 and codes.max() <= 127
    else:
        assert (error <= x.abs() * 2**-4 + scale[:, None] * 2**-10).all()
        assert (error > x.abs() * 0.9 * 2**-4).any()
    # The largest of each token uses the whole range: no digit is given away.
    top = codes.float().abs().amax(1)
    assert (top >= {"int8c": 126, "fp8": 416}[store]).all()


def test_outlier_channels_do_not_drown_the_others():
    """Plain int8 with one scale a token leaves the other channels nothing."""
    x = hidden()
    others = [i for i in range(D) if i not in (5, 11, 20)]
    scale = x.abs().amax(1, keepdim=True) / 127
    plain = (x / scale).round() * scale

    def relative(back):
        return float((back - x)[:, others].norm() / x[:, others].norm())

    assert relative(plain) > 0.5
    assert relative(there_and_back(x, "int8c")) < 0.05
    assert relative(there_and_back(x, "fp8")) < 0.05
    assert there_and_back(x, "int8c")[:, 20].abs().max() == 0


def test_calibration():
    """The root mean square of each channel; a silent one gets a small scale, never zero."""
    x = hidden(torch.bfloat16)
    scale = calibrate(x)
    assert scale.dtype == torch.float32 and scale.shape == (D,) and (scale > 0).all()
    loud = [i for i in range(D) if i != 20]
    torch.testing.assert_close(scale[loud], x.float().square().mean(0).sqrt()[loud])
    torch.testing.assert_close(scale[20], 1e-3 * x.float().square().mean(0).sqrt().mean())
    assert (calibrate(torch.zeros(3, D)) > 0).all()
    # It speaks later after all: the token's own scale takes care of it.
    later = x.float().clone()
    later[3, 20] = 1e4
    codes, token, _ = coded(later, "int8c", scale)
    back = decode(codes, torch.float32, token, scale)
    torch.testing.assert_close(back[3, 20], later[3, 20], rtol=0.01, atol=0)
    torch.testing.assert_close(back[4], there_and_back(x.float(), "int8c")[4])


@pytest.mark.parametrize("store", QUANTISED)
def test_scales(store):
    """Exact in bf16, as they are kept, and never so small that a value is clipped."""
    own = torch.Generator().manual_seed(1)
    tops = torch.cat([torch.rand(4000, generator=own) * 2, torch.logspace(-34, 36, 4000)])
    x = torch.zeros(len(tops), 2)
    x[:, 0] = -tops
    codes, scale = encode(x, store, torch.ones(2))
    assert torch.equal(scale.bfloat16().float(), scale)
    limit = 127 if store == "int8c" else 448
    assert (scale.double() * limit >= tops.double() * (1 - 1e-7)).all()
    assert (scale.double() * limit <= tops.double() * (1 + 2**-7 + 1e-6)).all()
    assert (codes.float()[:, 0] < 0).all() and not codes.float()[:, 1].any()
    back = decode(codes, torch.float32, scale, torch.ones(2) if store == "int8c" else None)
    relative = (back[:, 0] + tops).abs() / tops
    assert relative.max() < (1 / 250 if store == "int8c" else 2**-4 + 1e-6)


@pytest.mark.parametrize("store", STORES)
def test_zeros_and_extremes(store):
    x = torch.zeros(5, 4)
    x[1, 2], x[2, 0], x[3] = 1e-30, 6e4, torch.tensor([3e-5, -3e-5, 2e-5, 0.0])
    x[4, 3] = torch.finfo(torch.float32).tiny / 4  # subnormal
    codes, magnitude = encode(x, store, torch.ones(4))
    check_finite(magnitude, store, str)
    scale = magnitude if store in QUANTISED else None
    back = decode(codes, torch.float32, scale, torch.ones(4) if store == "int8c" else None)
    assert not back[0].any() and back.isfinite().all()
    torch.testing.assert_close(back[2], x[2], rtol=2e-2, atol=0)
    if store != "fp16":
        torch.testing.assert_close(back[1], x[1], rtol=2e-2, atol=0)
        torch.testing.assert_close(back[3], x[3], rtol=4e-2, atol=0)
    if store in QUANTISED:
        assert scale[0] == 1 and (scale > 0).all()
    top = torch.finfo(torch.float32).max
    huge = torch.tensor([[top / 2, -top / 4]])
    codes, magnitude = encode(huge, store, torch.ones(2))
    assert magnitude.isfinite().all() == (store != "fp16")
    if store != "fp16":
        scale = magnitude if store in QUANTISED else None
        back = decode(codes, torch.float32, scale, torch.ones(2) if store == "int8c" else None)
        torch.testing.assert_close(back, huge, rtol=5e-2, atol=0)


# Quiet NaNs of both signs, with bits as processors (0xffc00000) and GPUs (0x7fffffff) make them.
BAD = (
    0x7FC00000,
    0xFFC00000,
    0x7FFFFFFF,
    0xFFFFFFFF,
    0x7FFF8000,
    0x7F800001,
    0x7F800000,
    0xFF800000,
)


@pytest.mark.parametrize("bits", BAD)
@pytest.mark.parametrize("store", STORES)
def test_what_is_not_finite_is_found(store, bits):
    """In whichever place of a row, whatever else is in it."""
    value = torch.tensor([bits - 2**32 if bits >= 2**31 else bits], dtype=torch.int32)
    value = value.view(torch.float32)
    for width, place in ((1, 0), (4, 3), (40, 17), (513, 512)):
        x = torch.ones(6, width)
        x[4, place] = value
        x[5] = 0
        _, magnitude = encode(x, store, torch.full((width,), 0.3))
        assert magnitude.isfinite().tolist() == [True] * 4 + [False, True]
        with pytest.raises(CacheError, match=f"hidden states of text 4 are not finite as {store}"):
            check_finite(magnitude, store, lambda token: f"text {token}")
    check_finite(magnitude[:4], store, str)


def test_scales_of_what_is_not_finite():
    """Rounding must not carry over into the sign: NaN of a GPU would become zero."""
    from lpt_fast.cache.quantize import _round_up_to_bf16

    bits = torch.arange(0x7F800000, 0x7FFFFFFF + 1, 0xFFF, dtype=torch.int64)
    bits = torch.cat([bits, torch.tensor([0x7FFFFFFF])]).to(torch.int32)
    assert not _round_up_to_bf16(bits.view(torch.float32)).isfinite().any()
    below = torch.tensor([0x7F7F0000], dtype=torch.int32).view(torch.float32)
    assert _round_up_to_bf16(below) == below


def test_overflow():
    x = torch.tensor([[65504.0, 1.0], [65520.0, 1.0], [3.4e38, 1.0]])
    finite = {store: encode(x, store, torch.ones(2))[1].isfinite().tolist() for store in STORES}
    assert finite == {
        "fp32": [True, True, True],
        "fp16": [True, False, False],
        "bf16": [True, True, False],  # 3.4e38 is nearer to 2^128 than to the last bf16 below
        "int8c": [True, True, True],
        "fp8": [True, True, True],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store", STORES)
def test_decoding_is_that_of_the_kernels(store, dtype):
    """Bit for bit as the oracle of the gather kernels, all codes of fp8 among them."""
    codes, scale, channel = coded(hidden(), store)
    if store == "fp8":
        every = torch.arange(256, dtype=torch.uint8)
        every = every[(every & 0x7F) != 0x7F].view(torch.float8_e4m3fn)  # but its NaNs
        codes.view(torch.uint8).view(-1)[: len(every)] = every.view(torch.uint8)
    ends = torch.tensor([0, 10, 11, 40, T])
    index = torch.tensor([2, 0, 3, 1])
    batch = torch.tensor([0, 29, 39, 63, 64], dtype=torch.int32)
    expected = reference.gather_rows(codes, ends, index, batch, T, dtype, scale, channel)
    rows = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in index])
    got = decode(codes[rows], dtype, None if scale is None else scale[rows], channel)
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store", STORES)
def test_half_precision_hidden_states(store, dtype):
    """What a half-precision model gives is taken as the numbers that they are."""
    x = hidden().clamp(-6e4, 6e4).to(dtype)
    channel = calibrate(x)
    for a, b in zip(encode(x, store, channel), encode(x.float(), store, channel), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
