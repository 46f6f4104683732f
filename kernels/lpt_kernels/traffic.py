"""Counts the bytes that kernels load and store, in Triton's interpreter: traffic without a GPU.

    with count_traffic() as traffic:
        traffic.name("hidden", hidden)
        packed = operator(hidden, weight)
        traffic.name("packed", packed)  # also after the kernels ran
    print(traffic)
    assert traffic.loads["hidden"] == hidden.nbytes
    assert traffic.loads["other"] == 0

Counted are the unmasked elements of every load, store and atomic (a load and a store). An address
that several elements of one block share counts once for that instruction, for the hardware reads it
once. Every instruction counts anew, so bytes that two programs read count twice. That is right for
activations, which stream through; weights stay in the L2 cache, so for them ask `distinct` how many
bytes have to come from memory and `reread` how often each is loaded. Not counted: the rest of a
32-byte sector of which a kernel uses a part, and spilled registers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from .common import INTERPRETED


@dataclass(frozen=True)
class Spans:
    """A set of bytes: sorted, disjoint spans [start, stop) of addresses, int64 each."""

    start: np.ndarray
    stop: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of all intervals."""
        return int((self.stop - self.start).sum())

    def holds(self, address: np.ndarray) -> np.ndarray:
        """Whether each address lies in the set."""
        i = np.searchsorted(self.start, address, side="right") - 1
        return (i >= 0) & (address < self.stop[i]) if len(self.start) else i >= 0

    @classmethod
    def union(cls, start: np.ndarray, stop: np.ndarray) -> Spans:
        """Of any spans, in any order, that may overlap."""
        order = np.argsort(start)
        start, stop = start[order], np.maximum.accumulate(stop[order])
        begins = np.append(True, start[1:] > stop[:-1])[: len(start)]
        return cls(start[begins], stop[np.append(begins[1:], True)[: len(start)]])

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Spans:
        """The bytes of a tensor's elements; of a strided view's alone."""
        start = np.array([tensor.data_ptr()], np.int64)
        if tensor.numel() == 0:
            return cls(start[:0], start[:0])
        width = tensor.element_size()
        # From the innermost axis outwards; the axes that continue it lengthen one span.
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            step = stride * tensor.element_size()
            if len(start) == 1 and step == width:
                width *= size
            elif size > 1 and step > 0:
                start = (start[:, None] + step * np.arange(size)).reshape(-1)
        return cls.union(start, start + width)


