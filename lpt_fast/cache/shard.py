"""The file format of a shard: a valid `.safetensors` file whose every byte follows from a few
numbers.

In this order: the header (an 8-byte length and JSON, padded with spaces), the tables (a digest of
all that comes before the hidden states; lengths, hashes, keys and token ids of the rows; scales of
8-bit stores) and, from a multiple of 4,096 bytes on, the hidden states. Because the order is
canonical, a header is not interpreted but compared with the one that its numbers call for: what
differs by a bit is refused before anything is allocated for it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from .errors import CacheError, CorruptCacheError, reason

FORMAT = "lpt_fast.activation_cache.1"
BOUNDARY = 4096  # pages and most disks read from multiples of it
MAX_HEADER = 1 << 14
MAX_ROWS = 2**31 - 1  # cu_seqlens is int32
DIGEST_BYTES = 16
KEY_BYTES = 16

# Name of a dtype in safetensors files -> numpy's, and bytes of an element.
DTYPES = {
    "F32": (np.uint32, 4),
    "BF16": (np.uint16, 2),
    "F16": (np.uint16, 2),
    "I8": (np.uint8, 1),
    "F8_E4M3": (np.uint8, 1),
    "U8": (np.uint8, 1),
    "U16": (np.uint16, 2),
    "I32": (np.int32, 4),
    "U64": (np.uint64, 8),
}
# Store -> dtype of its hidden states in the file.
STORES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8c": "I8", "fp8": "F8_E4M3"}
QUANTISED = ("int8c", "fp8")


@dataclass(frozen=True)
class Layout:
    """Everything that the bytes of a shard's header follow from.

    Attributes:
        rows, tokens, width: N, T, D.
        store: of STORES.
        identity: sha256 of what the rows depend on (identity.py), hexadecimal.
        ids, types: dtypes of the token ids and of the token types ("" for none).
        positions: whether position ids were given.
    """

    rows: int
    tokens: int
    width: int
    store: str
    identity: str
    ids: str = "I32"
    types: str = ""
    positions: bool = False

    @cached_property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> dtype and shape, in the order of the file."""
        N, T, D = self.rows, self.tokens, self.width
        out = {
            "digest": ("U8", (DIGEST_BYTES,)),
            "cu_seqlens": ("I32", (N + 1,)),
            "row_hash": ("U64", (N,)),
            "row_key": ("U8", (N, KEY_BYTES)),
            "input_ids": (self.ids, (T,)),
        }
        if self.types:
            out["token_type_ids"] = (self.types, (T,))
        if self.positions:
            out["position_ids"] = ("I32", (T,))
        if self.store in QUANTISED:
            out["token_scale"] = ("BF16", (T,))
        if self.store == "int8c":
            out["channel_scale"] = ("F32", (D,))
        out["hidden"] = (STORES[self.store], (T, D))
        return out

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Name -> first byte and end, counted from the end of the header."""
        spans, place = {}, 0
        for name, (dtype, shape) in self.tensors.items():
            end = place + math.prod(shape) * DTYPES[dtype][1]
            spans[name] = (place, end)
            place = end
        return spans

    @cached_property
    def header(self) -> bytes:
        """The length and the JSON of a safetensors file, padded so that `hidden` begins at a
        multiple of BOUNDARY.
        """
        content = {"__metadata__": {"format": FORMAT, "identity": self.identity}}
        content["__metadata__"]["store"] = self.store
        for name, (dtype, shape) in self.tensors.items():
            content[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": list(self.spans[name]),
            }
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text) + self.spans["hidden"][0]) % BOUNDARY)
        return len(text).to_bytes(8, "little") + text

    def offset(self, name: str) -> int:
        """Where a tensor begins in the file."""
        return len(self.header) + self.spans[name][0]

    @cached_property
    def hidden_offset(self) -> int:
        return self.offset("hidden")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's hidden state in the file."""
        return self.width * DTYPES[STORES[self.store]][1]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.spans["hidden"][1]


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of a shard, checked.

    Attributes:
        layout: of the file.
        digest: hexadecimal, of all bytes before the hidden states.
        lengths: int64 [N], tokens of each row.
        row_hash: uint64 [N], xxh3_64 of the bytes of each row's hidden states.
        row_key: uint64 [N, 2], see rows.py.
        input_ids: uint16 or int32 [T].
        token_type_ids, position_ids: integers [T] or None.
        token_scale: float32 [T] or None.
        channel_scale: float32 [D] or None.
    """

    layout: Layout
    digest: str
    lengths: np.ndarray
    row_hash: np.ndarray
    row_key: np.ndarray
    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    position_ids: np.ndarray | None
    token_scale: np.ndarray | None
    channel_scale: np.ndarray | None


def open_file(path: Path) -> tuple[int, int]:
    """A descriptor for reading, and the size. Nothing but a plain file inside the folder is opened:
    no link that leads elsewhere, no pipe that would wait for ever.

    Raises:
        CorruptCacheError: it is not there, or is no plain file.
        OSError: it cannot be read.
    """
    try:
        # O_NONBLOCK: opening a pipe would wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CorruptCacheError(
            f"{path} is missing, expected a file that the cache's index names; "
            "`lpt-fast cache verify --repair` drops it and `lpt-fast precompute` makes it again."
        ) from None
    except OSError as error:
        if path.is_symlink():
            raise CorruptCacheError(
                f"{path} is a symbolic link, expected a plain file; copy the file itself."
            ) from None
        if error.errno == errno.ENXIO:  # a socket
            raise CorruptCacheError(f"{path} is no plain file, expected one; {REPAIR}") from None
        raise CacheError(f"{path} cannot be read: {reason(error)}.") from None
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise CorruptCacheError(f"{path} is no plain file, expected one; {REPAIR}")
    return fd, info.st_size


def read_exactly(fd: int, size: int, offset: int, path: Path) -> bytes:
    """`size` bytes at `offset`; CorruptCacheError where the file ends before."""
    parts = []
    while size > 0:
        part = os.pread(fd, size, offset)
        if not part:
            raise CorruptCacheError(f"{path} ends before its content does; {REPAIR}")
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Writes every byte at an offset of a file, however often the system stops short."""
    while len(data):
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def shard_name(identity: str, keys: np.ndarray) -> str:
    """Of the shard that holds the rows with these keys, in this order."""
    state = hashlib.blake2b(identity.encode(), digest_size=16)
    state.update(np.ascontiguousarray(keys).tobytes())
    return f"{state.hexdigest()}.safetensors"


