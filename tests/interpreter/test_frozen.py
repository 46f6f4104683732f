"""lpt_kernels.frozen against fp64 and against PyTorch in the same dtype.

The rule: the error of an output or gradient against an fp64 oracle, made from the same inputs, is
at most twice that of PyTorch's own code in that dtype plus one ulp of the oracle, for the largest
element and for the root mean square.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lpt_kernels import frozen
from lpt_kernels.launch import record

from tests.interpreter.frozen_rule import (
    DTYPES,
    SIZES,
    assert_rule,
    check,
    check_norm,
    normal,
    results,
    rows_of,
    torch_gated,
    torch_layer_norm,
    torch_rms_norm,
)
from tests.interpreter.frozen_rule import poisoned_memory as poisoned_memory

pytestmark = [
    # Extremes overflow where that does not count.
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.usefixtures("poisoned_memory"),
]


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_post_norm_and_pre_norm(dtype, D, device):
    for rows in rows_of(D):
        x = normal(rows, D, dtype=dtype, device=device)
        check_norm(x, kind="layer")
        check_norm(x, kind="rms", bias=False, return_sum=True)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_part_may_be_left_out(dtype, kind, device):
    x = normal(5, 24, dtype=dtype, device=device)
    for bias in (False, True):
        for residual in (False, True):
            check_norm(x, kind=kind, bias=bias, residual=residual)
            check_norm(x, kind=kind, bias=bias, residual=residual, norm_bias=False)
            for upstream in ((True, True), (True, False), (False, True)):
                check_norm(
                    x, kind=kind, bias=bias, residual=residual, return_sum=True, upstream=upstream
                )


@pytest.mark.parametrize("shape", [(70, 4096), (2, 8192), (2, 10000), (1, 16384)])
def test_norm_of_long_rows(shape, device):
    check_norm(normal(*shape, dtype=torch.float16, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_a_weight_offset(dtype, device):
    check_norm(normal(5, 24, dtype=dtype, device=device), kind="rms", weight_offset=1.0)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_extremes(dtype, kind, device):
    def x(scale, shift=0.0):
        return normal(5, 384, dtype=dtype, device=device, scale=scale, shift=shift)

    # The squares have to add up in fp32 (to 3e38); fp16 ends at 65,504.
    huge = 1e17 if dtype == torch.float32 else 1e4
    for return_sum in (False, True):
        check_norm(x(huge), kind=kind, scale=huge / 4, return_sum=return_sum)
    check_norm(x(huge), kind=kind, bias=False, residual=False)
    check_norm(x(1.0, 100.0), kind=kind, scale=0.1)
    for bare in (False, True):  # variance near eps
        check_norm(x(3e-3), kind=kind, scale=3e-3, bias=bare, residual=bare)
    # With eps 1e-12 the gradient would not fit fp16.
    eps = 1e-5 if dtype == torch.float16 else 1e-12
    check_norm(x(1e-6), kind=kind, eps=eps, bias=False, residual=False)
    check_norm(torch.full_like(x(1.0), 3.0), kind=kind, bias=False, residual=False)
    check_norm(torch.zeros_like(x(1.0)), kind=kind, bias=False, residual=False)


def test_a_sum_past_fp16_does_not_matter_in_post_norm(device):
    x = normal(3, 24, dtype=torch.float16, device=device, scale=1e4, shift=4e4).clamp(max=65504)
    weight = torch.ones(24, dtype=torch.float16, device=device)
    dy = normal(3, 24, dtype=torch.float16, device=device, seed=1)

    def ours(x, residual):
        return frozen.layer_norm(x, weight, residual=residual)

    def oracle(x, residual):
        return F.layer_norm(x + residual, (24,))

    got = results(ours, [x, x], [], [dy])
    expected = results(oracle, [x.double(), x.double()], [], [dy.double()])
    assert_rule(got, [y.half() for y in expected], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_tensors_that_are_not_contiguous(dtype, device):
    wide = normal(6, 70, dtype=dtype, device=device)
    check_norm(wide[:, 3:27])
    check_norm(wide[::2, :24])
    check_norm(wide.t()[:24].t()[:, ::2])
    check_norm(wide[:, :48].view(2, 3, 2, 24).transpose(0, 2), return_sum=True)
    check_norm(wide[0, :24])
    check_norm(wide[0, :24].expand(4, 24))

    # Residual, both incoming gradients and the weights with strides of their own.
    residual = normal(6, 30, dtype=dtype, device=device, seed=1)[:, 2:26]
    weight, norm_bias, bias = normal(24, 3, dtype=dtype, device=device, seed=2).unbind(1)
    dy = normal(6, 25, dtype=dtype, device=device, seed=3)[:, 1:]
    ds = normal(6, 27, dtype=dtype, device=device, seed=4)[:, :24]
    across = normal(24, 6, dtype=dtype, device=device, seed=5).t()

    def ours(x, residual, weight, norm_bias, bias):
        return frozen.layer_norm(
            x, weight, norm_bias, bias=bias, residual=residual, return_sum=True
        )

    def theirs(x, residual, weight, norm_bias, bias):
        return torch_layer_norm(x, residual, weight, norm_bias, bias, 1e-5)

    for x, r, g in ((wide[:, 5:29], residual, ds), (residual, across, ds[:1, :1].expand(6, 24))):
        check(ours, theirs, [x, r], [weight, norm_bias, bias], [dy, g])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_everything_is_rounded_once_and_to_the_nearest(dtype, device):
    x, y, dy = (normal(7, 64, dtype=dtype, device=device, seed=s) for s in range(3))
    weight = normal(64, dtype=dtype, device=device, seed=3)
    close = {"rtol": 0.505 * torch.finfo(dtype).eps, "atol": 2e-6}
    w = weight.double()

    # Gradients too where what is kept is the input itself.
    for ours, theirs in (
        (lambda x, y: frozen.gated(x, y), lambda x, y: F.silu(x) * y),
        (lambda x, y: frozen.gelu(x, weight), lambda x, y: F.gelu(x + w)),
        (lambda x, y: frozen.layer_norm(x, weight), lambda x, y: F.layer_norm(x, (64,), w)),
    ):
        got = results(ours, [x, y], [], [dy])
        oracle = results(theirs, [x.double(), y.double()], [], [dy.double()])
        for a, b in zip(got, oracle, strict=True):
            if a is not None:
                torch.testing.assert_close(a.double(), b, **close)

    wanting = y.clone().requires_grad_()
    seen, out = kept(lambda: frozen.layer_norm(x, weight, residual=wanting))
    (normed,) = of_size(seen, x.numel())
    _, total = frozen.layer_norm(x, weight, residual=y, return_sum=True)
    x_hat = F.layer_norm(x.double() + y, (64,))
    for a, b in ((normed, x_hat), (out, x_hat * w), (total, x.double() + y)):
        torch.testing.assert_close(a.detach().double(), b, **close)


def test_weights_of_another_dtype(device):
    x = normal(5, 24, dtype=torch.bfloat16, device=device)
    weight, norm_bias, bias = (normal(24, device=device, seed=s) for s in (1, 2, 3))
    y = frozen.layer_norm(x, weight, norm_bias, bias=bias)
    expected, _ = torch_layer_norm(
        x.double(), None, weight.double(), norm_bias.double(), bias.double(), 1e-5
    )
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)
    y = frozen.gelu(x, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), F.gelu(x.double() + bias), rtol=2**-8, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(device):
    for D in (24, 1000):
        x = normal(70, D, device=device)
        weight = torch.ones(D, device=device)
        assert torch.equal(frozen.layer_norm(x, weight)[33], frozen.layer_norm(x[33], weight))
        assert torch.equal(frozen.gelu(x)[33], frozen.gelu(x[33]))


def test_the_gradient_of_x_and_residual_is_not_shared(device):
    x = normal(3, 24, device=device).requires_grad_()
    residual = normal(3, 24, device=device, seed=1).requires_grad_()
    weight = torch.ones(24, device=device)
    for _ in range(2):  # the second time gradients are accumulated
        y, s = frozen.rms_norm(x, weight, residual=residual, return_sum=True)
        (y * y + s * s * s).sum().backward()
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()


def test_a_stack_of_blocks(device):
    """Each sum's gradient arrives from two sides, and flows on in two directions."""
    D = 24
    one, two = (normal(D, D, device=device, seed=s, scale=D**-0.5) for s in (1, 2))
    weight, bias = normal(D, device=device, seed=3, shift=1.0), normal(D, device=device, seed=4)

    def ours(x, weight, bias, one, two):
        y, s = frozen.rms_norm(x, weight, return_sum=True)
        for _ in range(2):
            hidden = frozen.gated((y @ one).repeat(1, 2), bias=bias.repeat(2))
            y, s = frozen.rms_norm(hidden @ two, weight, residual=s, return_sum=True)
        return frozen.layer_norm(frozen.gelu(y @ one, bias), weight, bias, residual=y)

    def theirs(x, weight, bias, one, two):
        y, s = torch_rms_norm(x, None, weight, None, 1e-6)
        for _ in range(2):
            hidden = torch_gated(y @ one, y @ one, bias, bias, "silu")
            y, s = torch_rms_norm(hidden @ two, s, weight, None, 1e-6)
        return torch_layer_norm(F.gelu(y @ one + bias), y, weight, bias, None, 1e-5)[0]

    x, dy = normal(7, D, device=device), normal(7, D, device=device, seed=5)
    check(ours, theirs, [x], [weight, bias, one, two], [dy])


