"""Random changes of the files of a cache, for bench/cache/fuzz.py: some know nothing of the format,
others make the digests right again, so that what stands behind them is reached.
"""

from __future__ import annotations

import json
import random
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from lpt_fast.cache.documents import _digest, canonical
from lpt_fast.cache.folder import INDEX, MANIFEST
from lpt_fast.cache.identity import Identity
from lpt_fast.cache.rows import as_keys
from lpt_fast.cache.shard import DIGEST_BYTES, Layout, digest_of

WIDTH = 8  # of the hidden states

# What JSON may hold in place of anything else.
HOSTILE = [
    *(-1, 0, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**53 + 1, 2**62, 2**63, 2**64, 10**30, -(2**63)),
    *(1.0, 1.5, 1e308, True, False, None, "", "I8", "F32", "../../x", "/etc/passwd", "a\0b"),
    *("\ud800", "x" * 5000, "0" * 32 + ".safetensors", [], {}, [[]], [1, 2], {"a": 1}),
]


@dataclass(frozen=True)
class Sample:
    """A valid cache.

    Attributes:
        root: its folder of caches.
        path: its folder.
        files: name -> bytes.
        layouts: name of a shard -> layout.
        rows: key -> bytes of the hidden states as they are read.
    """

    root: Path
    path: Path
    files: dict[str, bytes]
    layouts: dict[str, Layout]
    rows: dict[bytes, bytes]

    @cached_property
    def shards(self) -> list[str]:
        return list(self.layouts)

    @cached_property
    def keys(self) -> np.ndarray:
        return as_keys(list(self.rows))


def of_bytes(dice: random.Random, data: bytes) -> bytes:
    """A change that knows nothing of the format."""
    out = bytearray(data)
    kind, size = dice.randrange(7), len(out)
    at = dice.randrange(size)
    if kind == 0:
        out[at] ^= 1 << dice.randrange(8)
    elif kind == 1:
        for _ in range(dice.randint(1, 8)):
            out[dice.randrange(size)] = dice.randrange(256)
    elif kind == 2:
        del out[at:]
    elif kind == 3:
        out[at:at] = dice.randbytes(dice.randint(1, 40))
    elif kind == 4:
        del out[at : at + dice.randint(1, 40)]
    elif kind == 5:
        start = dice.randrange(size)
        piece = out[start : start + dice.randint(1, 64)]
        out[at : at + len(piece)] = piece
    else:
        out[at : at + 8] = dice.choice(
            (b"\xff" * 8, b"\0" * 8, (2**63).to_bytes(8, "little"), b"[[[[[[[[", b"9" * 8)
        )
    return bytes(out)


def of_json(dice: random.Random, content):
    """A change of one value somewhere in a JSON object."""
    content = deepcopy(content)
    for _ in range(dice.choice((1, 1, 1, 2))):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = dice.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and dice.random() < 0.8:
                node = node[key]
                continue
            kind = dice.randrange(6)
            if kind == 0:
                del node[key]
            elif kind == 1 and isinstance(node, dict):
                node[str(dice.choice(HOSTILE))] = deepcopy(node[key])
            elif kind == 2:
                node[key] = deepcopy(node[dice.choice(keys)])
            elif kind == 3 and type(node[key]) is int:
                node[key] += dice.choice((-1, 1, 256, 2**32))
            elif kind == 4 and isinstance(node, list):
                node.insert(key, deepcopy(node[key]))
            else:
                node[key] = deepcopy(dice.choice(HOSTILE))
            break
    return content


def of_document(dice: random.Random, name: str, data: bytes) -> bytes:
    """A change of manifest or index whose digest is right."""
    content = of_json(dice, json.loads(data))
    if dice.random() < 0.05:  # nested as deep as it goes
        deep = dice.choice((200, 900, 5000, 100_000))
        text = json.dumps(content).replace("null", "[" * deep + "]" * deep, 1)
        return text.encode()
    if not isinstance(content, dict) or dice.random() < 0.1:
        return json.dumps(content).encode()
    content.pop("digest", None)
    if name == MANIFEST and dice.random() < 0.5 and isinstance(content.get("identity"), dict):
        content["identity_sha256"] = Identity(content["identity"]).digest
    return canonical({**content, "digest": _digest(content)})


def sealed_by(files: dict[str, bytes], name: str, data: bytes, layout: Layout) -> bytes:
    """The index that names a changed shard as it is."""
    content = json.loads(files[INDEX])
    del content["digest"]
    start = len(layout.header)
    for entry in content["shards"]:
        if entry["name"] == name:
            entry.update(bytes=len(data), rows=layout.rows, tokens=layout.tokens)
            entry["digest"] = data[start : start + DIGEST_BYTES].hex()
    return canonical({**content, "digest": _digest(content)})


