"""What is removed from a cache and what is not, and copies of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from lpt_fast.cache import ActivationCache, CacheError, CorruptCacheError
from lpt_fast.cache.folder import INDEX, LOCK, MANIFEST, Folder
from lpt_fast.cache.verify import export, gc
from tests.cache.cases import K, files, fill, flip, folder_of, layout_of, model, rows_of, texts

DATA = texts(60)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    return root, rows_of(fill(root, DATA))


@pytest.fixture
def sound(original, tmp_path):
    """A copy to damage: root, folder, rows by key, files."""
    root = shutil.copytree(original[0], tmp_path / "cache")
    return root, folder_of(root), original[1], files(folder_of(root))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_gc_removes_what_nobody_needs_and_nothing_else(sound):
    root, folder, rows, before = sound
    names = shards(folder)
    stale = folder / ("0" * 32 + ".safetensors")
    shutil.copy(names[0], stale)
    parts = [
        folder / f"{names[0].name}.1a2b3c4d-0.part",
        folder / f"{MANIFEST}.77.part",
        folder / f"{INDEX}.12.part",
    ]
    for part in parts:
        part.write_bytes(b"xy")
    mine = [folder / "notes.txt", folder / "my.part", folder / "0.safetensors", folder / "sub"]
    for path in mine[:-1]:
        path.write_text("mine")
    mine[-1].mkdir()
    (folder / LOCK).touch()
    expected = sorted(path.name for path in [stale, *parts])
    for dry in (True, False):
        names, size = gc(Folder.read(folder), dry_run=dry)
        assert sorted(names) == expected and size == stale.stat().st_size + 6 if dry else True
    assert all(path.exists() for path in mine)
    assert not any(path.exists() for path in [stale, *parts])
    for path in mine[:-1]:
        path.unlink()
    mine[-1].rmdir()
    assert files(folder) == before and rows_of(ActivationCache.open(root)) == rows
    assert gc(Folder.read(folder)) == ([], 0)


def test_gc_keeps_the_shards_of_a_build_that_has_not_ended(sound):
    root, folder, rows, _ = sound
    (folder / INDEX).unlink()
    assert gc(Folder.read(folder)) == ([], 0)
    assert rows_of(ActivationCache.open(root)) == rows


def test_export(sound, tmp_path):
    root, folder, rows, before = sound
    (folder / "notes.txt").touch()
    (folder / f"{INDEX}.12.part").touch()
    copy = export(Folder.read(folder), tmp_path / "far" / "away")
    shutil.rmtree(root)
    assert copy.parent == tmp_path / "far" / "away" and files(copy) == before
    opened = ActivationCache.open(copy.parent)  # no texts, no model
    assert rows_of(opened) == rows and opened.verify(full=True).sound
    again = ActivationCache.open(copy.parent, model(), insertion_layer=K)
    assert len(again.ensure(model(), DATA, insertion_layer=K)) == len(DATA)
    assert files(copy) == before


@pytest.mark.parametrize("where", ["hidden", "tables", "missing", "link", "index", "no index"])
def test_export_refuses_what_is_not_sound(sound, tmp_path, where):
    _, folder, _, _ = sound
    path = shards(folder)[0]
    read = Folder.read(folder)
    if where == "hidden":
        flip(path, layout_of(path).hidden_offset + 9, 3)
    elif where == "tables":
        flip(path, layout_of(path).hidden_offset - 1, 3)
    elif where == "index":
        flip(folder / INDEX, 30, 2)
    elif where == "no index":
        (folder / INDEX).unlink()
    elif where == "missing":
        path.unlink()
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CacheError, match="not sealed" if where == "no index" else "repair|copy"):
        export(read, out)
    assert not any(out.iterdir())


def test_export_where_something_is(sound, tmp_path):
    _, folder, _, _ = sound
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")):
        target = tmp_path / folder.name
        make(target)
        with pytest.raises(CacheError, match="is there already, expected a new folder"):
            export(Folder.read(folder), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"cache", folder.name}
        target.rmdir() if target.is_dir() else target.unlink()
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="cannot be written: Not a directory"):
        export(Folder.read(folder), tmp_path / "file")


def test_the_copy_is_looked_at_too(sound, tmp_path, monkeypatch):
    """A disk that keeps other bytes than it was given."""
    plain = shutil.copyfileobj
    for at in (4000, -20):  # tables, hidden states

        def bad(source, target, size, at=at):
            plain(source, target, size)
            target.flush()
            offset = at if at > 0 else os.path.getsize(target.name) + at
            flip(Path(target.name), offset, 0)

        monkeypatch.setattr(shutil, "copyfileobj", bad)
        with pytest.raises(CorruptCacheError, match="not match (their digest|its hash)"):
            export(Folder.read(sound[1]), tmp_path / "out")
        assert not any((tmp_path / "out").iterdir())


def test_a_copy_that_was_interrupted_is_no_cache(sound, tmp_path):
    root, folder, rows, _ = sound
    shutil.copytree(folder, root / f"{folder.name}.4711.part")
    opened = ActivationCache.open(root)
    assert rows_of(opened) == rows
    assert torch.equal(opened.read([0]).hidden, ActivationCache.open(folder).read([0]).hidden)