# --- what is kept ---------------------------------------------------------------------------------


def kept(function):
    """Tensors that function() saves for its backward pass, and what it returns."""
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        result = function()
    return seen, result


def of_size(tensors, n):
    return [t for t in tensors if t.numel() == n]


@pytest.mark.parametrize("norm", [frozen.layer_norm, frozen.rms_norm])
def test_norm_keeps_the_least(norm, device):
    x = normal(5, 24, dtype=torch.float16, device=device).requires_grad_()
    residual = normal(5, 24, dtype=torch.float16, device=device).requires_grad_()
    weight = torch.ones(24, device=device)
    stats = 2 if norm is frozen.layer_norm else 1

    seen, _ = kept(lambda: norm(x, weight))
    assert [t.data_ptr() for t in of_size(seen, 120)] == [x.data_ptr()]
    assert len(of_size(seen, 5)) == stats and len(seen) == stats + 2

    seen, (_, s) = kept(lambda: norm(x, weight, residual=residual, return_sum=True))
    assert [t.data_ptr() for t in of_size(seen, 120)] == [s.data_ptr()]
    assert len(of_size(seen, 5)) == stats and len(seen) == stats + 2

    seen, _ = kept(lambda: norm(x, weight, residual=residual))
    assert [t.dtype for t in of_size(seen, 120)] == [torch.float16]
    assert len(of_size(seen, 5)) == 1 and len(seen) == 3


