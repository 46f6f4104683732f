"""Shards that somebody made to do harm: a header is refused before anything is taken for what it
claims, under digests and an index that agree with it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from bench.cache.mutations import redigested, sealed_by
from lpt_fast.cache import ActivationCache, CorruptCacheError
from lpt_fast.cache.documents import write_document
from lpt_fast.cache.folder import INDEX, Folder
from lpt_fast.cache.shard import MAX_HEADER, Layout
from lpt_fast.cache.verify import repair, verify
from tests.cache.cases import files, fill, folder_of, forged, layout_of, rows_of, served, texts
from tests.cache.test_hostile import LACKING, opened_with, spelled, total


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    return root, rows_of(fill(root, texts(30)))


@pytest.fixture
def sound(original, tmp_path):
    """A copy to tamper with: root, folder, rows by key."""
    root = shutil.copytree(original[0], tmp_path / "cache")
    return root, folder_of(root), original[1]


def edit(path: tuple, value):
    """A change of one value in a header's JSON."""

    def change(content):
        node = content
        for step in path[:-1]:
            node = node[step]
        if value is LACKING:
            del node[path[-1]]
        else:
            node[path[-1]] = value(node[path[-1]]) if callable(value) else value

    return change


def move(name: str, by: int):
    return edit((name, "data_offsets"), lambda ends: [end + by for end in ends])


EXTRA = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
BIG = [2**31, 2**32, 2**62, 2**63, 2**64, 10**30]
HEADERS = {
    **{f"tokens {n!r}": edit(("hidden", "shape", 0), n) for n in (*BIG, 0, -1, 1.0, True, "7", [])},
    **{f"width {n!r}": edit(("hidden", "shape", 1), n) for n in (*BIG, 0, -1, 1.0, True, None)},
    **{f"rows {n!r}": edit(("cu_seqlens", "shape", 0), n) for n in (*BIG, 1, 0, -1, 2.0, None)},
    **{f"shape {s!r}": edit(("hidden", "shape"), s) for s in ([], [1], [1, 2, 3], None, 7, {})},
    **{
        f"dtype of {name} {t!r}": edit((name, "dtype"), t)
        for name in ("hidden", "input_ids", "row_key")
        for t in ("F64", "I64", "F32", "BOOL", "", None, 7, [], {})
    },
    **{f"{name} shifted {by}": move(name, by) for name in ("row_hash", "hidden") for by in (-1, 1)},
    "overlap": edit(("row_key", "data_offsets"), lambda ends: [ends[0] - 16, ends[1]]),
    "backwards": edit(("row_key", "data_offsets"), lambda ends: ends[::-1]),
    "negative": edit(("digest", "data_offsets"), [-16, 0]),
    "far": edit(("hidden", "data_offsets"), [2**62, 2**63]),
    "another tensor": edit(("more",), EXTRA),
    "a tensor of nothing": edit(("more",), {**EXTRA, "shape": [0], "data_offsets": [0, 0]}),
    **{
        f"no {name}": edit((name,), LACKING)
        for name in ("digest", "cu_seqlens", "row_hash", "row_key", "input_ids", "hidden")
    },
    "no metadata": edit(("__metadata__",), LACKING),
    **{f"metadata {m!r}": edit(("__metadata__",), m) for m in (None, 7, [], {}, "x")},
    **{
        f"{name} {value!r}": edit(("__metadata__", name), value)
        for name in ("format", "identity", "store")
        for value in ("", "x", None, 7, [], {}, "fp8", "lpt_fast.activation_cache.2")
    },
    "more metadata": edit(("__metadata__", "more"), "x"),
    "position ids": edit(("position_ids",), EXTRA),
    "types": edit(("token_type_ids",), {"dtype": "U8"}),
    "types of a kind": edit(("token_type_ids",), {**EXTRA, "dtype": ["U8"]}),
}


