"""What the tests of the insertion kernels share: inputs, gradients and the rule for errors.

The rule: the error of an output or gradient against an fp64 oracle, made from the same inputs, is
at most twice that of the plain PyTorch code in the same dtype plus one ulp of the oracle, for the
largest element and for the root mean square.
"""

from __future__ import annotations

import pytest
import torch

from lpt_fast.insertion import insert_prompt, reference
from tests.insertion.cases import KINDS, lengths_to_cu, make_hidden, make_weights

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, F16, BF16]
POOLING = ("appg", "mppg")
GENERATORS = ("npg", *POOLING)

__all__ = [
    "BF16",
    "DTYPES",
    "F16",
    "F32",
    "GENERATORS",
    "KINDS",
    "POOLING",
    "assert_equal",
    "assert_rule",
    "check",
    "inputs",
    "kernels",
    "lengths_to_cu",
    "make_hidden",
    "make_weights",
    "normal",
    "on_device",
    "packed_rows",
    "poisoned_memory",
    "results",
    "whole",
]


@pytest.fixture
def poisoned_memory(monkeypatch):
    """New memory is NaN (int32: far out), so that what no kernel writes shows."""

    def poisoned(make):
        def fill(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.dtype == torch.int32:
                return tensor.fill_(2**30)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return fill

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def normal(*shape, dtype=F32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def on_device(x, device):
    """A tensor with the strides that it has (`.to` makes it dense); one on "meta" stays there."""
    if x.is_meta:
        return x
    size = x.untyped_storage().nbytes() // x.element_size()
    flat = x.as_strided((size,), (1,), 0).to(device)
    return flat.as_strided(x.size(), x.stride(), x.storage_offset())


def whole(kind, lengths, m, D, r, dtype, device="cpu", seed=0):
    """Hidden states and weights whose down-projections are exact in every dtype, with many ties:
    so which row is a maximum, and what ReLU cuts, are the same whatever the rounding.
    """
    hidden = make_hidden(lengths, D, dtype, seed, device).round().clamp(-2, 2)
    weights = make_weights(kind, D, r, m, dtype, seed, device)
    if kind != "static":
        few = normal(r, D, seed=seed + 7, device=device)
        chosen = torch.rand(r, D, generator=torch.Generator().manual_seed(seed)) < 12 / D
        weights["proj_down.weight"] = (few.sign() * chosen.to(device)).to(dtype)
        bias = normal(r, seed=seed + 8, device=device).round().clamp(-3, 3)
        weights["proj_down.bias"] = (bias + 0.5).to(dtype)
    return hidden, weights


def inputs(kind, lengths, m, D, r, dtype, device="cpu", seed=0):
    """Random ones. Rounding must not change which way ReLU and maximum go, for then errors would be
    a matter of luck: in 16 bits the projections are exact (npg, mppg) or far from zero (appg).
    """
    if dtype != F32 and kind in ("npg", "mppg"):
        return whole(kind, lengths, m, D, r, dtype, device, seed)
    weights = make_weights(kind, D, r, m, dtype, seed, device)
    if dtype != F32 and kind == "appg":
        weights["proj_down.bias"] += 5 * weights["proj_down.bias"].sign()
    return make_hidden(lengths, D, dtype, seed, device), weights


def kernels(*args, **kwargs):
    return insert_prompt(*args, impl="triton", **kwargs)


def results(function, hidden, weights, *args, upstream, needs=None, **kwargs):
    """The output of function(hidden, cu, kind, weights, m) and gradients: {name: tensor}.

    Args:
        args: cu_seqlens, kind, m.
        upstream: gradient of the output.
        needs: names of what requires a gradient, "hidden" or a weight's; None: all.
    """
    tensors = {"hidden": hidden, **weights}
    tensors = {
        name: t.detach().requires_grad_(needs is None or name in needs)
        for name, t in tensors.items()
    }
    hidden, weights = tensors["hidden"], {k: t for k, t in tensors.items() if k != "hidden"}
    cu, kind, m = args
    out = function(hidden, cu, kind, weights, m, **kwargs)
    out.backward(upstream)
    return {"out": out.detach()} | {
        f"d {name}": t.grad for name, t in tensors.items() if t.grad is not None
    }


def assert_rule(got, same, oracle):
    assert got.keys() == same.keys() == oracle.keys()
    for name, x in got.items():
        y, z = same[name], oracle[name]
        assert x.shape == z.shape and x.dtype == y.dtype, name
        if z.numel() == 0:
            continue
        ulp = torch.finfo(x.dtype).eps
        for norm_name, norm in (
            ("largest", lambda e: e.abs().max()),
            ("rms", lambda e: e.norm() / e.numel() ** 0.5),
        ):
            error, bound = norm(x.double() - z), 2 * norm(y.double() - z) + ulp * norm(z)
            assert error <= bound, f"{name}: {norm_name} error {error:.3g}, allowed {bound:.3g}"


def assert_equal(got, want):
    """To the bit, NaN where NaN is."""
    assert got.keys() == want.keys()
    for name, x in got.items():
        torch.testing.assert_close(
            x, want[name], atol=0, rtol=0, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )


def check(kind, lengths, m, hidden, weights, upstream=None, **kwargs):
    """The kernels' output and every gradient under the rule. Returns them."""
    cu = lengths_to_cu(lengths, hidden.device)
    if upstream is None:
        shape = (len(hidden) + len(lengths) * m, hidden.shape[1])
        upstream = normal(*shape, dtype=hidden.dtype, device=hidden.device, seed=9)
    args = (cu, kind, m)
    got = results(kernels, hidden, weights, *args, upstream=upstream, **kwargs)
    plain = reference.insert_prompt
    same = results(plain, hidden, weights, *args, upstream=upstream, **kwargs)
    wide = {name: w.double() for name, w in weights.items()}
    oracle = results(plain, hidden.double(), wide, *args, upstream=upstream.double(), **kwargs)
    assert_rule(got, same, oracle)
    text, _ = packed_rows(lengths, m, hidden.device)
    assert torch.equal(got["out"][text], hidden)
    return got


def packed_rows(lengths, m, device="cpu"):
    """Rows of the output that hold text [T], and those that hold prompts [B, m]."""
    text, prompt, at = [], [], 0
    for n in lengths:
        prompt.append(range(at, at + m))
        text += range(at + m, at + m + n)
        at += m + n
    rows = (text, [list(p) for p in prompt])
    return tuple(torch.tensor(r, dtype=torch.int64, device=device) for r in rows)