def test_activation_keeps_its_inputs(device):
    gate = normal(5, 24, device=device).t().requires_grad_()  # as given, not a copy
    up = normal(24, 5, device=device, seed=1)
    bias = normal(5, device=device, seed=2)
    seen, _ = kept(lambda: frozen.gelu(gate, bias))
    assert [t.data_ptr() for t in seen] == [gate.data_ptr(), bias.data_ptr()]
    seen, _ = kept(lambda: frozen.gated(gate, up, bias=bias, bias_up=bias))
    assert {t.data_ptr() for t in seen} == {gate.data_ptr(), up.data_ptr(), bias.data_ptr()}


def test_without_a_gradient_nothing_is_kept(device):
    x, weight = normal(5, 24, device=device), torch.ones(24, device=device)
    for function in (
        lambda x: frozen.layer_norm(x, weight, bias=weight, residual=x),
        lambda x: frozen.rms_norm(x, weight, return_sum=True)[0],
        frozen.gelu,
        frozen.gated,
    ):
        seen, y = kept(lambda f=function: f(x))
        assert not seen and not y.requires_grad
        with torch.no_grad():
            seen, same = kept(lambda f=function: f(x.clone().requires_grad_()))
        assert not seen and not same.requires_grad and torch.equal(same, y)
        with record() as launches, torch.no_grad():
            function(x)
            function(x.clone().requires_grad_())
        for launch in launches:
            for name in ("normed_ptr", "mean_ptr", "rstd_ptr"):
                assert launch.args.get(name) is None


