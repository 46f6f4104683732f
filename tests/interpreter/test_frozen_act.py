"""lpt_kernels.frozen's activations against fp64 and against PyTorch in the same dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lpt_kernels import frozen

from tests.interpreter.frozen_rule import (
    DTYPES,
    SIZES,
    check,
    normal,
    rows_of,
    torch_act,
    torch_gated,
    torch_sum,
)
from tests.interpreter.frozen_rule import poisoned_memory as poisoned_memory

pytestmark = [
    # Extremes overflow where that does not count.
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.usefixtures("poisoned_memory"),
]


# --- activations ----------------------------------------------------------------------------------

ACTS = ["gelu", "gelu_tanh", "silu"]


def check_act(x, activation, bias=True, scale=1.0):
    like = {"dtype": x.dtype, "device": x.device}
    bias = normal(x.shape[-1], seed=1, scale=scale, **like) if bias else None
    check(
        lambda x, bias: frozen.activate(x, bias, activation=activation),
        lambda x, bias: torch_act(torch_sum(x, bias), activation),
        [x],
        [bias],
        [normal(*x.shape, seed=2, **like)],
    )


def check_gated(gate, activation, bias=True, packed=False, scale=1.0):
    """gate [..., 2 D] if packed."""
    like = {"dtype": gate.dtype, "device": gate.device}
    half = gate.shape[-1] // 2 if packed else gate.shape[-1]
    bias = normal(gate.shape[-1], seed=1, scale=scale, **like) if bias else None
    bias_up = normal(half, seed=2, **like) if bias is not None and not packed else None
    up = None if packed else normal(*gate.shape, seed=3, **like)

    def ours(gate, up, bias, bias_up):
        return frozen.gated(gate, up, bias=bias, bias_up=bias_up, activation=activation)

    def theirs(gate, up, bias, bias_up):
        if packed:
            gate, up = gate.chunk(2, dim=-1)
            bias, bias_up = (None, None) if bias is None else bias.chunk(2)
        return torch_gated(gate, up, bias, bias_up, activation)

    dy = normal(*gate.shape[:-1], half, seed=4, **like)
    check(ours, theirs, [gate, up], [bias, bias_up], [dy])


@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype, D, device):
    turn = SIZES.index(D) + DTYPES.index(dtype)
    for rows in rows_of(D):
        # Every activation in every form at one small size, in turn at others.
        every = D == 24 and rows == 3
        first, second, third = (ACTS if every else [ACTS[(turn + i) % 3]] for i in range(3))
        x = normal(rows, D, dtype=dtype, device=device, scale=3.0)
        for activation in first:
            check_act(x, activation, bias=rows != 1)
        for activation in second:
            check_gated(x, activation, bias=rows != 1)
        both = normal(rows, 2 * D, dtype=dtype, device=device, scale=3.0)
        for activation in third:
            check_gated(both, activation, bias=rows != 1, packed=True)


def test_an_activation_of_many_tiles(device):
    check_act(normal(70, 1000, dtype=torch.float16, device=device), "gelu_tanh")
    check_gated(normal(5, 4096, dtype=torch.float16, device=device), "silu", packed=True)


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_extremes(dtype, activation, device):
    for scale in (1e30 if dtype == torch.float32 else 1e4, 1e-6):
        x = normal(3, 24, dtype=dtype, device=device, scale=scale)
        check_act(x, activation, scale=scale)
        check_gated(x, activation, scale=scale)
    # Through the bend and both tails.
    x = torch.linspace(-60, 60, 1201, device=device).to(dtype)
    check_act(x, activation, bias=False)


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_tails_keep_their_digits(activation, device):
    x = torch.linspace(-8, 8, 999, device=device)
    oracle = x.double()
    inner = (2 / torch.pi) ** 0.5 * (oracle + 0.044715 * oracle**3)
    gate = torch.sigmoid(2 * inner if activation == "gelu_tanh" else oracle)
    got = frozen.activate(x, activation=activation).double()
    torch.testing.assert_close(got, oracle * gate, rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_tensors_that_are_not_contiguous(dtype, device):
    wide = normal(6, 70, dtype=dtype, device=device)
    for x in (wide[:, 3:27], wide[::2, :24], wide.t()[:, :4], wide[0].expand(3, 70), wide[0]):
        check_act(x, "gelu")
        check_gated(x, "silu")
        # (All that there is: of few elements PyTorch may by chance have no error at all.)
        check_gated(x[..., : x.shape[-1] // 2 * 2], "silu", packed=True)
    x = wide[:, :48].view(2, 3, 2, 24).transpose(0, 2)
    check_act(x, "gelu_tanh")
    check_gated(x, "gelu", packed=True)
    # Gradients with strides of their own: of a sum, and transposed.
    for dy in (wide[:1, :1].expand(6, 24), wide[:, 1:49:2]):
        for ours, theirs in (
            (frozen.silu, F.silu),
            (
                lambda x: frozen.gated(x.repeat(1, 2)),
                lambda x: torch_gated(x, x, None, None, "silu"),
            ),
        ):
            check(ours, theirs, [wide[:, 5:29]], [], [dy])


def test_names(device):
    x = normal(3, 24, device=device)
    for name, same in (
        ("gelu_new", frozen.gelu(x, approximate="tanh")),
        ("gelu_pytorch_tanh", frozen.gelu(x, approximate="tanh")),
        ("gelu", frozen.gelu(x)),
        ("swish", frozen.silu(x)),
    ):
        assert torch.equal(frozen.activate(x, activation=name), same)
    assert not torch.equal(frozen.gelu(x), frozen.gelu(x, approximate="tanh"))
