"""Rows of a device-resident cache -> a packed batch with m free rows before each example.

The batch is laid out as `[m rows, example 0, m rows, example 1, ...]`: text row t of example b goes
to row t + m (b + 1), and the in-place insertion writes the prompts into the m rows left free, so
that concatenation costs nothing. Quantised rows are dequantised on the way: a cache of 8 bits is
read as 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .common import INTERPRETED
from .gather_rows import gather_rows_fwd_kernel, source_rows_fwd_kernel
from .launch import best_config, ceil_div, launch, next_power_of_2

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTS = (torch.int32, torch.int64)
_KINDS = dict.fromkeys(FLOATS, "plain") | {
    torch.int8: "int8",
    torch.uint8: "fp8",
    torch.float8_e4m3fn: "fp8",
}
# Rows are counted in int32 on the device, as `cu_seqlens` is; half of its range leaves room for
# the gaps and for the end of the last tile.
MAX_ROWS = 2**30
BLOCK_B = 256  # examples that a look-up takes at a time


@dataclass(frozen=True, eq=False)
class Store:
    """A cache of hidden states that lies whole on one device.

    Attributes:
        hidden: [N, D], rows may be further apart than D. bfloat16, float16 or float32 ("plain");
            int8 ("int8"); uint8 or float8_e4m3fn ("fp8", both the codes of e4m3fn).
        cu_seqlens: int32 or int64 [E + 1]; example e is rows cu_seqlens[e] .. cu_seqlens[e + 1].
        token_scale: float32 [N], for "int8" and "fp8" alone.
        channel_scale: float32 [D], for "int8" alone.

    A row is, in float32 and in this order, hidden * channel_scale * token_scale ("int8") or
    hidden * token_scale ("fp8"), rounded once to the dtype asked for.
    """

    hidden: Tensor
    cu_seqlens: Tensor
    token_scale: Tensor | None = None
    channel_scale: Tensor | None = None

    @property
    def kind(self) -> str:
        """ "plain", "int8" or "fp8". ValueError for a dtype that no cache has."""
        if self.hidden.dtype not in _KINDS:
            got = f"store.hidden has dtype {self.hidden.dtype}"
            raise _error(got, f"one of {_names(_KINDS)}", "convert or quantise it first")
        return _KINDS[self.hidden.dtype]

    @property
    def codes(self) -> Tensor:
        """`hidden` as kernels take it: fp8 as uint8, for not every GPU knows e4m3fn."""
        return self.hidden.view(torch.uint8) if self.kind == "fp8" else self.hidden

    @property
    def examples(self) -> int:
        """E."""
        return len(self.cu_seqlens) - 1

    def check(self) -> None:
        """Raises ValueError when shapes, dtypes or devices do not fit; values are not looked at."""
        hidden, kind = self.hidden, self.kind
        if hidden.dim() != 2 or hidden.shape[1] == 0:
            got = f"store.hidden has shape {tuple(hidden.shape)}"
            raise _error(got, "[N, D] with D > 0", "pack the examples first")
        n, d = hidden.shape
        if d > 1 and hidden.stride(1) != 1:
            got = f"store.hidden has strides {hidden.stride()}"
            raise _error(got, "1 along D", "call .contiguous() once when the store is made")
        cu, device = self.cu_seqlens, hidden.device
        way_out = "give one entry more than examples, from 0 to N"
        _check_vector("store.cu_seqlens", cu, INTS, max(1, cu.numel()), device, way_out)
        way_out = "give what the rows were quantised with"
        for name, length, kinds in (
            ("token_scale", n, ("int8", "fp8")),
            ("channel_scale", d, ("int8",)),
        ):
            scale, name = getattr(self, name), f"store.{name}"
            if kind in kinds:
                _check_vector(name, scale, (torch.float32,), length, device, way_out)
            elif scale is not None:
                raise _error(f"{name} was given", f"None for {hidden.dtype} rows", "leave it out")


@dataclass(frozen=True)
class GatherConfig:
    """How `gather_rows_fwd_kernel` is cut up: rows and columns of a tile, warps of a program."""

    BLOCK_T: int
    BLOCK_D: int
    num_warps: int = 4

    @classmethod
    def default(cls, d: int) -> GatherConfig:
        """About 8,192 elements a program, in rows as long as they come: 64 a thread keep enough
        loads in flight and fit in registers in float32 too. By D alone, so that batches of
        different sizes share one compiled kernel.
        """
        block_d = min(1024, next_power_of_2(d, 16))
        return cls(min(64, 8192 // block_d), block_d)

    @classmethod
    def candidates(cls, d: int) -> list[GatherConfig]:
        """What LPT_AUTOTUNE=1 tries beside the default."""
        widths = {min(width, next_power_of_2(d, 16)) for width in (512, 1024, 2048, 4096)}
        return [
            cls(max(1, min(128, size // width)), width, warps)
            for width in sorted(widths)
            for size in (4096, 8192, 16384)
            for warps in (4, 8)
        ]


def source_rows(
    store: Store, index: Tensor, *, cu_seqlens: Tensor | None = None, total: int | None = None
) -> Tensor:
    """The first row of each example of a batch: int64 [B] = store.cu_seqlens[index].

    Arguments and errors as of `gather_rows`: cu_seqlens and total are only checked, where given.
    """
    _check_index(store, index)
    return _look_up(store, index, cu_seqlens, total)[0]


def gather_rows(
    store: Store,
    index: Tensor,
    m: int = 0,
    *,
    cu_seqlens: Tensor | None = None,
    total: int | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The examples `index` of `store`, packed, each after m rows left free for its prompt.

    The number of text rows T must be known on the host. A data loader knows it from its index of
    lengths: give `total`, or an `out` of the right size. With neither, the host waits for the
    device once (`.item()`), on CUDA for everything queued before.

    Args:
        store: the cache.
        index: int32 or int64 [B] on the store's device, any order, repeats allowed, may be empty.
        m: free rows before each example. They are not written: what `out` has there stays, and
            without `out` they are uninitialised. The in-place insertion fills them.
        cu_seqlens: int32 [B + 1] on the store's device, where each example's text rows are, the
            free rows not counted; computed from `store` and `index` when not given.
        total: T = cu_seqlens[B].
        dtype: of the result; default `out`'s, else the store's own, else (int8, fp8) bfloat16.
        out: [T + B m, D] to write into, rows may be further apart than D.

    Returns:
        packed [T + B m, D], where row t of the packed text, of example b, is row t + m (b + 1);
        and cu_seqlens. Not differentiable: what lies in a cache is constant.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit. On the CPU also an index out of
            range, `cu_seqlens` that differs from the store's lengths, or a wrong `total`; on CUDA
            these are device asserts. Where a build of PyTorch leaves those out (ROCm), rows
            outside the store are read as 0 and nothing outside `out` is written.
    """
    _check_index(store, index)
    device, b, d = store.hidden.device, len(index), store.hidden.shape[1]
    if not isinstance(m, int) or m < 0:
        raise _error(f"m is {m!r}", "an int >= 0", "it is the number of prompt rows")
    if out is not None:
        width = out.shape[1] if out.dim() == 2 else None
        if width != d or (d > 1 and out.stride(1) != 1) or out.stride(0) < d:
            wanted = f"[T + B m, {d}] with contiguous rows that do not overlap"
            raise _error(_kind_of("out", out), wanted, "allocate it so, or leave it out")
        _check_device("out", out, device)
        if total is None:
            total = len(out) - b * m
    dtype = _output_dtype(store, dtype, out)
    if total is not None:
        _check_total(total, b * m)

    source, own, report = _look_up(store, index, cu_seqlens, total)
    cu_seqlens = own if cu_seqlens is None else cu_seqlens
    if total is None:
        total = int(report[0].item())
        _check_total(total, b * m)
    rows = total + b * m
    if out is None:
        out = torch.empty(rows, d, dtype=dtype, device=device)
    elif len(out) != rows:
        wanted = f"total + B m = {total} + {b * m} rows"
        raise _error(_kind_of("out", out), wanted, "slice it to that many")

    def run(config: GatherConfig) -> None:
        tiles = ceil_div(total, config.BLOCK_T) * ceil_div(d, config.BLOCK_D)
        launch(
            gather_rows_fwd_kernel,
            (tiles,),
            x_ptr=store.codes,
            token_scale_ptr=store.token_scale,
            channel_scale_ptr=store.channel_scale,
            source_ptr=source,
            cu_seqlens_ptr=cu_seqlens,
            out_ptr=out,
            stride_xn=store.hidden.stride(0),
            stride_ot=out.stride(0),
            N=len(store.hidden),
            T=total,
            B=b,
            m=m,
            D=d,
            STORE=store.kind,
            STEPS=b.bit_length(),
            BLOCK_T=config.BLOCK_T,
            BLOCK_D=config.BLOCK_D,
            num_warps=config.num_warps,
        )

    key = ("gather_rows", store.hidden.dtype, dtype, d, next_power_of_2(total))
    default = GatherConfig.default(d)
    run(best_config(key, default, GatherConfig.candidates(d), run, device))
    return out, cu_seqlens