def test_only_the_gradients_that_are_wanted(device):
    x, weight = normal(5, 24, device=device), torch.ones(24, device=device)
    other = normal(5, 24, device=device, seed=1).requires_grad_()
    for function in (
        lambda: frozen.layer_norm(x, weight, residual=other),
        lambda: frozen.layer_norm(other, weight, residual=x),
        lambda: frozen.gated(x, other),
        lambda: frozen.gated(other, x),
    ):
        other.grad = None
        function().sum().backward()
        assert other.grad is not None and x.grad is None


def test_no_second_derivative(device):
    x, dy = (normal(3, 24, device=device, seed=s).requires_grad_() for s in (0, 1))
    (dx,) = torch.autograd.grad(frozen.silu(x), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_recorded_on_meta():
    x = torch.empty(6, 24, device="meta", dtype=torch.float16).requires_grad_()
    weight = torch.empty(24, device="meta")
    with record() as launches:
        y, s = frozen.layer_norm(x, weight, weight, bias=weight, residual=x, return_sum=True)
        (frozen.gelu(y, weight) + frozen.gated(s, x)).sum().backward()
    assert sorted(launch.name for launch in launches) == [
        f"{op}_{way}_kernel" for op in ("act", "gated", "norm") for way in ("bwd", "fwd")
    ]


# --- refusals -------------------------------------------------------------------------------------


def test_refusals(device, monkeypatch):
    x, w = torch.zeros(3, 24, device=device), torch.ones(24, device=device)
    trained = torch.ones(24, device=device, requires_grad=True)
    cases = [
        (lambda: frozen.layer_norm(x, trained), "weight: got .* requires a gradient.*frozen.*call"),
        (lambda: frozen.layer_norm(x, w, trained), "norm_bias: got .* requires a gradient"),
        (lambda: frozen.rms_norm(x, w, bias=trained), "bias: got .* requires a gradient"),
        (lambda: frozen.gelu(x, trained), "bias: got .* requires a gradient"),
        (lambda: frozen.gated(x, x, bias_up=trained), "bias_up: got .* requires a gradient"),
        (lambda: frozen.rms_norm(x, w[:5]), r"weight: got shape \(5,\), expected \(24,\)"),
        (lambda: frozen.silu(x, w[None]), r"bias: got shape \(1, 24\), expected \(24,\)"),
        (lambda: frozen.gated(x, bias=w[:12]), r"bias: got shape \(12,\), expected \(24,\)"),
        (lambda: frozen.rms_norm(x, w.double()), "weight: got torch.float64, expected float32"),
        (lambda: frozen.gelu(x.double()), "x: got torch.float64, expected float32"),
        (lambda: frozen.gelu(x, w.to("meta")), "bias: got a tensor on meta, expected"),
        (lambda: frozen.rms_norm(x, w, residual=x[:1]), r"residual: got shape \(1, 24\).*\(3, 24"),
        (lambda: frozen.rms_norm(x, w, residual=x.half()), "residual: .*float16.*float32"),
        (lambda: frozen.rms_norm(x, w, residual=x.to("meta")), "residual: .* on meta, expected"),
        (lambda: frozen.gated(x, x[:2]), r"up: got shape \(2, 24\).*expected \(3, 24\).*as gate"),
        (lambda: frozen.gelu(x[:, :0]), r"x: got shape \(3, 0\), expected \[..., D\]"),
        (lambda: frozen.gelu(x[0, 0]), r"x: got shape \(\), expected"),
        (lambda: frozen.rms_norm(x[:, :1].expand(3, 16385), w), "x: got 16385 .* at most 16384"),
        (lambda: frozen.gated(x[:, :23]), r"gate: got shape \(3, 23\), expected an even"),
        (lambda: frozen.gated(x, bias_up=w), "bias_up: got a tensor, expected None without up"),
        (lambda: frozen.activate(x, activation="relu"), "activation: got 'relu', expected one of"),
        (lambda: frozen.gelu(x, approximate="erf"), "approximate: got 'erf', expected 'none'"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    monkeypatch.setattr(frozen, "INTERPRETED", False)
    with pytest.raises(ValueError, match="x: got a tensor on the CPU, expected one on a GPU"):
        frozen.gelu(x.cpu())