class Traffic:
    """What `count_traffic` saw, by tensor. Figures are bytes."""

    OTHER = "other"

    def __init__(self):
        self._named: dict[str, Spans] = {}
        self._arguments: dict[str, Spans] = {}
        # As long as they live, no other tensor can have their addresses.
        self._alive: list[torch.Tensor] = []
        self._log: list[tuple[str, str, np.ndarray, np.ndarray]] = []
        self._kernel = "?"

    def name(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Accesses to the elements of `tensor`, past ones too, count under `name`.

        Args:
            name: any but "other". The same name again adds another tensor to it.
            tensor: on the CPU. A view stands for its own elements, not for its storage.

        Returns:
            `tensor`.

        Raises:
            ValueError: tensor not on the CPU, name "other", or bytes that have a name already.
        """
        if tensor.device.type != "cpu":
            raise ValueError(
                f"tensor {name!r} is on {tensor.device}, traffic is counted on the CPU"
            )
        if name == self.OTHER:
            raise ValueError("'other' is what has no name, give the tensor another")
        spans = Spans.of(tensor)
        for taken, old in self._named.items():
            overlap = old.holds(spans.start).any() or spans.holds(old.start).any()
            if overlap and taken != name:
                raise ValueError(
                    f"tensors {taken!r} and {name!r} share bytes, name views that are disjoint"
                )
        self._named[name] = _together(
            [self._named[name], spans] if name in self._named else [spans]
        )
        self._alive.append(tensor)
        return tensor

    def only(self, kernel: str) -> Traffic:
        """The part that one kernel (its function's name) has in it, with the names as of now."""
        part = Traffic()
        part._named, part._arguments = dict(self._named), dict(self._arguments)
        part._alive = self._alive
        part._log = [entry for entry in self._log if entry[1] == kernel]
        return part

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels that loaded or stored, in the order of their first access."""
        return list(dict.fromkeys(kernel for _, kernel, _, _ in self._log))

    @property
    def loads(self) -> dict[str, int]:
        """Bytes loaded from each named tensor, each time counted, and "other" for the rest."""
        return self._count("load").total

    @property
    def stores(self) -> dict[str, int]:
        """Bytes stored, as `loads`."""
        return self._count("store").total

    def touched(self, names: str | Iterable[str]) -> int:
        """Bytes loaded and stored together, of one name or of several."""
        loads, stores = self.loads, self.stores
        names = [names] if isinstance(names, str) else names
        return sum(loads[name] + stores[name] for name in names)

    def distinct(self, name: str, kind: str = "load") -> int:
        """Bytes of the tensor that were loaded (stored, with kind="store") at all."""
        return self._count(kind).distinct[name]

    def reread(self, name: str) -> float:
        """How often a byte that is loaded is loaded, on average; 0.0 when none is."""
        count = self._count("load")
        return count.total[name] / max(count.distinct[name], 1)

    def most(self, name: str, kind: str = "load") -> int:
        """How often the byte is loaded (stored) that is so most often."""
        return self._count(kind).most[name]

    def unnamed(self) -> dict[str, int]:
        """What "other" is made of: bytes loaded and stored by "kernel.argument", the tensor that
        the kernel got there, or by "?" outside of every argument."""
        parts: dict[str, int] = {}
        for kind in ("load", "store"):
            for owner, count in self._count(kind).unnamed.items():
                parts[owner] = parts.get(owner, 0) + count
        return parts

    def __str__(self) -> str:
        load, store = self._count("load"), self._count("store")
        rows = [("tensor", "bytes", "loaded", "times", "most", "stored", "times", "most")]
        for name in load.total:
            size = self._named[name].nbytes if name in self._named else 0
            cells = [str(size) if size else ""]
            for c in (load, store):
                mean = c.total[name] / max(c.distinct[name], 1)
                cells += [str(c.total[name]), f"{mean:.2f}", str(c.most[name])]
            rows.append((name, *cells))
        wide = max(len(row[0]) for row in rows)
        lines = [row[0].ljust(wide) + "".join(c.rjust(12) for c in row[1:]) for row in rows]
        return "\n".join(lines + [f"other: {k} {v}" for k, v in self.unnamed().items()])

    def _count(self, kind: str) -> _Count:
        """Cuts the addresses where any access or tensor begins or ends, and counts in each piece
        between two cuts how many accesses cover it."""
        log = [entry for entry in self._log if entry[0] == kind]
        none = np.empty(0, np.int64)
        start = np.concatenate([none, *(entry[2] for entry in log)])
        stop = np.concatenate([none, *(entry[3] for entry in log)])
        owners = self._arguments | self._named  # the later ones take from the earlier ones
        bounds = [x for spans in owners.values() for x in (spans.start, spans.stop)]
        cuts = np.unique(np.concatenate([start, stop, *bounds]))
        change = np.bincount(np.searchsorted(cuts, start), minlength=len(cuts))
        change -= np.bincount(np.searchsorted(cuts, stop), minlength=len(cuts))
        times, size = np.cumsum(change)[:-1], np.diff(cuts)
        owner = np.full(len(size), -1)
        for i, spans in enumerate(owners.values()):
            owner[spans.holds(cuts[:-1])] = i
        index = {name: i for i, name in enumerate(owners)}
        mine = {name: owner == index[name] for name in self._named}
        mine[self.OTHER] = ~np.isin(owner, [index[name] for name in self._named])
        rest = {"?": owner == -1, **{n: owner == index[n] for n in owners if n not in self._named}}
        return _Count(
            total={name: int((size * times)[own].sum()) for name, own in mine.items()},
            distinct={name: int(size[own & (times > 0)].sum()) for name, own in mine.items()},
            most={name: int(times[own].max(initial=0)) for name, own in mine.items()},
            unnamed={
                n: int((size * times)[own].sum()) for n, own in rest.items() if times[own].any()
            },
        )

    def _access(self, kind: str, pointers, mask) -> None:
        """Notes one instruction: pointers and mask are the interpreter's handles."""
        address = pointers.data.astype(np.int64)
        if mask is not None:
            address = address[np.broadcast_to(mask.data, address.shape)]
        address = np.unique(address)
        if len(address):
            width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
            # Neighbours join here, to keep the log short: a row is then one span.
            spans = Spans.union(address, address + width)
            self._log.append((kind, self._kernel, spans.start, spans.stop))

    def _begin(self, kernel: str, arguments: dict[str, object]) -> None:
        self._kernel = kernel
        for argument, tensor in arguments.items():
            if isinstance(tensor, torch.Tensor):
                key, spans = f"{kernel}.{argument}", Spans.of(tensor)
                old = [self._arguments[key]] if key in self._arguments else []
                self._arguments[key] = _together([*old, spans])
                self._alive.append(tensor)


@dataclass(frozen=True)
class _Count:
    total: dict[str, int]
    distinct: dict[str, int]
    most: dict[str, int]
    unnamed: dict[str, int]


def _together(sets: list[Spans]) -> Spans:
    start, stop = ([getattr(s, end) for s in sets] for end in ("start", "stop"))
    return Spans.union(np.concatenate(start), np.concatenate(stop))


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Inside, what kernels load and store is counted; the figures can be read after it too.

    Raises:
        RuntimeError: kernels are not interpreted (TRITON_INTERPRET=1 has to be set at import).
    """
    if not INTERPRETED:
        raise RuntimeError("traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1")
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    traffic = Traffic()

    def noting(original, kinds: tuple[str, ...], pointers: int, mask: int | None):
        def access(builder, *args, **kwargs):
            for kind in kinds:
                traffic._access(kind, args[pointers], None if mask is None else args[mask])
            return original(builder, *args, **kwargs)

        return access

    run = GridExecutor.__call__

    def run_and_note(self, *args, **kwargs):
        traffic._begin(self.fn.__name__, dict(zip(self.arg_names, args, strict=False)) | kwargs)
        return run(self, *args, **kwargs)

    # Everything else that loads or stores goes through one of these. Where the arguments are, in
    # Triton 3.6 to 3.9: pointers, mask.
    places = {
        "create_masked_load": (("load",), 0, 1),
        "create_masked_store": (("store",), 0, 2),
        "create_atomic_rmw": (("load", "store"), 1, 3),
        "create_atomic_cas": (("load", "store"), 0, None),
    }
    originals = {name: getattr(InterpreterBuilder, name) for name in places}
    try:
        GridExecutor.__call__ = run_and_note
        for name, place in places.items():
            setattr(InterpreterBuilder, name, noting(originals[name], *place))
        yield traffic
    finally:
        GridExecutor.__call__ = run
        for name, original in originals.items():
            setattr(InterpreterBuilder, name, original)
