"""Several processes fill one cache: under torchrun, and with the variables that it sets.

Run as a script, this file is what torchrun starts.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lpt_fast.cache import ActivationCache, CacheBusyError, CacheError
from lpt_fast.cache.folder import Folder
from lpt_fast.cache.lock import building
from lpt_fast.cache.ranks import Ranks, wait_until
from lpt_fast.cache.verify import verify
from lpt_fast.cache.writer import ShardWriter
from tests.cache.cases import (
    MANY,
    SHARD_BYTES,
    Child,
    K,
    Slow,
    built,
    files,
    fill,
    flip,
    folder_of,
    hear,
    model,
    rows_of,
    say,
)

DATA = MANY[:150]


# -- what a process does ---------------------------------------------------------------------------


def recorded() -> list[str]:
    """Names of the shards that this process finishes from now on."""
    names, close = [], ShardWriter.close

    def closing(self):
        entry = close(self)
        names.append(entry.name)
        return entry

    ShardWriter.close = closing
    return names


def facts(root, names: list[str], **settings) -> dict:
    """Fills a cache of all texts; what came of it, for the test to compare."""
    names.clear()
    report, opened = built(root, DATA, store="fp32", **settings)
    rows = opened.rows(DATA)
    return {
        "computed": report.computed,
        "shards": list(names),
        "rows": opened.read(rows).hidden.sum(1).tolist(),
        "count": len(opened),
        "found": len(rows),
    }


def refused(act) -> str:
    try:
        act()
    except CacheError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def under_torchrun(root: Path) -> None:
    """Fills caches without and with a process group, and meets errors on rank 0."""
    import torch.distributed as dist

    rank, names, out = int(os.environ["RANK"]), recorded(), {}
    out["half"] = facts(root / "half", names)  # (with three processes: two had begun it)
    out["plain"] = facts(root / "plain", names)
    assert not dist.is_initialized()
    out["plain again"] = facts(root / "plain", names)
    dist.init_process_group("gloo")
    total = torch.tensor([rank])
    dist.all_reduce(total)
    out["sum"] = int(total)
    out["group"] = facts(root / "group", names)
    out["group again"] = facts(root / "group", names)
    # Somebody else holds the lock; only rank 0 asks for it.
    more = [{"input_ids": [5, 6, 7]}]
    folder = folder_of(root / "plain")
    if rank == 0:
        with building(folder):
            out["busy"] = refused(lambda: built(root / "plain", more, store="fp32"))
            out["busy, nothing missing"] = facts(root / "plain", names)
    else:
        out["busy"] = refused(lambda: built(root / "plain", more, store="fp32"))
        out["busy, nothing missing"] = facts(root / "plain", names)
    out["no room"] = refused(lambda: built(root / "plain", more, store="fp32", max_bytes=9))
    out["after"] = len(built(root / "plain", more, store="fp32")[1])
    (root / f"rank{rank}.json").write_text(json.dumps(out))
    dist.barrier()
    dist.destroy_process_group()


def as_rank(rank: int, world: int, port: int, act, *args) -> None:
    """In a child: one of several processes that were started by hand."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    act(*args)


def build_and_tell(root, **settings) -> None:
    try:
        say(facts(root, recorded(), **settings))
    except CacheError as error:
        say(f"{type(error).__name__}: {error}")


def build_until_killed(root) -> None:
    Slow(0.001, (4, "before rename safetensors"))
    built(root, DATA, store="fp32")


def build_late(root) -> None:
    """Rank 1 comes when rank 0 has been there."""
    if os.environ["RANK"] == "1":
        time.sleep(1)
    build_and_tell(root)


def agree_often() -> None:
    ranks = Ranks.of_environment()
    say([ranks.agree(lambda i=i: {"i": i + 10 * ranks.rank})["i"] for i in range(10)])


def build_one_by_one(root) -> None:
    if os.environ["RANK"] == "1":
        Slow(0.05)
    build_and_tell(root, shard_bytes=1)


def build_after_word(root) -> None:
    """Opens the cache before it is told to go on."""
    opened = ActivationCache.open(root, model(), insertion_layer=K, store="fp32")
    say(len(opened))
    hear()
    rows = opened.ensure(model(), DATA, insertion_layer=K, shard_bytes=SHARD_BYTES)
    say((len(rows), len(opened)))


# -- tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Rows of one process, key -> float32, and what it reads."""
    root = tmp_path_factory.mktemp("alone")
    opened = fill(root, DATA, store="fp32")
    return rows_of(opened), opened.read(opened.rows(DATA)).hidden.sum(1)


def launch(root: Path, count: int) -> list[dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(count), __file__, str(root)]
    paths = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(count)]


def ranks(count: int, act, *args) -> list[Child]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [Child(as_rank, rank, count, port, act, *args) for rank in range(count)]


def assert_same_rows(root, alone) -> None:
    """The same keys, numbers as of one process up to the order of sums."""
    folder = Folder.read(folder_of(root))
    report = verify(folder, full=True)
    assert report.sound and not folder.part_names()
    assert {entry.name for entry in folder.read_index()} == set(folder.shard_names())
    found = rows_of(ActivationCache.open(root))
    assert found.keys() == alone[0].keys()
    for key, row in found.items():
        own, other = np.frombuffer(row, np.float32), np.frombuffer(alone[0][key], np.float32)
        assert np.abs(own - other).max() < 1e-6 * np.abs(other).max()