REPAIR = (
    "`lpt-fast cache verify --repair` drops the bad shard and `lpt-fast precompute` makes it again."
)


def read_layout(fd: int, size: int, path: Path) -> Layout:
    """The layout that the header of an open shard states, if the header and the size of the file
    are exactly those that it calls for.

    Raises:
        CorruptCacheError: they are not.
    """
    bad = f"{path} is no sound shard of an activation cache"
    if size < 8:
        raise CorruptCacheError(f"{bad}: it has {size} bytes; {REPAIR}")
    length = int.from_bytes(read_exactly(fd, 8, 0, path), "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise CorruptCacheError(f"{bad}: its header claims {length} bytes; {REPAIR}")
    header = read_exactly(fd, length, 8, path)
    try:
        content = json.loads(header)
        meta, hidden = content["__metadata__"], content["hidden"]
        tokens, width = hidden["shape"]
        (ends,) = content["cu_seqlens"]["shape"]
        layout = Layout(
            rows=ends - 1,
            tokens=tokens,
            width=width,
            store=meta["store"],
            identity=meta["identity"],
            ids=content["input_ids"]["dtype"],
            types=content.get("token_type_ids", {"dtype": ""})["dtype"],
            positions="position_ids" in content,
        )
        numbers = (layout.rows, layout.tokens, layout.width)
        sound = (
            all(type(n) is int and 0 < n <= MAX_ROWS for n in numbers)
            and layout.rows <= layout.tokens
            and layout.store in STORES
            and layout.ids in ("U16", "I32")
            and layout.types in ("", "U8", "I32")
            and isinstance(layout.identity, str)
            and layout.header == length.to_bytes(8, "little") + header
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise CorruptCacheError(f"{bad}: its header is damaged; {REPAIR}")
    if size != layout.size:
        raise CorruptCacheError(
            f"{path} has {size} bytes, expected {layout.size} by its header; {REPAIR}"
        )
    return layout


def digest_of(head: bytes | memoryview, layout: Layout) -> bytes:
    """xxh3_128 of all bytes before the hidden states but the digest's own."""
    start = len(layout.header)
    state = xxhash.xxh3_128(head[:start])
    state.update(head[start + DIGEST_BYTES :])
    return state.digest()


def read_tables(fd: int, size: int, path: Path) -> Tables:
    """The tables of an open shard, checked against their digest and each other.

    Raises:
        CorruptCacheError: a bit of them is wrong.
    """
    layout = read_layout(fd, size, path)
    head = read_exactly(fd, layout.hidden_offset, 0, path)
    start = len(layout.header)
    digest = head[start : start + DIGEST_BYTES]
    if digest_of(memoryview(head), layout) != digest:
        raise CorruptCacheError(f"The tables of {path} do not match their digest; {REPAIR}")

    def table(name: str) -> np.ndarray | None:
        if name not in layout.tensors:
            return None
        begin, end = layout.spans[name]
        dtype = DTYPES[layout.tensors[name][0]][0]
        # A copy: the places are not aligned, and the whole head need not be kept.
        return np.frombuffer(head[start + begin : start + end], dtype=dtype).copy()

    cu_seqlens = table("cu_seqlens").astype(np.int64)
    lengths = np.diff(cu_seqlens)
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != layout.tokens or (lengths < 1).any():
        raise CorruptCacheError(f"The lengths in {path} contradict each other; {REPAIR}")
    scale = table("token_scale")
    channel = table("channel_scale")
    return Tables(
        layout=layout,
        digest=digest.hex(),
        lengths=lengths,
        row_hash=table("row_hash"),
        row_key=table("row_key").view(np.uint64).reshape(-1, 2),
        input_ids=table("input_ids"),
        token_type_ids=table("token_type_ids"),
        position_ids=table("position_ids"),
        # bf16 is the upper half of a float32.
        token_scale=None if scale is None else (scale.astype(np.uint32) << 16).view(np.float32),
        channel_scale=None if channel is None else channel.view(np.float32),
    )


def build_head(layout: Layout, tables: dict[str, np.ndarray]) -> bytes:
    """All bytes before the hidden states, from the tables by name (without the digest)."""
    head = bytearray(layout.hidden_offset)
    start = len(layout.header)
    head[:start] = layout.header
    for name, values in tables.items():
        begin, end = layout.spans[name]
        raw = np.ascontiguousarray(values, DTYPES[layout.tensors[name][0]][0]).tobytes()
        assert len(raw) == end - begin, name
        head[start + begin : start + end] = raw
    head[start : start + DIGEST_BYTES] = digest_of(memoryview(head), layout)
    return bytes(head)
