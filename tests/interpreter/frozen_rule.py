"""What the tests of frozen layers share: PyTorch's code, in fp64 the oracle, and the rule.

The rule: the error of an output or gradient against an fp64 oracle, made from the same inputs, is
at most twice that of PyTorch's own code in that dtype plus one ulp of the oracle, for the largest
element and for the root mean square.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lpt_kernels import frozen

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 24, 384, 768, 1000, 1024, 4096]
ROWS = [0, 1, 3, 70]


@pytest.fixture
def poisoned_memory(monkeypatch):
    """New memory is NaN, so that an element that no kernel writes shows."""
    empty = torch.empty
    nan = lambda *a, **k: empty(*a, **k).fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(torch, "empty", nan)


def rows_of(D):
    """Numbers of rows to try; programs are slow in the interpreter, so few of them for large D."""
    return ROWS if D <= 384 else [3]


def normal(*shape, dtype=torch.float32, device="cpu", seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
    return x.to(dtype).to(device)


# --- what PyTorch code computes; in fp64 the oracle -----------------------------------------------


def torch_sum(x, bias=None, residual=None):
    s = x if bias is None else x + bias
    return s if residual is None else s + residual


def torch_layer_norm(x, residual, weight, norm_bias, bias, eps):
    s = torch_sum(x, bias, residual)
    return F.layer_norm(s, s.shape[-1:], weight, norm_bias, eps), s


def torch_rms_norm(x, residual, weight, bias, eps, weight_offset=0.0):
    """Llama's code; with weight_offset Gemma's."""
    s = torch_sum(x, bias, residual)
    wide = s if s.dtype == torch.float64 else s.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight_offset:
        return (normed * (weight_offset + weight.to(wide.dtype))).to(s.dtype), s
    return weight * normed.to(s.dtype), s


def torch_act(x, activation):
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="none" if activation == "gelu" else "tanh")


def torch_gated(gate, up, bias, bias_up, activation):
    return torch_act(torch_sum(gate, bias), activation) * torch_sum(up, bias_up)


# --- the rule -------------------------------------------------------------------------------------


def results(function, inputs, constants, upstream):
    """Outputs of function(*inputs, *constants) and the gradients of inputs."""
    inputs = [x if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs, *constants)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [(y, g) for y, g in zip(outputs, upstream, strict=True) if g is not None]
    torch.autograd.backward(*map(list, zip(*used, strict=True)))
    grads = [x.grad for x in inputs if x is not None]
    return [y.detach() for y in outputs] + grads


def assert_rule(got, same, oracle):
    assert len(got) == len(same) == len(oracle)
    for i, (x, y, z) in enumerate(zip(got, same, oracle, strict=True)):
        assert x.shape == z.shape and x.dtype == y.dtype
        if z.numel() == 0:
            continue
        ulp = torch.finfo(x.dtype).eps
        for name, norm in (
            ("largest", lambda e: e.abs().max()),
            ("rms", lambda e: e.norm() / e.numel() ** 0.5),
        ):
            error = norm(x.double() - z)
            # Where PyTorch has no number (an overflow), the ulp alone is the bound.
            theirs = torch.nan_to_num(norm(y.double() - z), nan=0.0, posinf=0.0)
            bound = 2 * theirs + ulp * norm(z)
            assert error <= bound, f"result {i}: {name} error {error:.3g}, allowed {bound:.3g}"


def check(ours, theirs, inputs, constants, upstream):
    double = lambda ts: [t if t is None else t.double() for t in ts]  # noqa: E731
    got = results(ours, inputs, constants, upstream)
    same = results(theirs, inputs, constants, upstream)
    assert_rule(got, same, results(theirs, double(inputs), double(constants), double(upstream)))


def check_norm(
    x,
    *,
    kind="layer",
    norm_bias=True,
    bias=True,
    residual=True,
    return_sum=False,
    upstream=(True, True),
    eps=1e-5,
    scale=1.0,
    weight_offset=0.0,
):
    """One norm of x with the parts that the flags name, the others None, under the rule."""
    D = x.shape[-1]
    like = {"dtype": x.dtype, "device": x.device}
    weight = normal(D, seed=1, shift=1.0, scale=0.3, **like)
    weight[D // 2] = 0.0  # x_hat cannot be had from y
    norm_bias = normal(D, seed=2, **like) if norm_bias and kind == "layer" else None
    bias = normal(D, seed=3, scale=scale, **like) if bias else None
    residual = normal(*x.shape, seed=4, scale=scale, **like) if residual else None
    dy, ds = normal(*x.shape, seed=5, **like), normal(*x.shape, seed=6, **like)
    upstream = [dy if upstream[0] else None, ds if upstream[1] else None][: 1 + return_sum]

    def ours(x, residual, weight, norm_bias, bias):
        common = {"bias": bias, "residual": residual, "eps": eps, "return_sum": return_sum}
        if kind == "layer":
            return frozen.layer_norm(x, weight, norm_bias, **common)
        return frozen.rms_norm(x, weight, weight_offset=weight_offset, **common)

    def theirs(x, residual, weight, norm_bias, bias):
        if kind == "layer":
            y, s = torch_layer_norm(x, residual, weight, norm_bias, bias, eps)
        else:
            y, s = torch_rms_norm(x, residual, weight, bias, eps, weight_offset)
        return (y, s) if return_sum else y

    check(ours, theirs, [x, residual], [weight, norm_bias, bias], upstream)
