"""Writing shards: header first, rows as they come, the final name last; on a thread of its own, so
that hashing, checks and the disk overlap with the forward.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from . import quantize
from .documents import sync_folder
from .errors import CacheError, reason
from .folder import Folder, ShardEntry
from .rows import Text
from .shard import KEY_BYTES, QUANTISED, Layout, build_head, shard_name, write_all

# What the operating system says of a disk that holds no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
QUEUED_BATCHES = 2  # that wait for the writer; with the one being written, three are in memory


def _pick(texts: Sequence[Text], name: str) -> np.ndarray | None:
    """One field of all texts joined, None where no text has it: texts of a shard are of one
    kind.
    """
    values = [getattr(text, name) for text in texts]
    return None if values[0] is None else np.concatenate(values)


def _narrow(values: np.ndarray | None, small: str) -> str:
    if values is None:
        return ""
    top = {"U8": 255, "U16": 65535}[small]
    return small if values.min() >= 0 and values.max() <= top else "I32"


class ShardWriter:
    """One shard, from its texts and, later, their hidden states.

    The file has its full size from the start, so that a disk without room for it says so before
    anything is computed.

    Args:
        folder: the cache.
        texts: of the shard, in order.
        names: what to call each of them in messages.
        run: a name of this build, part of the temporary file's name.

    Raises:
        CacheError: no room, or no right to write.
    """

    def __init__(self, folder: Folder, texts: Sequence[Text], names: Sequence[str], run: str):
        self.folder, self.names = folder, names
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        keys = np.frombuffer(b"".join(text.key for text in texts), np.uint64).reshape(-1, 2)
        ids, types = _pick(texts, "input_ids"), _pick(texts, "token_type_ids")
        positions = _pick(texts, "position_ids")
        self.layout = Layout(
            rows=len(texts),
            tokens=int(lengths.sum()),
            width=folder.identity.width,
            store=folder.identity.store,
            identity=folder.identity.digest,
            ids=_narrow(ids, "U16"),
            types=_narrow(types, "U8"),
            positions=positions is not None,
        )
        self.starts = np.concatenate([[0], lengths.cumsum()])
        self.tables = {
            "cu_seqlens": self.starts,
            "row_hash": np.zeros(len(texts), np.uint64),
            "row_key": keys.view(np.uint8).reshape(-1, KEY_BYTES),
            "input_ids": ids,
        }
        if types is not None:
            self.tables["token_type_ids"] = types
        if positions is not None:
            self.tables["position_ids"] = positions
        if self.layout.store in QUANTISED:
            self.tables["token_scale"] = np.zeros(self.layout.tokens, np.uint16)
        if self.layout.store == "int8c":
            self.tables["channel_scale"] = folder.channel_scale.view(np.uint32)
        self.rows_done = 0
        self.name = shard_name(folder.identity.digest, keys)
        self.part = folder.path / f"{self.name}.{run}.part"
        with disk_errors(self.part, self.layout.size):
            self.fd = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                os.posix_fallocate(self.fd, 0, self.layout.size)
                os.pwrite(self.fd, self.layout.header, 0)
            except OSError:
                self.abort()
                raise

    def write(self, codes: Tensor, magnitudes: Tensor, rows: int) -> None:
        """The next `rows` texts.

        Args:
            codes, magnitudes: of their tokens, as `quantize.encode` gives them, on the CPU.
            rows: how many texts that is.

        Raises:
            CacheError: a value that is not finite (its text is named), or a disk that is full.
        """
        first, end = self.rows_done, self.rows_done + rows
        begin, stop = int(self.starts[first]), int(self.starts[end])
        assert len(codes) == stop - begin

        def name_of(token: int) -> str:
            return self.names[int(np.searchsorted(self.starts, begin + token, side="right")) - 1]

        quantize.check_finite(magnitudes, self.layout.store, name_of)
        if "token_scale" in self.tables:
            bits = magnitudes.numpy().view(np.uint32) >> 16
            self.tables["token_scale"][begin:stop] = bits
        data = memoryview(codes.contiguous().view(torch.uint8).numpy().reshape(-1))
        width = self.layout.token_bytes
        places = ((self.starts[first : end + 1] - begin) * width).tolist()
        digest = xxhash.xxh3_64_intdigest
        self.tables["row_hash"][first:end] = [digest(data[a:b]) for a, b in pairwise(places)]
        with disk_errors(self.part, len(data)):
            write_all(self.fd, data, self.layout.hidden_offset + begin * width)
        self.rows_done = end

    def close(self) -> ShardEntry:
        """Writes the tables, makes the file last and gives it its final name."""
        assert self.rows_done == self.layout.rows
        with disk_errors(self.part, self.layout.size):
            head = build_head(self.layout, self.tables)
            write_all(self.fd, memoryview(head), 0)
            os.fsync(self.fd)
            os.close(self.fd)
            self.fd = -1
            os.replace(self.part, self.folder.path / self.name)
            sync_folder(self.folder.path)
        start = len(self.layout.header)
        digest = head[start : start + 16].hex()
        layout = self.layout
        return ShardEntry(self.name, layout.size, layout.rows, layout.tokens, digest)

    def abort(self) -> None:
        """Leaves nothing behind."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.part.unlink(missing_ok=True)


