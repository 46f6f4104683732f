"""Disks that are too small, fill up meanwhile, or can only be read: one clear sentence, nothing is
lost, and with room the build goes on where it was. Needs the right to mount; skipped without.
"""

from __future__ import annotations

import subprocess

import pytest

from lpt_fast.cache import ActivationCache, CacheError
from lpt_fast.cache.folder import INDEX, Folder
from lpt_fast.cache.verify import export, gc
from tests.cache.cases import (
    MANY,
    K,
    after_forwards,
    assert_orderly,
    assert_whole,
    built,
    files,
    fill,
    folder_of,
    model,
    rows_of,
    texts,
    undisturbed,
)
from tests.small_disk import mounted, stuff

# -- no room ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_too_small_a_disk_is_said_before_anything_is_computed(tmp_path):
    with mounted(tmp_path / "disk", 3 << 20) as disk:
        root = disk / "cache"
        ballast = stuff(disk, leave=100_000)
        seen = []
        sentence = r"need [\d,]+ bytes and .* has [\d,]+ free, expected room for all; make room"
        with after_forwards(0, lambda: seen.append(1)), pytest.raises(CacheError, match=sentence):
            fill(root, MANY)
        assert not seen
        assert not any(name.endswith(".json") for name in files(folder_of(root)))
        ballast.unlink()
        fill(root, MANY)
        assert_whole(root)


@pytest.mark.slow
@pytest.mark.parametrize("leave", [0, 5000, 20000])
def test_a_disk_that_fills_up_meanwhile(tmp_path, leave):
    with mounted(tmp_path / "disk", 3 << 20) as disk:
        root = disk / "cache"
        sentence = r"There is no room for [\d,]+ bytes at .* what is finished stays, so make room"
        with after_forwards(12, lambda: stuff(disk, leave)), pytest.raises(CacheError) as error:
            fill(root, MANY)
        assert error.match(sentence)
        (disk / "ballast").unlink()
        kept = {n for n in files(folder_of(root)) if n.endswith(".safetensors")}
        assert len(kept) > 5 and not Folder.read(folder_of(root)).part_names()
        if leave == 5000:  # too little for a shard, enough for the index
            assert_orderly(root)
        report, _ = built(root, MANY)
        assert report.computed < report.unique - len(kept)  # those were not computed again
        assert_whole(root)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["write_manifest", "write_index"])
def test_no_room_for_a_document(tmp_path, monkeypatch, what):
    with mounted(tmp_path / "disk", 3 << 20) as disk:
        root, plain = disk / "cache", getattr(Folder, what)

        def full(*args):
            stuff(disk)
            plain(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, what, full)
            with pytest.raises(CacheError, match="There is no room in .* make room"):
                fill(root, MANY)
        (disk / "ballast").unlink()
        assert set(files(folder_of(root))) <= undisturbed()[0].keys()
        fill(root, MANY)
        assert_whole(root)


@pytest.mark.slow
def test_export_to_a_full_disk(tmp_path):
    fill(tmp_path / "cache", MANY)
    folder = Folder.read(folder_of(tmp_path / "cache"))
    with mounted(tmp_path / "disk", 3 << 20) as disk:
        stuff(disk, leave=50_000)
        with pytest.raises(CacheError, match=r"needs [\d,]+ bytes and .* has [\d,]+ free"):
            export(folder, disk / "out")
        assert not any((disk / "out").iterdir())
        (disk / "ballast").unlink()
        with pytest.MonkeyPatch.context() as patch:
            plain = Folder.write_manifest
            patch.setattr(Folder, "write_manifest", lambda s: (plain(s), stuff(disk, 99_000))[0])
            with pytest.raises(CacheError, match="cannot be written: No space left"):
                export(folder, disk / "out")
        assert not any((disk / "out").iterdir())
        (disk / "ballast").unlink()
        export(folder, disk / "out")
        assert_whole(disk / "out")


# -- no right to write -----------------------------------------------------------------------------


def test_a_folder_that_can_only_be_read(tmp_path):
    with mounted(tmp_path / "disk", 4 << 20) as disk:
        fill(disk / "cache", MANY)
        read_only = ["mount", "-o", "remount,ro", str(disk)]
        if subprocess.run(read_only, capture_output=True).returncode:
            pytest.skip("cannot mount read-only here")
        opened = ActivationCache.open(disk / "cache", model(), insertion_layer=K)
        assert rows_of(opened) == undisturbed()[1]
        rows = opened.ensure(model(), MANY[::-1], insertion_layer=K)
        assert len(rows) == len(MANY)
        for act in (
            lambda: opened.ensure(model(), texts(9, seed=5), insertion_layer=K),
            lambda: fill(disk / "other", MANY),
            lambda: gc(Folder.read(folder_of(disk / "cache"))),
            lambda: export(Folder.read(folder_of(disk / "cache")), disk / "out"),
        ):
            with pytest.raises(CacheError, match="cannot be written: Read-only file system"):
                act()
        assert rows_of(opened) == undisturbed()[1]


@pytest.mark.slow
def test_rows_that_no_index_names_serve_where_nothing_can_be_written(tmp_path):
    with mounted(tmp_path / "disk", 4 << 20) as disk:
        fill(disk / "cache", MANY)
        (folder_of(disk / "cache") / INDEX).unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        opened = ActivationCache.open(disk / "cache", model(), insertion_layer=K)
        assert len(opened.ensure(model(), MANY, insertion_layer=K)) == len(MANY)
        assert rows_of(opened) == undisturbed()[1]
