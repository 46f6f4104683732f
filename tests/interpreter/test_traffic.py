"""The traffic counter on kernels whose traffic is known."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from lpt_kernels.common import INTERPRETED
from lpt_kernels.launch import launch
from lpt_kernels.traffic import Spans, count_traffic

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="traffic is counted in the interpreter")


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, READS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in tl.static_range(READS):
        if MASKED:
            x = tl.load(x_ptr + i, mask=i < n, other=0)
        else:
            x = tl.load(x_ptr + i)
    if MASKED:
        tl.store(y_ptr + i, x, mask=i < n)
    else:
        tl.store(y_ptr + i, x)


@triton.jit
def scale_rows_kernel(
    x_ptr, scale_ptr, w_ptr, y_ptr, T, D, stride_xt, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """y = x * scale[row] * w[column] + (scalar load of w[0]) * 0"""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    mask = (t < T)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + t[:, None] * stride_xt + d[None, :], mask=mask, other=0.0)
    # All columns of a row load the same address.
    scale = tl.load(scale_ptr + t[:, None] + 0 * d[None, :], mask=mask, other=0.0)
    w = tl.load(w_ptr + d, mask=d < D, other=0.0)
    tl.store(y_ptr + t[:, None] * D + d[None, :], x * scale * w[None, :], mask=mask)


@triton.jit
def scalar_kernel(x_ptr, y_ptr):
    if tl.load(x_ptr) > 0:
        tl.store(y_ptr, tl.load(x_ptr + 1))


@triton.jit
def add_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + i // 2, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


def copy(x, y, reads=1, masked=True, block=16):
    n = x.numel()
    grid = (triton.cdiv(n, block),)
    launch(copy_kernel, grid, x_ptr=x, y_ptr=y, n=n, READS=reads, MASKED=masked, BLOCK=block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("masked", [True, False])
def test_copy(dtype, masked):
    n = 37 if masked else 48
    x, y = torch.arange(n).to(dtype), torch.zeros(n, dtype=dtype)
    with count_traffic() as traffic:
        traffic.name("x", x)
        traffic.name("y", y)
        copy(x, y, masked=masked)
    assert torch.equal(x, y)
    assert traffic.loads == {"x": x.nbytes, "y": 0, "other": 0}
    assert traffic.stores == {"x": 0, "y": y.nbytes, "other": 0}
    assert traffic.touched("x") == x.nbytes
    assert traffic.touched(["x", "y"]) == x.nbytes + y.nbytes
    assert traffic.reread("x") == 1.0 and traffic.reread("y") == 0.0
    assert traffic.most("y", "store") == 1


def test_every_load_counts():
    x, y = torch.randn(100), torch.empty(100)
    with count_traffic() as traffic:
        traffic.name("x", x)
        traffic.name("y", y)
        copy(x, y, reads=2)
        assert traffic.loads["x"] == 800  # to be read inside as well
        copy(x[:50], y[50:])
    assert traffic.loads == {"x": 1000, "y": 0, "other": 0}
    assert traffic.distinct("x") == 400 and traffic.distinct("y", "store") == 400
    assert traffic.reread("x") == 2.5 and traffic.most("x") == 3
    assert traffic.stores["y"] == 600 and traffic.most("y", "store") == 2


def run_scale(x, scale, w, y, block_t=4):
    T, D = x.shape
    launch(
        scale_rows_kernel,
        (triton.cdiv(T, block_t),),
        x_ptr=x,
        scale_ptr=scale,
        w_ptr=w,
        y_ptr=y,
        T=T,
        D=D,
        stride_xt=x.stride(0),
        BLOCK_T=block_t,
        BLOCK_D=triton.next_power_of_2(D),
    )


def test_broadcast_and_weights_read_again():
    T, D = 10, 24  # three programs
    x, scale, w, y = torch.randn(T, D), torch.randn(T), torch.randn(D), torch.empty(T, D)
    with count_traffic() as traffic:
        for name, tensor in {"x": x, "scale": scale, "w": w, "y": y}.items():
            assert traffic.name(name, tensor) is tensor
        run_scale(x, scale, w, y)
    torch.testing.assert_close(y, x * scale[:, None] * w)
    assert traffic.loads == {"x": x.nbytes, "scale": scale.nbytes, "w": 3 * w.nbytes} | {
        "y": 0,
        "other": 0,
    }
    assert traffic.reread("w") == 3.0 and traffic.most("w") == 3
    assert traffic.distinct("w") == w.nbytes
    assert traffic.unnamed() == {}


def test_views_of_one_storage():
    both = torch.randn(6, 64)
    left, right, y = both[:, :24], both[:, 32:56], torch.empty(6, 24)
    scale, w = torch.ones(6), torch.ones(24)
    with count_traffic() as traffic:
        traffic.name("left", left)
        traffic.name("right", right)
        run_scale(right, scale, w, y)
        copy(both[5, :3], y[0, :3])
    assert traffic.loads["right"] == 6 * 24 * 4
    assert traffic.loads["left"] == 3 * 4
    # An offset into a storage without a name around it.
    x = torch.randn(64)
    with count_traffic() as traffic:
        traffic.name("tail", x[48:])
        copy(x[40:60], torch.empty(20))
    assert traffic.loads == {"tail": 12 * 4, "other": 8 * 4}
    assert traffic.stores == {"tail": 0, "other": 80}
    assert traffic.unnamed() == {"copy_kernel.x_ptr": 32, "copy_kernel.y_ptr": 80}


def test_named_after_the_run():
    with count_traffic() as traffic:
        x = torch.randn(16)
        for _ in range(5):  # memory that is given back must not be taken for another tensor's
            y = torch.empty(16)
            copy(x, y)
        traffic.name("x", x)
    traffic.name("y", y)
    assert traffic.loads == {"x": 5 * 64, "y": 0, "other": 0}
    assert traffic.stores == {"x": 0, "y": 64, "other": 4 * 64}


def test_outside_of_every_tensor():
    storage = torch.zeros(64)
    x, y = storage[:8], torch.empty(16)
    with count_traffic() as traffic:
        traffic.name("x", x)
        traffic.name("y", y)
        launch(
            copy_kernel, (1,), x_ptr=x, y_ptr=y, n=16, READS=1, MASKED=True, BLOCK=16
        )  # reads on behind x
    assert traffic.loads == {"x": 32, "y": 0, "other": 32}
    assert traffic.unnamed() == {"?": 32}


def test_scalars_and_branches():
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(2)
    with count_traffic() as traffic:
        traffic.name("x", x)
        traffic.name("y", y)
        launch(scalar_kernel, (1,), x_ptr=x, y_ptr=y)
        launch(scalar_kernel, (2,), x_ptr=-x, y_ptr=y)  # the branch is not taken
    assert traffic.loads == {"x": 8, "y": 0, "other": 8}
    assert traffic.stores["y"] == 4


def test_atomics_load_and_store():
    x, y = torch.ones(7), torch.zeros(4)
    with count_traffic() as traffic:
        traffic.name("x", x)
        traffic.name("y", y)
        launch(add_kernel, (1,), x_ptr=x, y_ptr=y, n=7, BLOCK=8)
    assert y.tolist() == [2, 2, 2, 1]
    assert traffic.loads == {"x": 28, "y": 16, "other": 0}
    assert traffic.stores == {"x": 0, "y": 16, "other": 0}


def test_one_kernel_of_several_and_the_table():
    x, y = torch.ones(8), torch.zeros(8)
    with count_traffic() as traffic:
        traffic.name("x", x)
        traffic.name("y", y)
        copy(x, y)
        launch(add_kernel, (1,), x_ptr=x, y_ptr=y, n=8, BLOCK=8)
    assert traffic.kernels == ["copy_kernel", "add_kernel"]
    assert traffic.only("copy_kernel").stores == {"x": 0, "y": 32, "other": 0}
    assert traffic.only("add_kernel").stores == {"x": 0, "y": 16, "other": 0}
    assert traffic.only("add_kernel").reread("x") == 1.0
    lines = [line.split() for line in str(traffic).splitlines()]
    assert lines[0] == ["tensor", "bytes", "loaded", "times", "most", "stored", "times", "most"]
    assert lines[1] == ["x", "32", "64", "2.00", "2", "0", "0.00", "0"]
    assert lines[2] == ["y", "32", "16", "1.00", "1", "48", "1.50", "2"]
    assert lines[3] == ["other", "0", "0.00", "0", "0", "0.00", "0"]


def test_nothing_ran():
    with count_traffic() as traffic:
        traffic.name("x", torch.ones(3))
        traffic.name("nothing", torch.ones(0, 5))
    assert traffic.loads == traffic.stores == {"x": 0, "nothing": 0, "other": 0}
    with count_traffic() as traffic:
        pass
    assert traffic.loads == {"other": 0} and "other" in str(traffic)


def test_counting_ends_with_the_block():
    x, y = torch.ones(8), torch.zeros(8)
    with count_traffic() as outer:
        outer.name("x", x)
        with pytest.raises(ZeroDivisionError), count_traffic() as inner:
            inner.name("x", x)
            copy(x, y)
            1 / 0  # noqa: B018
        copy(x, y)
    copy(x, y)
    assert inner.loads["x"] == 32 and outer.loads["x"] == 64


def test_names_that_cannot_be():
    x = torch.ones(4, 4)
    with count_traffic() as traffic:
        traffic.name("x", x[:2])
        traffic.name("x", x[3])  # more of it
        with pytest.raises(ValueError, match="'x' and 'all' share bytes"):
            traffic.name("all", x)
        with pytest.raises(ValueError, match="'x' and 'column' share bytes"):
            traffic.name("column", x[:, 1])
        traffic.name("row", x[2])
        with pytest.raises(ValueError, match="is what has no name"):
            traffic.name("other", torch.ones(1))
        with pytest.raises(ValueError, match="is on meta"):
            traffic.name("m", torch.ones(1, device="meta"))
    assert set(traffic.loads) == {"x", "row", "other"}


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[1:, 2:5],
        lambda x: x.transpose(0, 2),
        lambda x: x[:, ::2, 1:],
        lambda x: x[2, 3, 4],
        lambda x: x[:1].expand(9, 6, 7),
        lambda x: x[:, :, :1],
        lambda x: x.as_strided((5, 4), (2, 1)),
    ],
)
def test_bytes_of_a_view(view):
    x = torch.arange(4 * 6 * 7, dtype=torch.int16).view(4, 6, 7)
    spans = Spans.of(view(x))
    elements = (torch.unique(view(x)) * 2).tolist()
    held = [
        b for b in range(-4, x.nbytes + 4) if spans.holds(spans.start[:1] * 0 + b + x.data_ptr())
    ]
    assert held == [b for e in elements for b in (e, e + 1)]
    assert spans.nbytes == len(held)
    assert (spans.start[1:] > spans.stop[:-1]).all()
