"""Where a cache lies: behind a link, in another folder than the process, on few open files."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import shutil

import numpy as np
import pytest
import torch

from lpt_fast import LPTTrainer
from lpt_fast.cache import ActivationCache, CacheError
from lpt_fast.cache.shard_files import OPEN_FILES, files_to_hold
from tests.cache.cached_texts import counted, filled, ragged
from tests.cli.cases import invoke
from tests.tiny import tiny
from tests.train.cases import arguments, collate, model_of, rows

DATA = ragged(20)

# -- links -----------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path):
    """A cache whose folder was moved to another disk, with a link in its place; its rows."""
    cache, places = filled(tmp_path / "cache", tiny("bert"), DATA)
    expected, folder = cache.read(places).hidden, tmp_path / "cache" / cache.identity.folder
    cache.close()
    (tmp_path / "far").mkdir()
    shutil.move(folder, tmp_path / "far" / folder.name)
    folder.symlink_to(tmp_path / "far" / folder.name)
    return tmp_path, places, expected


def test_a_cache_behind_a_link(linked):
    """With a model and without, in this process and as another would open it: the same rows."""
    folder, places, expected = linked
    root = folder / "cache"
    (folder / "root").symlink_to(root)  # the folder above it may be a link as well
    (folder / "one").symlink_to(next((folder / "far").iterdir()))  # or that of one cache
    (root / "dangling").symlink_to(folder / "nowhere")
    (root / "other").symlink_to(folder / "far")  # no cache
    for path in (root, folder / "root", folder / "one"):
        for cache in (
            ActivationCache.open(path),
            ActivationCache.open(path, tiny("bert"), insertion_layer=2),
            ActivationCache.open(path, insertion_layer=2, store="fp32"),
        ):
            for same in (cache, pickle.loads(pickle.dumps(cache)), cache.reopen()):
                assert torch.equal(same.read(places).hidden, expected)
    model = tiny("bert")
    with counted(model) as seen:
        filled(root, model, ragged(22))
    assert sum(seen) == 2 + 4  # two are new; the canary looks at four


@pytest.mark.slow
def test_the_commands_see_it(linked):
    folder, _, _ = linked
    shown = invoke("cache", "info", folder / "cache", "--json")
    assert json.loads(shown.stdout)["rows"] == 20
    for call in (
        ("verify", folder / "cache", "--full"),
        ("gc", folder / "cache"),
        ("export", folder / "cache", folder / "copy"),
    ):
        done = invoke("cache", *call)
        assert done.exit_code == 0, done.output
    (copy,) = (folder / "copy").iterdir()
    assert copy.is_dir() and not copy.is_symlink()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_sees_it(tmp_path, workers):
    settings = {"max_steps": 2, "dataloader_num_workers": workers}
    first = ActivationCache.open(tmp_path / "cache", model_of(), store="fp32")
    first.ensure(model_of(), rows())
    folder = tmp_path / "cache" / first.identity.folder
    shutil.move(folder, tmp_path / "far")
    folder.symlink_to(tmp_path / "far")
    args = arguments(tmp_path / "out", **settings)
    trainer = LPTTrainer(model_of(), args, collate, rows(), activation_cache=tmp_path / "cache")
    trainer.train()
    assert trainer.state.global_step == 2


# -- a relative path -------------------------------------------------------------------------------


def test_the_process_goes_elsewhere(tmp_path, monkeypatch):
    """A relative path means the folder that it meant when it was given."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    cache = ActivationCache.open("cache", tiny("bert"), insertion_layer=2, store="fp32")
    trainer = LPTTrainer(
        model_of(), arguments(tmp_path / "out", max_steps=2), collate, rows(), activation_cache="c"
    )
    monkeypatch.chdir(tmp_path / "b")
    places = cache.ensure(tiny("bert"), DATA)
    expected = cache.read(places).hidden
    monkeypatch.chdir(tmp_path)
    for same in (cache, pickle.loads(pickle.dumps(cache))):
        (batch,) = same.batches([places])
        assert torch.equal(batch.hidden, expected)
    assert cache.verify(full=True).sound
    trainer.train()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["c", "cache"]
    assert not list((tmp_path / "b").iterdir())


# -- open files ------------------------------------------------------------------------------------


@pytest.fixture
def few_files():
    """Sets how many more files this process may open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(more: int) -> None:
        used = [int(name) for name in os.listdir("/proc/self/fd")]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(used) + 1 + more, limit[1]))

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.parametrize("tier", ["page", "disk"])
def test_more_shards_than_files(tmp_path, few_files, tier):
    data = ragged(93)
    cache, places = filled(tmp_path, tiny("bert"), data, shard_bytes=9 * 128)
    assert cache.stats()["shards"] >= 60
    expected = cache.read(places).hidden
    cache.close()
    few_files(12)
    cache = ActivationCache.open(tmp_path, tier=tier)
    assert torch.equal(cache.read(places).hidden, expected)
    parts = np.array_split(np.asarray(places), 5)
    got = torch.cat([batch.hidden for batch in cache.batches(parts)])
    assert torch.equal(got, expected)
    cache.close()
    held = []
    try:
        cache = ActivationCache.open(tmp_path, tier=tier)
        cache.stats()
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        message = r"cannot be read: too many open files; allow more \(`ulimit -n 4096`\)"
        with pytest.raises(CacheError, match=message):
            cache.read(places)
        os.close(held.pop())
        assert torch.equal(cache.read(places).hidden, expected)  # one is enough
    finally:
        for fd in held:
            os.close(fd)


def test_how_many_stay_open(monkeypatch):
    for soft, held in ((60, 15), (3, 1), (1024, 256), (10**6, OPEN_FILES), (-1, OPEN_FILES)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, soft=soft: (soft, -1))
        assert files_to_hold() == held
