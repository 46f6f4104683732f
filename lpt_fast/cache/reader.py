"""Reading rows into packed batches: from the device, from memory, or from the files.

Files are read by `pread` straight into the batch and hashed there while they are in the
processor's cache. Mapping them instead would be no faster, would count against limits on address
space, and would end the process where a file is cut short under it.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..packing import PackedBatch
from .errors import CacheError, CorruptCacheError, MissingRowsError
from .folder import Folder
from .guards import check_batch
from .index import RowTable
from .planner import Plan
from .quantize import FLOATS, decode, torch_dtype
from .shard import REPAIR
from .shard_files import ShardFiles

AHEAD_ROWS = 256  # rows asked of a cold disk before they are needed
CHECKS = ("read", "never")
PIECE = 2**26  # bytes of a page-locked buffer on the way to the device


class RowReader:
    """Rows of one cache as packed batches.

    Args:
        folder, table: the cache.
        plan: where rows are read from (planner.py).
        device: where batches go.
        check: "read": every row's hash is compared on every read from a file; "never": not at all.
    """

    def __init__(
        self,
        folder: Folder,
        table: RowTable,
        plan: Plan,
        device: torch.device,
        check: str = "read",
    ):
        check_mode(check)
        self.folder, self.table, self.plan, self.device = folder, table, plan, device
        self.check = check
        self.files = ShardFiles(folder, table.names)
        identity = folder.identity
        self._store = identity.store
        self._dtype = torch_dtype(identity.store)
        self._row_bytes = identity.token_bytes
        self._channel = (
            None if folder.channel_scale is None else torch.from_numpy(folder.channel_scale)
        )
        self._resident: Tensor | None = None  # [T, D] of the whole cache in memory
        self._on_device = None
        self.rows_read = self.bytes_read = 0

    # -- whole batches -----------------------------------------------------------------------------

    def read(
        self, rows: np.ndarray, room: int = 0, dtype: torch.dtype | None = None
    ) -> PackedBatch:
        """A batch on `device`. Arguments as of ActivationCache.read; rows are valid numbers."""
        out_dtype = dtype or FLOATS.get(self._store, torch.bfloat16)
        lengths = self.table.length[rows]
        cu_seqlens = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
        tokens = self.table.tokens_of(rows)
        if self.plan.tier == "device" and self.device.type == "cuda":
            hidden = self._from_device(rows, room, out_dtype, int(cu_seqlens[-1]))
        else:
            hidden = self._to_device(self._from_host(rows, lengths, tokens, room, out_dtype))
        self.rows_read += len(rows)
        self.bytes_read += len(tokens) * self._row_bytes
        batch = PackedBatch(
            hidden,
            cu_seqlens,
            max_seqlen=int(lengths.max()) if len(lengths) else 0,
            room=room,
            input_ids=torch.from_numpy(self.table.input_ids[tokens].astype(np.int64)),
            position_ids=self._positions(tokens, lengths),
            layer=self.folder.identity.layer,
            identity=self.folder.identity.digest,
            store=self._store,
            compute_dtype=self.folder.identity.compute_dtype,
            guard=check_batch,
        )
        return batch if self.device.type == "cpu" else batch.to(self.device, non_blocking=True)

    def _positions(self, tokens: np.ndarray, lengths: np.ndarray) -> Tensor | None:
        """Position ids where a text came with its own; the others count from 0."""
        if self.table.position_ids is None:
            return None
        positions = self.table.position_ids[tokens].astype(np.int64)
        if (positions < 0).all():
            return None
        counted = np.arange(len(tokens)) - np.repeat(lengths.cumsum() - lengths, lengths)
        return torch.from_numpy(np.where(positions < 0, counted, positions))

    def _to_device(self, hidden: Tensor) -> Tensor:
        return hidden if self.device.type == "cpu" else hidden.to(self.device, non_blocking=True)

    def _from_host(self, rows, lengths, tokens, room, dtype) -> Tensor:
        """[T + B room, D] in host memory (pinned where it goes to a GPU)."""
        plain = self._store in FLOATS
        gap = room if plain else 0
        size = int(lengths.sum()) + len(rows) * gap
        pin = self.device.type == "cuda"
        codes = torch.empty(size, self.folder.identity.width, dtype=self._dtype, pin_memory=pin)
        self._fill(rows, lengths, gap, codes)
        if plain or len(rows) == 0:
            return codes if codes.dtype == dtype else codes.to(dtype)
        scale = torch.from_numpy(self.table.token_scale[tokens])
        text = decode(codes, dtype, scale, self._channel)
        if room == 0:
            return text
        out = torch.empty(len(text) + len(rows) * room, text.shape[1], dtype=dtype, pin_memory=pin)
        place = np.arange(len(text)) + room * (1 + np.repeat(np.arange(len(rows)), lengths))
        return out.index_copy_(0, torch.from_numpy(place), text)

    def _fill(self, rows, lengths, gap, out: Tensor) -> None:
        """Codes of `rows` one after another, each after `gap` rows that are left as they are."""
        if len(rows) == 0:
            return
        target = memoryview(out.view(torch.uint8).numpy().reshape(-1))
        sizes = (lengths * self._row_bytes).tolist()
        skip = gap * self._row_bytes
        place = skip
        if self.plan.tier in ("device", "pinned"):
            source = self._load()
            for start, size in zip(
                (self.table.token[rows] * self._row_bytes).tolist(), sizes, strict=True
            ):
                target[place : place + size] = source[start : start + size]
                place += size + skip
            return
        self._fill_from_files(rows, sizes, skip, target)

    def _fill_from_files(self, rows, sizes: list[int], skip: int, target: memoryview) -> None:
        """Bytes of `rows`, each after `skip` bytes, read from the shards and checked."""
        table, check = self.table, self.check == "read"
        offsets, hashes = table.offset[rows].tolist(), table.hash[rows].tolist()
        places = (np.cumsum(sizes) - sizes + skip * np.arange(1, len(sizes) + 1)).tolist()
        groups: dict[int, list[int]] = {}
        for i, shard in enumerate(table.shard[rows].tolist()):
            groups.setdefault(shard, []).append(i)
        pread, digest = os.preadv, xxhash.xxh3_64_intdigest
        for shard, members in groups.items():
            file = self.files.get(shard)  # one at a time, however few a process may open
            fd = file.fileno()
            for i in members:
                size = sizes[i]
                view = target[places[i] : places[i] + size]
                got = pread(fd, [view], offsets[i])
                if got != size:
                    self._read_rest(file, view, got, offsets[i], int(rows[i]))
                if check and digest(view) != hashes[i]:
                    raise self._corrupt(int(rows[i]), "does not match its hash")
            file = None  # let go before the next is opened

    def _read_rest(self, file, view: memoryview, got: int, offset: int, row: int) -> None:
        while got < len(view):
            more = os.preadv(file.fileno(), [view[got:]], offset + got)
            if more == 0:
                raise self._corrupt(row, "is cut short")
            got += more

    def _corrupt(self, row: int, what: str) -> CorruptCacheError:
        name = self.table.names[self.table.shard[row]]
        return CorruptCacheError(
            f"Row {row} of the cache (in {self.folder.path / name}) {what}, so it was not used; "
            f"{REPAIR}"
        )

    # -- the whole cache in memory -----------------------------------------------------------------

    def _load(self) -> memoryview:
        """The hidden states of all rows in host memory, read and checked once."""
        if self._resident is None:
            width = self.folder.identity.width
            pin = self.device.type == "cuda"
            whole = torch.empty(self.table.num_tokens, width, dtype=self._dtype, pin_memory=pin)
            target = memoryview(whole.view(torch.uint8).numpy().reshape(-1))
            place = 0
            for rows, sizes in self._shards():
                self._fill_from_files(rows, sizes, 0, target[place:])
                place += sum(sizes)
            self._resident = whole
        return memoryview(self._resident.view(torch.uint8).numpy().reshape(-1))

    def _shards(self) -> Iterator[tuple[np.ndarray, list[int]]]:
        """Rows of each shard, which is held open while they are read, and their bytes; rows are
        numbered in the order of the shards.
        """
        ends = np.searchsorted(self.table.shard, np.arange(len(self.table.names) + 1))
        for first, end in pairwise(ends.tolist()):
            rows = np.arange(first, end)
            yield rows, (self.table.length[rows] * self._row_bytes).tolist()

    def _stream(self, piece: int = PIECE) -> Tensor:
        """The hidden states of all rows on the device, read and checked once, through two
        page-locked buffers of `piece` bytes (of the longest text, where that is more).
        """
        width, on_gpu = self.folder.identity.width, self.device.type == "cuda"
        whole = torch.empty(self.table.num_tokens, width, dtype=self._dtype, device=self.device)
        target, place = whole.view(torch.uint8).view(-1), 0
        size = max(piece, int(self.table.length.max(initial=0)) * self._row_bytes)
        size = min(size, len(target))
        buffers = deque(torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2))
        copied = deque([None, None])  # events: what a buffer held is on the device
        for rows, sizes in self._shards():
            ends = np.cumsum(sizes)
            first = 0
            while first < len(rows):
                before = ends[first - 1] if first else 0
                end = int(np.searchsorted(ends, before + size, side="right"))
                buffer, event = buffers.popleft(), copied.popleft()
                if event is not None:
                    event.synchronize()
                self._fill_from_files(
                    rows[first:end], sizes[first:end], 0, memoryview(buffer.numpy())
                )
                count = int(ends[end - 1] - before)
                target[place : place + count].copy_(buffer[:count], non_blocking=True)
                buffers.append(buffer)
                copied.append(
                    torch.cuda.current_stream(self.device).record_event() if on_gpu else None
                )
                place, first = place + count, end
        for event in copied:
            if event is not None:
                event.synchronize()
        return whole

    def device_store(self):
        """The whole cache on the device, as `lpt_kernels.gather.Store`."""
        from lpt_kernels.gather import Store

        if self._on_device is None:
            if self.device.type == "cpu":
                self._load()
            scale = self.table.token_scale
            ends = np.concatenate([self.table.token, [self.table.num_tokens]])
            self._on_device = Store(
                self._stream() if self._resident is None else self._resident.to(self.device),
                torch.from_numpy(ends).to(self.device),
                None if scale is None else torch.from_numpy(scale).to(self.device),
                None if self._channel is None else self._channel.to(self.device),
            )
            if self.device.type != "cpu":
                self._resident = None  # once is enough
        return self._on_device

    def _from_device(self, rows, room, dtype, total) -> Tensor:
        from lpt_kernels.gather import gather_rows

        index = torch.from_numpy(rows).to(self.device, non_blocking=True)
        return gather_rows(self.device_store(), index, room, total=total, dtype=dtype)[0]

    # -- batches ahead of their use ----------------------------------------------------------------

    def new_stream(self) -> torch.cuda.Stream | None:
        """For copies to the GPU beside its work; None on the CPU."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def read_aside(
        self, stream, rows: np.ndarray, room: int = 0, dtype: torch.dtype | None = None
    ) -> tuple[PackedBatch, torch.cuda.Event | None]:
        """`read` with its copies on a stream of its own; for `take_over` in the thread that uses
        the batch.
        """
        with torch.cuda.stream(stream):
            batch = self.read(rows, room, dtype)
            return batch, None if stream is None else stream.record_event()

    def advise(self, rows: np.ndarray) -> None:
        """Asks the disk for rows that will be read soon."""
        sizes = (self.table.length[rows] * self._row_bytes).tolist()
        places = zip(
            self.table.shard[rows].tolist(), self.table.offset[rows].tolist(), sizes, strict=True
        )
        for shard, offset, size in places:
            file = self.files.get(shard)  # held while it is used
            os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)

    def batches(
        self, order: Iterable[np.ndarray], room: int, dtype: torch.dtype | None, prefetch: int
    ) -> Iterator[PackedBatch]:
        """Batches in the given order, read on one background thread, `prefetch` ahead of use."""
        if prefetch < 1:
            for rows in order:
                yield self.read(rows, room, dtype)
            return
        ready: queue.Queue = queue.Queue(maxsize=prefetch)
        stop = threading.Event()
        stream = self.new_stream()

        def hand_over(item) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def work() -> None:
            try:
                for rows in self._looking_ahead(order):
                    if not hand_over(self.read_aside(stream, rows, room, dtype)):
                        return
                hand_over(None)
            except BaseException as error:
                hand_over(error)

        thread = threading.Thread(target=work, name="lpt-fast cache reader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield take_over(*item)
        finally:
            stop.set()
            thread.join()

    def _looking_ahead(self, order: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same order; on a cold disk, rows are asked for AHEAD_ROWS before their turn."""
        if self.plan.tier != "disk":
            yield from order
            return
        waiting: deque[np.ndarray] = deque()
        ahead = 0
        for rows in order:
            self.advise(rows)
            waiting.append(rows)
            ahead += len(rows)
            while ahead - len(waiting[0]) >= AHEAD_ROWS:
                ahead -= len(waiting[0])
                yield waiting.popleft()
        yield from waiting


def take_over(batch: PackedBatch, event: torch.cuda.Event | None) -> PackedBatch:
    """A batch of `read_aside`, ready for the stream that uses it."""
    if event is not None:
        current = torch.cuda.current_stream(batch.hidden.device)
        current.wait_event(event)
        for value in vars(batch).values():
            if isinstance(value, Tensor):  # made on the other stream, used on this
                value.record_stream(current)
    return batch


def check_mode(check: str) -> None:
    """Raises CacheError for a wrong `check` of a reader."""
    if check not in CHECKS:
        raise CacheError(f"`check` must be one of {', '.join(CHECKS)}, got {check!r}.")


def check_rows(rows, count: int) -> np.ndarray:
    """Row numbers as int64 [B].

    Raises:
        CacheError: no whole numbers, or one that the cache does not have.
    """
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu().numpy()
    array = np.asarray(rows)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and len(array)):
        raise CacheError(
            f"Rows must be a list of whole numbers, got {array.dtype} of the shape "
            f"{list(array.shape)}."
        )
    if len(array) and (array.min() < 0 or array.max() >= count):
        bad = int(array.min() if array.min() < 0 else array.max())
        raise MissingRowsError(
            f"The cache has no row {bad}, expected 0 .. {count - 1}; `ensure(model, dataset)` "
            "gives the rows of a data set."
        )
    return array.astype(np.int64)


def check_free_rows(room: int) -> None:
    """Raises CacheError unless `room` counts rows."""
    if isinstance(room, bool) or not isinstance(room, int) or room < 0:
        raise CacheError(f"`room` must be a whole number of at least 0, got {room!r}.")