class disk_errors:
    """What the operating system says of a write, as one sentence."""

    def __init__(self, path: Path, size: int):
        self.path, self.size = path, size

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, OSError):
            return False
        if error.errno in FULL:
            raise CacheError(
                f"There is no room for {self.size:,} bytes at {self.path} ({reason(error)}); what "
                "is finished stays, so make room or name another folder and start again."
            ) from None
        raise CacheError(
            f"{self.path} cannot be written: {reason(error)}; give a folder that can be written."
        ) from None


@dataclass
class _Job:
    """A batch on its way to one cache: hidden states [T, D] of `rows` texts; with the first of a
    shard, all its texts and what to call them.
    """

    hidden: Tensor
    rows: int
    begin: tuple[Sequence[Text], Sequence[str]] | None


class CacheWriter:
    """Writes the rows of one build into one cache, shard after shard.

    A thread of its own encodes, checks, hashes and writes. At most QUEUED_BATCHES batches wait for
    it; a producer that is faster waits, so that memory stays bounded by three batches of hidden
    states and one shard's tables (about 1 % of its size).

    Args:
        folder: the cache.
        run: a name of this build, part of the names of unfinished files.
    """

    def __init__(self, folder: Folder, run: str):
        self.folder = folder
        self.entries: list[ShardEntry] = []
        self.bytes = 0
        scale = folder.channel_scale
        self._scale = None if scale is None else torch.from_numpy(scale)
        self._run = run
        self._current: ShardWriter | None = None
        self._error: BaseException | None = None
        self._queue: queue.Queue[_Job | None] = queue.Queue(maxsize=QUEUED_BATCHES)
        self._thread = threading.Thread(target=self._work, name="lpt-fast cache writer")
        self._thread.daemon = True
        self._thread.start()

    def put(self, hidden: Tensor, rows: int, begin=None) -> None:
        """Hands over the hidden states [T, D] of the next `rows` texts, all of one shard.

        Args:
            hidden: must not change afterwards.
            rows: number of texts.
            begin: with the first batch of a shard, its texts and their names.

        Raises:
            CacheError: what went wrong with an earlier batch.
        """
        self._raise()
        self._queue.put(_Job(hidden, rows, begin))

    def close(self) -> list[ShardEntry]:
        """Waits until all is on the disk; the shards that were written."""
        self._queue.put(None)
        self._thread.join()
        self._raise()
        assert self._current is None
        return self.entries

    def abort(self) -> None:
        """Stops at once; finished shards stay, the one at work goes."""
        if self._error is None:
            self._error = CacheError("The build was stopped.")
        self._queue.put(None)
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is not None:
                continue  # drained, so that the producer never waits for ever
            try:
                self._write(job)
            except BaseException as error:
                self._error = error
        if self._error is not None and self._current is not None:
            self._current.abort()
            self._current = None

    def _write(self, job: _Job) -> None:
        if job.begin is not None:
            assert self._current is None
            self._current = ShardWriter(self.folder, *job.begin, self._run)
        shard = self._current
        scale = None if self._scale is None else self._scale.to(job.hidden.device)
        codes, magnitudes = quantize.encode(job.hidden, shard.layout.store, scale)
        shard.write(codes.cpu(), magnitudes.cpu(), job.rows)
        self.bytes += codes.numel() * codes.element_size()
        if shard.rows_done == shard.layout.rows:
            self.entries.append(shard.close())
            self._current = None