def assert_shared(told: list[dict], root, alone, least=4) -> None:
    """Each made shards of its own, all rows were made once, and all read the same."""
    shards = [name for one in told for name in one["shards"]]
    assert len(shards) == len(set(shards))
    assert all(len(one["shards"]) >= least for one in told)
    for one in told:
        assert one["found"] == len(DATA) and one["count"] == len(alone[0])
        torch.testing.assert_close(torch.tensor(one["rows"]), alone[1], rtol=1e-5, atol=1e-5)
    assert_same_rows(root, alone)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_torchrun(tmp_path, alone, count):
    # A build of two processes that both died in it.
    children = ranks(2, build_until_killed, tmp_path / "half")
    assert [child.end() for child in children] == [-signal.SIGKILL] * 2
    kept = Folder.read(folder_of(tmp_path / "half")).shard_names()
    assert len(kept) == 6

    told = launch(tmp_path, count)
    total = len(alone[0])
    for name in ("plain", "group"):
        assert sum(one[name]["computed"] for one in told) == total
        assert not any(one[f"{name} again"]["computed"] for one in told)
        for one in told:
            torch.testing.assert_close(
                torch.tensor(one[name]["rows"]), alone[1], rtol=1e-5, atol=1e-5
            )
    assert_shared([one["group"] for one in told], tmp_path / "group", alone)
    half = [one["half"] for one in told]
    assert 0 < sum(one["computed"] for one in half) < total
    assert not {name for one in half for name in one["shards"]} & set(kept)
    assert_shared(half, tmp_path / "half", alone)
    for rank, one in enumerate(told):
        assert one["sum"] == sum(range(count))
        kind = "CacheBusyError" if rank == 0 else "CacheError"
        assert one["busy"].startswith(f"{kind}: The cache ")
        assert "is being built by process" in one["busy"]
        assert one["busy, nothing missing"]["computed"] == 0
        assert one["busy, nothing missing"]["found"] == len(DATA)
        assert "expected at most 9" in one["no room"]
        assert one["after"] == total + 1


@pytest.mark.slow
def test_started_by_hand(tmp_path, alone):
    """Without torchrun, whose store is there before anybody comes: rank 0 may come and go first."""
    first, second = ranks(2, build_and_tell, tmp_path)
    told = [first.wait(), second.wait()]
    assert_shared(told, tmp_path, alone)
    children = ranks(2, build_late, tmp_path)
    assert [child.wait()["computed"] for child in children] == [0, 0]
    assert [child.end() for child in children] == [0, 0]


@pytest.mark.slow
def test_agreeing_again_and_again():
    children = ranks(3, agree_often)
    assert [child.wait() for child in children] == [list(range(10))] * 3


@pytest.mark.slow
def test_a_damaged_file_in_place_of_a_shard_that_another_makes(tmp_path, alone):
    """Rank 0 waits for the shard, not for something of its name."""
    fill(tmp_path, DATA, store="fp32", shard_bytes=1)
    paths = sorted(folder_of(tmp_path).glob("*.safetensors"))
    before = files(folder_of(tmp_path))
    assert len(paths) == len(alone[0])
    for path in paths[:6]:
        flip(path, 4000, 3)
    children = ranks(2, build_one_by_one, tmp_path)
    told = [child.wait(30) for child in children]
    assert [one["computed"] for one in told] == [3, 3]
    assert files(folder_of(tmp_path)).keys() == before.keys()
    assert_same_rows(tmp_path, alone)


@pytest.mark.slow
def test_a_process_that_knows_less(tmp_path, alone):
    """What is missing is said by rank 0, whatever the others have seen."""
    fill(tmp_path, DATA[:50], store="fp32")
    children = ranks(2, build_after_word, tmp_path)
    assert children[0].wait() == children[1].wait() > 0
    fill(tmp_path, DATA, store="fp32")
    for child in children:
        child.go()
    assert [child.wait() for child in children] == [(len(DATA), len(alone[0]))] * 2
    assert_same_rows(tmp_path, alone)


@pytest.mark.slow
def test_an_error_on_rank_0_is_said_by_all(tmp_path):
    fill(tmp_path, DATA[:20], store="fp32")
    with building(folder_of(tmp_path)):
        children = ranks(2, build_and_tell, tmp_path)
        words = [child.wait() for child in children]
    assert words[0].removeprefix("CacheBusyError") == words[1].removeprefix("CacheError")
    assert f"is being built by process {os.getpid()} on" in words[1]
    assert issubclass(CacheBusyError, CacheError)


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("0", "0"), ("x", "2")])
def test_variables_that_make_no_sense(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(CacheError, match=r"RANK=.* do not fit, expected 0 <= RANK < WORLD_SIZE"):
        Ranks.of_environment()


@pytest.mark.slow
def test_waiting_ends_where_nothing_happens(tmp_path):
    start = time.monotonic()
    with pytest.raises(CacheError, match="Nothing happened for 0 s while waiting for tea, so a"):
        wait_until(lambda: False, [tmp_path], "tea", deadline=0.2)
    assert 0.2 < time.monotonic() - start < 5
    count = []

    def done():
        count.append((tmp_path / str(len(count))).touch())
        return len(count) > 10

    start = time.monotonic()
    wait_until(done, [tmp_path], "ten files", deadline=0.3)
    assert time.monotonic() - start > 0.4


if __name__ == "__main__":
    under_torchrun(Path(sys.argv[1]))