def _look_up(
    store: Store, index: Tensor, cu_seqlens: Tensor | None, total: int | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Source rows int64 [B], cu_seqlens int32 [B + 1] unless given, and (T, whether all was right)
    int64 [2], in one kernel: as two dozen operators of PyTorch it would outlast the gather itself.
    """
    device, b, e = store.hidden.device, len(index), store.examples
    source = torch.empty(b, dtype=torch.int64, device=device)
    report = torch.empty(2, dtype=torch.int64, device=device)
    own = None
    if cu_seqlens is not None:
        int32 = (torch.int32,)
        _check_vector("cu_seqlens", cu_seqlens, int32, b + 1, device, "or leave it out")
    else:
        own = torch.empty(b + 1, dtype=torch.int32, device=device)
    launch(
        source_rows_fwd_kernel,
        (1,),
        index_ptr=index.contiguous(),
        spans_ptr=store.cu_seqlens,
        given_ptr=cu_seqlens,
        source_ptr=source,
        cu_seqlens_ptr=own,
        report_ptr=report,
        N=len(store.hidden),
        E=e,
        B=b,
        total=-1 if total is None else total,
        BLOCKS=ceil_div(b, BLOCK_B),
        BLOCK_B=BLOCK_B,
    )
    if device.type == "meta":
        return source, own, report
    if device.type != "cpu":
        message = "lpt_kernels.gather: index out of range, or wrong cu_seqlens or total"
        torch._assert_async(report[1], message)
    elif not report[1]:
        bad = index[(index < 0) | (index >= e)].tolist()
        if bad:
            got = f"index has {bad[:8]}"
            raise _error(got, f"0 .. {e - 1}", f"the store has {e} examples")
        spans = store.cu_seqlens
        lengths = spans[index.long() + 1] - spans[index.long()]
        right = [0, *lengths.cumsum(0).tolist()]
        if cu_seqlens is not None and cu_seqlens.tolist() != right:
            raise _error(f"cu_seqlens is {cu_seqlens.tolist()}", f"{right}", "or leave it out")
        if total is not None and total != right[-1]:
            raise _error(f"total is {total}", f"{right[-1]} for this index", "or leave it out")
        got = f"store.cu_seqlens is {spans.tolist()[:8]} .."
        raise _error(got, f"rising from 0 to {len(store.hidden)}", "it belongs to other rows")
    return source, own, report


def _error(got: str, expected: str, way_out: str) -> ValueError:
    return ValueError(f"{got}, expected {expected}; {way_out}")


def _kind_of(name: str, x: Tensor) -> str:
    return f"{name} is {x.dtype} {tuple(x.shape)} with strides {x.stride()}"


def _names(dtypes) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_vector(name: str, x, dtypes, length: int, device: torch.device, way_out: str) -> None:
    wanted = f"contiguous {_names(dtypes)} [{length}]"
    if x is None:
        raise _error(f"{name} is None", wanted, way_out)
    if x.dtype not in dtypes or x.shape != (length,) or not x.is_contiguous():
        raise _error(_kind_of(name, x), wanted, way_out)
    _check_device(name, x, device)


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise _error(f"{name} is on {x.device}", f"{device} as store.hidden", "move it with .to()")


def _check_index(store: Store, index: Tensor) -> None:
    store.check()
    if store.hidden.is_cpu and not INTERPRETED:
        wanted = "a GPU, for Triton runs on nothing else"
        raise _error("store.hidden is on cpu", wanted, "or start with TRITON_INTERPRET=1 to test")
    if index.dtype not in INTS or index.dim() != 1:
        wanted = f"{_names(INTS)} [B]"
        raise _error(_kind_of("index", index), wanted, "give the examples' numbers as one list")
    _check_device("index", index, store.hidden.device)
    if len(index) and not store.examples:
        got = f"index has {len(index)} entries"
        raise _error(got, "none for a store without examples", "fill the store first")


def _check_total(total: int, free: int) -> None:
    if total < 0 or total + free >= MAX_ROWS:
        got = f"total is {total} rows beside B m = {free} free ones"
        wanted = f"0 or more and below {MAX_ROWS} together"
        raise _error(got, wanted, "check total and the size of out, or split the batch")


def _output_dtype(store: Store, dtype: torch.dtype | None, out: Tensor | None) -> torch.dtype:
    if dtype is None:
        own = store.hidden.dtype if store.kind == "plain" else torch.bfloat16
        dtype = own if out is None else out.dtype
    if dtype not in FLOATS or (out is not None and out.dtype != dtype):
        got = f"dtype is {dtype}" + ("" if out is None else f" and out is {out.dtype}")
        raise _error(got, f"the same one of {_names(FLOATS)}", "or leave dtype out")
    return dtype