def of_header(dice: random.Random, data: bytes, layout: Layout) -> bytes:
    """Another JSON in the header of a shard, of the same length where it fits."""
    text = json.dumps(of_json(dice, json.loads(layout.header[8:])), separators=(",", ":")).encode()
    room = len(layout.header) - 8
    text = text.ljust(room) if dice.random() < 0.9 else text
    return len(text).to_bytes(8, "little") + text + data[len(layout.header) :]


def relaid(dice: random.Random, data: bytes, layout: Layout) -> tuple[bytes, Layout]:
    """A canonical header of other numbers before the same bytes."""
    number = lambda n: max(1, n + dice.choice((-1, 1, 0, 0, 2, -n + 1)))  # noqa: E731
    layout = replace(
        layout,
        rows=number(layout.rows),
        tokens=number(layout.tokens),
        width=dice.choice((layout.width, layout.width, WIDTH * 2, WIDTH // 2, 1)),
        store=dice.choice((layout.store, layout.store, "bf16", "fp32", "int8c", "fp8", "fp16")),
        ids=dice.choice(("U16", "I32")),
        types=dice.choice(("", "U8", "I32")),
        positions=dice.random() < 0.5,
    )
    body = data[len(data) - dice.choice((len(data) - 4096, 64)) :]
    out = bytearray((layout.header + body).ljust(layout.size, b"\1")[: layout.size])
    return redigested(out, layout), layout


def redigested(data: bytearray, layout: Layout) -> bytes:
    start = len(layout.header)
    head = memoryview(data)[: layout.hidden_offset]
    digest = digest_of(head, layout)
    del head
    data[start : start + DIGEST_BYTES] = digest
    return bytes(data)


def of_tables(dice: random.Random, data: bytes, layout: Layout) -> bytes:
    """Other values in the tables, under a digest that is right."""
    out = bytearray(data)
    for _ in range(dice.randint(1, 3)):
        name = dice.choice([n for n in layout.tensors if n not in ("digest", "hidden")])
        begin, end = (len(layout.header) + place for place in layout.spans[name])
        at = dice.randrange(begin, end)
        if dice.random() < 0.5:
            out[at] ^= 1 << dice.randrange(8)
        else:
            piece = dice.choice((b"\xff", b"\0", b"\x80\x7f")) * 8
            out[at:end] = piece[: end - at].ljust(end - at, b"\x7f")
    return redigested(out, layout)


@dataclass
class Mutation:
    """Files that differ from the sample's.

    Attributes:
        what: in words.
        files: name -> new bytes, None for a file that is gone.
        forged: whether digests agree with the change, so that a verification need not see it.
        scaled: whether it may change what rows mean without being seen (scales of 8-bit stores
            under digests that agree).
    """

    what: str
    files: dict[str, bytes | None]
    forged: bool = False
    scaled: bool = False


def mutate(dice: random.Random, sample: Sample) -> Mutation:
    """One or two random changes."""
    name = dice.choice((MANIFEST, INDEX, *sample.shards * 2))
    data, kind = sample.files[name], dice.random()
    if kind < 0.4:
        out = Mutation("bytes", {name: of_bytes(dice, data)})
    elif kind < 0.45:
        other = dice.choice(list(sample.files))
        out = Mutation("exchanged", {name: sample.files[other], other: data})
    elif kind < 0.47:
        # (No index is what a build that has not ended has.)
        out = Mutation("gone", {name: None}, forged=name == INDEX)
    elif name in (MANIFEST, INDEX):
        out = Mutation("document", {name: of_document(dice, name, data)}, forged=True)
    else:
        layout, scaled = sample.layouts[name], False
        if kind < 0.6:
            what, changed = "header", of_header(dice, data, layout)
        elif kind < 0.8:
            what, (changed, layout) = "layout", relaid(dice, data, layout)
        else:
            what, changed = "tables", of_tables(dice, data, layout)
            scaled = layout.store == "int8c"
        files, sealed = {name: changed}, dice.random()
        if sealed < 0.6:
            files[INDEX] = sealed_by(sample.files, name, changed, layout)
        elif sealed < 0.7:
            files[INDEX] = None  # then what is there serves
        else:
            scaled = False
        out = Mutation(what, files, forged=True, scaled=scaled)
    if dice.random() < 0.1:
        more = dice.choice(sample.shards)
        out.what += " and bytes"
        out.files[more] = of_bytes(dice, out.files.get(more) or sample.files[more])
    return out