def assert_shard_refused(root, folder, path, rows, sentence="header is damaged|header claims"):
    """With an index that names the shard as it is, and with none."""
    for sealed in (True, False):
        if not sealed:
            (folder / INDEX).unlink()
        opened = opened_with(root, total(folder))
        (problem,) = opened.stats()["problems"]
        assert path.name in problem
        with pytest.raises(CorruptCacheError, match=sentence):
            raise CorruptCacheError(problem)
        outcome = served(opened, rows)
        assert outcome["absent"] > 0 == outcome["refused"]


def plant(folder, path, data: bytes, layout: Layout) -> None:
    """Puts a shard in place of another, with an index that agrees."""
    before = files(folder)
    path.write_bytes(data)
    (folder / INDEX).write_bytes(sealed_by(before, path.name, data, layout))


@pytest.mark.slow
@pytest.mark.parametrize("change", HEADERS)
def test_a_header_of_other_numbers(sound, change):
    root, folder, rows = sound
    path = min(folder.glob("*.safetensors"))
    layout, data = layout_of(path), path.read_bytes()
    content = json.loads(layout.header[8:])
    HEADERS[change](content)
    text = spelled(content, sort_keys=False)
    room = len(layout.header) - 8
    text = text.ljust(room)  # everything else stays in its place
    data = bytearray(len(text).to_bytes(8, "little") + text + data[len(layout.header) :])
    plant(folder, path, redigested(data, layout) if len(text) == room else bytes(data), layout)
    other = isinstance(content.get("__metadata__"), dict) and "identity" in change
    sentence = "header is damaged|header claims" + "|belongs to another cache" * other
    assert_shard_refused(root, folder, path, rows, sentence)


RAW = {
    **{
        f"length {n}": lambda h, n=n: n.to_bytes(8, "little") + h[8:]
        for n in (0, 1, 2, MAX_HEADER + 1, 2**31, 2**62, 2**63, 2**64 - 1)
    },
    "pickle": lambda h: h[:8] + b"\x80\x03}q\x00.".ljust(len(h) - 8),
    "list": lambda h: h[:8] + b"[]".ljust(len(h) - 8),
    "deep": lambda h: h[:8] + (b"[" * 1800 + b"]" * 1800).ljust(len(h) - 8),
    "zeros": lambda h: h[:8] + bytes(len(h) - 8),
    "a space before": lambda h: h[:8] + b" " + h[8:-1],
    "a tab at the end": lambda h: h[:-1] + b"\t",
    "other spacing": lambda h: h[:8] + h[8:].replace(b",", b", ", 3)[:-3],
    "a key twice": lambda h: h[:8] + h[8:].replace(b"{", b'{"hidden":1,', 1)[: len(h) - 8],
    "other escapes": lambda h: h[:8] + h[8:].replace(b"hidden", b"hi\\u0064den")[: len(h) - 8],
    "another order": lambda h: h[:8] + spelled(json.loads(h[8:]), sort_keys=True).ljust(len(h) - 8),
}


@pytest.mark.parametrize("change", RAW)
def test_a_header_in_another_spelling(sound, change):
    root, folder, rows = sound
    path = min(folder.glob("*.safetensors"))
    layout, data = layout_of(path), bytearray(path.read_bytes())
    data[: len(layout.header)] = RAW[change](layout.header)
    plant(folder, path, redigested(data, layout), layout)
    assert_shard_refused(root, folder, path, rows)


def test_a_header_of_canonical_but_huge_numbers(sound):
    """Right in every byte, and the file is not of the size that it calls for."""
    root, folder, rows = sound
    path = min(folder.glob("*.safetensors"))
    own, data, most = layout_of(path), path.read_bytes(), 2**31 - 1
    for changes in ({"tokens": most}, {"width": most}, {"tokens": most, "width": most}):
        for more in ({}, {"rows": most, "tokens": most}):
            layout = replace(own, **{**changes, **more})
            write_document(folder / INDEX, json.loads((folder / INDEX).read_bytes()))
            plant(folder, path, layout.header + data[len(own.header) :], own)
            assert_shard_refused(root, folder, path, rows, r"expected [\d,]+ by its header")
            Folder.read(folder).write_index([])
            path.write_bytes(data)
            repair(Folder.read(folder))


