"""Files that somebody made to do harm: refused before anything is taken for what they claim, and
nothing outside of the cache is read or written. Digests are right wherever they can be, so that
what is tested is what stands behind them.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest

from lpt_fast.cache import ActivationCache, CacheError, CorruptCacheError
from lpt_fast.cache.documents import MAX_BYTES, _digest, canonical
from lpt_fast.cache.folder import INDEX, LOCK, MANIFEST, Folder
from lpt_fast.cache.identity import Identity
from lpt_fast.cache.verify import repair, verify
from tests.cache.cases import K, fill, folder_of, model, rows_of, served, texts

DATA = texts(30)
ROOM = 1 << 20  # bytes that a refusal may take, beside a few times the file


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    out = {}
    for store in ("bf16", "int8c"):
        root = tmp_path_factory.mktemp(store)
        out[store] = root, rows_of(fill(root, DATA, store=store))
    return out


@pytest.fixture
def sound(originals, tmp_path):
    """A copy to tamper with: root, folder, rows by key."""
    root = shutil.copytree(originals["bf16"][0], tmp_path / "in" / "cache")
    return root, folder_of(root), originals["bf16"][1]


def opened_with(root, size: int) -> ActivationCache:
    """Opens what is there, or raises; takes no more memory than its files."""
    tracemalloc.start()
    try:
        opened = ActivationCache.open(root)
        opened.stats()
        return opened
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 30 * size + ROOM, f"{peak:,} bytes for {size:,}"


def total(folder) -> int:
    return sum(min(p.lstat().st_size, 1 << 20) for p in folder.iterdir())


def write(path, content) -> None:
    """A document with a digest that is right."""
    content = {key: value for key, value in content.items() if key != "digest"}
    path.write_bytes(canonical({**content, "digest": _digest(content)}))


# -- documents -------------------------------------------------------------------------------------


def spelled(content: dict, **more) -> bytes:
    return json.dumps(content, **{"sort_keys": True, "separators": (",", ":"), **more}).encode()


def nested(depth: int) -> bytes:
    return b'{"digest":' + b"[" * depth + b"]" * depth + b"}"


SPELLINGS = {
    "no JSON": lambda c: b"\x80\x03}q\x00.",
    "a list": lambda c: b"[]",
    "a number": lambda c: b"7",
    "nothing": lambda c: b"",
    "zeros": lambda c: bytes(500),
    "spaces": lambda c: spelled(c, indent=1),
    "other order": lambda c: spelled(dict(reversed(c.items())), sort_keys=False),
    "a line end": lambda c: spelled(c) + b"\n",
    "UTF-16": lambda c: spelled(c).decode().encode("utf-16"),
    "a byte order mark": lambda c: b"\xef\xbb\xbf" + spelled(c),
    "other escapes": lambda c: spelled(c).replace(b"i", b"\\u0069", 1),
    "a key twice": lambda c: b'{"digest":"0",' + spelled(c)[1:],
    "NaN": lambda c: spelled({**c, "x": float("nan")}),
    "infinity": lambda c: spelled({**c, "x": 1.0}).replace(b'"x":1.0', b'"x":1e999'),
    "a long number": lambda c: spelled({**c, "x": 1}).replace(b'"x":1', b'"x":' + b"9" * 9999),
    "nested 900": lambda c: nested(900),
    "nested 100000": lambda c: nested(100_000),
    "digest of a list": lambda c: spelled({**c, "digest": []}),
    "no digest": lambda c: spelled({k: v for k, v in c.items() if k != "digest"}),
    "wrong digest": lambda c: spelled({**c, "digest": "0" * 32}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_documents_in_another_spelling(sound, spelling):
    root, folder, rows = sound
    for name in (INDEX, MANIFEST):
        before = (folder / name).read_bytes()
        data = SPELLINGS[spelling](json.loads(before))
        (folder / name).write_bytes(data)
        if name == INDEX:  # the shards know their rows themselves
            opened = opened_with(root, total(folder))
            assert f"{INDEX} is damaged" in opened.stats()["problems"][0]
            assert served(opened, rows) == {"equal": len(rows)}
        else:
            with pytest.raises(CorruptCacheError, match=f"{MANIFEST} is damaged.*take the folder"):
                opened_with(root, total(folder))
        assert not verify(Folder.read(folder) if name == INDEX else folder_like(root)).sound
        (folder / name).write_bytes(before)


def folder_like(root) -> Folder:
    """A folder without looking at its manifest."""
    return Folder(folder_of(root), Identity({"width": 32, "store": "bf16"}))


def test_a_document_without_end_is_not_read(sound):
    root, folder, rows = sound
    for name in (INDEX, MANIFEST):
        with open(folder / name, "wb") as f:
            f.truncate(MAX_BYTES + 1)  # takes no room on the disk
        try:
            opened = opened_with(root, 0)
            assert "expected at most" in opened.stats()["problems"][0]
            assert served(opened, rows) == {"equal": len(rows)}
        except CorruptCacheError as error:
            assert name == MANIFEST and "expected at most" in str(error)


# -- the index -------------------------------------------------------------------------------------

NAMES = ["../{}", "{}/../{}", "/etc/passwd", "", ".", "..", "{}\0", "\0", "{}\n", "a\ud800", LOCK]
NUMBERS = [0, -1, 2**62, 2**63, 10**30, 1.0, True, None, "7", [], {}]
ENTRIES = {
    **{f"name {n!r}": {"name": n} for n in (*NAMES, 7, None, [], "x" * 10**5, MANIFEST)},
    **{f"{f} {n!r}": {f: n} for f in ("bytes", "rows", "tokens") for n in NUMBERS},
    **{f"digest {n!r}": {"digest": n} for n in (7, None, [])},
    "another field": {"more": 1},
}


def assert_index_refused(root, folder, rows) -> None:
    opened = opened_with(root, total(folder))
    (problem,) = opened.stats()["problems"]
    assert INDEX in problem and "take it away" in problem
    assert served(opened, rows) == {"equal": len(rows)}


@pytest.mark.parametrize("change", ENTRIES)
def test_an_index_of_strange_lines(sound, change):
    root, folder, rows = sound
    content = json.loads((folder / INDEX).read_bytes())
    entry = content["shards"][1]
    shutil.copy(folder / entry["name"], folder.parent)  # what a path upwards would find
    for field, value in ENTRIES[change].items():
        entry[field] = value.format(*[entry["name"]] * 2) if isinstance(value, str) else value
    write(folder / INDEX, content)
    assert_index_refused(root, folder, rows)


@pytest.mark.slow
def test_an_index_of_another_form(sound):
    root, folder, rows = sound
    content = json.loads((folder / INDEX).read_bytes())
    lines = content["shards"]
    for shards in (None, {}, "x", 7, [None], [[]], [lines[0], lines[0]], [*lines, {}], [7] * 10**5):
        write(folder / INDEX, {**content, "shards": shards})
        assert_index_refused(root, folder, rows)
    write(folder / INDEX, {**content, "identity_sha256": "0" * 64})
    assert "belongs to another cache" in opened_with(root, total(folder)).stats()["problems"][0]


@pytest.mark.parametrize("field", ["bytes", "rows", "tokens", "digest"])
def test_an_index_that_lies_about_a_shard(sound, field):
    root, folder, rows = sound
    content = json.loads((folder / INDEX).read_bytes())
    entry = content["shards"][0]
    entry[field] = "0" * 32 if field == "digest" else entry[field] + 1
    write(folder / INDEX, content)
    opened = opened_with(root, total(folder))
    (problem,) = opened.stats()["problems"]
    assert entry["name"] in problem
    assert served(opened, rows)["absent"] > 0


# -- the manifest ----------------------------------------------------------------------------------


def scale(values) -> str:
    return base64.b64encode(np.asarray(values, np.float32).tobytes()).decode()


LACKING = object()
IDENTITIES = [
    *(("store", v) for v in (LACKING, None, 7, [], {}, "pickle", "BF16")),
    *(("width", v) for v in (LACKING, None, 0, -32, 1.0, True, "32", [], 2**31, 2**62, 10**30)),
    *(("layer", v) for v in (LACKING, None, 1.0, True, "2", [])),
    *(("compute_dtype", v) for v in (LACKING, None, 7, [])),
]
MANIFESTS = {
    **{
        f"identity.{name} {'lacking' if value is LACKING else repr(value)}": (name, value)
        for name, value in IDENTITIES
    },
    **{f"identity {v!r}": lambda c, v=v: c.update(identity=v) for v in (None, 7, [], "x", {})},
    **{f"provenance {v!r}": lambda c, v=v: c.update(provenance=v) for v in (None, 7, [], "x")},
    **{f"sha {v!r}": lambda c, v=v: c.update(identity_sha256=v) for v in (None, 7, "0" * 64)},
    **{
        f"scale {name}": lambda c, v=v: c.update(channel_scale=v)
        for name, v in {
            "not wanted": scale(np.ones(32)),
            "short": scale(np.ones(31)),
            "long": scale(np.ones(33)),
            "NaN": scale([*[1] * 31, np.nan]),
            "infinite": scale([*[1] * 31, np.inf]),
            "zero": scale([*[1] * 31, 0]),
            "negative": scale([*[1] * 31, -1]),
            "odd bytes": base64.b64encode(bytes(127)).decode(),
            "empty": "",
            "no base64": "%%%%",
            "not ASCII": "é",
            "a number": 7,
            "a list": [1.5] * 32,
            "huge": scale(np.ones(10**5)),
        }.items()
    },
    **{
        f"no {name}": lambda c, n=name: c.pop(n)
        for name in ("identity", "identity_sha256", "channel_scale", "provenance")
    },
}


@pytest.mark.parametrize("change", MANIFESTS)
@pytest.mark.parametrize("store", ["bf16", "int8c"])
def test_a_manifest_that_contradicts_itself(originals, tmp_path, store, change):
    root = shutil.copytree(originals[store][0], tmp_path / "cache")
    folder, act = folder_of(root), MANIFESTS[change]
    content = json.loads((folder / MANIFEST).read_bytes())
    if callable(act):
        act(content)
        if change == "scale not wanted" and store == "int8c":
            content["channel_scale"] = None
    else:
        name, value = act
        content["identity"].pop(name)
        if value is not LACKING:
            content["identity"][name] = value
        content["identity_sha256"] = Identity(content["identity"]).digest
    write(folder / MANIFEST, content)
    for act in (
        lambda: opened_with(root, total(folder)),
        lambda: fill(root, DATA, store=store),
        lambda: repair(folder_like(root)),
    ):
        with pytest.raises(CorruptCacheError, match=f"{MANIFEST} contradicts itself.*take the"):
            act()


def test_a_manifest_of_another_identity(sound):
    """Consistent in itself: its rows would be those of another model."""
    root, folder, rows = sound
    for changes in ({"layer": 3}, {"store": "fp16"}, {"width": 16}, {"weights": "0" * 32}):
        content = json.loads((folder / MANIFEST).read_bytes())
        identity = {**content["identity"], **changes}
        sha = Identity(identity).digest
        write(folder / MANIFEST, {**content, "identity": identity, "identity_sha256": sha})
        opened = opened_with(root, total(folder))
        assert len(opened) == 0 and len(opened.stats()["problems"]) > 3
        assert served(opened, rows) == {"absent": len(rows)}
        with pytest.raises(CacheError, match="holds another cache; take it away"):
            fill(root, DATA)
        write(folder / MANIFEST, content)


# -- links -----------------------------------------------------------------------------------------


def test_links_that_lead_outside(sound, tmp_path):
    root, folder, rows = sound
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    (folder / LOCK).unlink()
    (folder / LOCK).symlink_to(outside)
    for act in (lambda: fill(root, texts(9, seed=3)), lambda: repair(Folder.read(folder))):
        with pytest.raises(CacheError, match=r"cannot be written: Too many levels .*\.lock"):
            act()
    (folder / LOCK).unlink()
    (folder / LOCK).symlink_to(tmp_path / "new")  # would be made
    with pytest.raises(CacheError, match="cannot be written"):
        fill(root, texts(9, seed=3))
    (folder / LOCK).unlink()

    # Unfinished files that a builder of this number would write to.
    for name in (INDEX, MANIFEST):
        (folder / f"{name}.{os.getpid()}.part").symlink_to(outside)
    repair(Folder.read(folder))
    Folder.read(folder).write_manifest()

    for name in (INDEX, MANIFEST):
        kept = (folder / name).read_bytes()
        outside.write_bytes(kept)
        (folder / name).unlink()
        (folder / name).symlink_to(outside)
        if name == INDEX:
            opened = opened_with(root, total(folder))
            assert "symbolic link" in opened.stats()["problems"][0]
            assert served(opened, rows) == {"equal": len(rows)}
            fill(root, texts(9, seed=3))
            assert not (folder / name).is_symlink()
        else:
            with pytest.raises(CorruptCacheError, match="symbolic link"):
                opened_with(root, total(folder))
        assert outside.read_bytes() == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "outside"]


def test_the_model_side_of_it(sound):
    """With a model the same refusals come first, before any row is used."""
    root, folder, _ = sound
    content = json.loads((folder / MANIFEST).read_bytes())
    write(folder / MANIFEST, {**content, "channel_scale": scale(np.ones(32))})
    with pytest.raises(CorruptCacheError, match="contradicts itself"):
        ActivationCache.open(root, model(), insertion_layer=K)