@pytest.mark.parametrize(
    "numbers",
    [
        {"rows": 0, "tokens": 0},
        {"rows": 0},
        {"rows": -1, "tokens": 9},
        {"rows": 9, "tokens": 8},
        {"width": 0},
        {"rows": 1, "tokens": True},
        {"width": True},
        {"width": 32.0},
        {"ids": "U8"},
        {"ids": "U64"},
        {"types": "U16"},
        {"identity": 7},
    ],
)
def test_a_header_that_is_canonical_and_no_shard(sound, numbers):
    """The file agrees with its header in every byte; what it says makes no sense."""
    root, folder, rows = sound
    path = min(folder.glob("*.safetensors"))
    layout = replace(layout_of(path), **numbers)
    data = bytearray(layout.header + bytes(max(0, int(layout.size) - len(layout.header))))
    data = bytes(data) if type(layout.size) is float else redigested(data, layout)
    plant(folder, path, data, layout_of(path))
    assert_shard_refused(root, folder, path, rows, "header is damaged|has [0-9]+ bytes, expected")
    (folder / INDEX).unlink(missing_ok=True)
    assert "header is damaged" in ActivationCache.open(root).stats()["problems"][0]


def test_a_shard_of_another_store_or_width(sound):
    root, folder, rows = sound
    path = min(folder.glob("*.safetensors"))
    own, data = layout_of(path), path.read_bytes()
    before = files(folder)
    for changes in ({"store": "fp16"}, {"width": 16}, {"identity": "0" * 64}):
        layout = replace(own, **changes)
        size = layout.size - len(layout.header)
        changed = redigested(bytearray(layout.header + data[len(own.header) :][:size]), layout)
        plant(folder, path, changed, layout)
        assert_shard_refused(root, folder, path, rows, "belongs to another cache")
        for name, content in before.items():
            (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "lengths",
    [
        lambda a: a + 1,
        lambda a: -a,
        lambda a: np.r_[a[:1], a[1:][::-1]],
        lambda a: np.r_[a[:-1], a[-1] + 1],
        lambda a: np.r_[a[:-1], a[-1] - 1],
        lambda a: np.r_[0, 0, a[2:]],
        lambda a: np.r_[0, 2**31 - 1, a[2:]],
        lambda a: np.r_[0, -(2**31), a[2:]],
    ],
)
def test_lengths_that_contradict_each_other(sound, lengths):
    root, folder, rows = sound
    path = min(folder.glob("*.safetensors"))
    plant(folder, path, forged(path, cu_seqlens=lengths), layout_of(path))
    assert_shard_refused(root, folder, path, rows, "lengths in .* contradict each other")


def test_lengths_that_only_the_rows_contradict(sound):
    """Sound to look at: it is the hash of each row that knows where it ends."""
    root, folder, rows = sound
    path = min(folder.glob("*.safetensors"))

    def shift(ends):  # the end of a first row of more than one token
        at = 1 + int(np.argmax(np.diff(ends) > 1))
        assert 0 < at < len(ends) - 1
        return ends - (np.arange(len(ends)) == at)

    plant(folder, path, forged(path, cu_seqlens=shift), layout_of(path))
    opened = opened_with(root, total(folder))
    assert not opened.stats()["problems"]
    assert served(opened, rows) == {"equal": len(rows) - 2, "refused": 2}
    assert verify(Folder.read(folder)).sound
    assert not verify(Folder.read(folder), full=True).sound


def test_keys_of_other_rows(sound):
    """Rows under the keys of others would be wrong numbers: the name of the shard knows them."""
    root, folder, rows = sound
    path = min(folder.glob("*.safetensors"))
    plant(folder, path, forged(path, row_key=lambda a: a[::-1]), layout_of(path))
    assert_shard_refused(root, folder, path, rows, "holds the rows of another shard")
