"""Two machines with a shared folder, each with its torchrun: what they build, and what happens when
the cable between them is cut. (Network namespaces on one computer: bench/cluster/two_machines.py.)
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from bench.cluster.two_machines import NoMachines, descendants, end, enter, two_machines, until
from lpt_fast.cache import ActivationCache, CacheError
from lpt_fast.cache.folder import Folder
from lpt_fast.cache.ranks import Ranks, deadline_seconds
from lpt_fast.cache.verify import verify
from lpt_fast.train.cursor import last_checkpoint
from tests.cache.cases import Child, built, folder_of, hear, rows_of, say, texts
from tests.cache.test_ranks import as_rank
from tests.cli.cases import ROWS, invoke, write_tsv
from tests.train import ddp_script
from tests.train.ddp_script import fill, train
from tests.train.test_ddp_training import assert_close, free_port

PATIENCE = 4  # seconds, where the cable is cut; it is 600 otherwise


@pytest.fixture
def machines():
    try:
        with two_machines() as both:
            yield both
    except NoMachines as reason:
        pytest.skip(f"no network namespaces here: {reason}")


def assert_equal_rows(root: Path, expected: Path) -> None:
    """All rows of one process, sound, and the same numbers up to the order of sums."""
    folder = Folder.read(folder_of(root))
    report = verify(folder, full=True)
    assert report.sound and not folder.part_names()
    found, own = (rows_of(ActivationCache.open(path)) for path in (root, expected))
    assert found.keys() == own.keys()
    for key, row in found.items():
        a, b = np.frombuffer(row, np.float32), np.frombuffer(own[key], np.float32)
        assert np.abs(a - b).max() < 1e-6 * np.abs(b).max()


@pytest.mark.slow
def test_precompute(models_dir, tmp_path, machines):
    """The cable is cut before the machines have agreed: both say so in time. It is mended and cut
    again while they work: that is nothing to them, for they share files alone.
    """
    rows = [(f"{text} {i}", label) for i in range(60) for text, label in ROWS]
    call = ["precompute", "--model", str(models_dir / "bert"), "--use_cpu", "--store", "fp32"]
    call += ["--train_file", write_tsv(tmp_path / "train.tsv", rows), "--insertion_layer", "2"]
    alone = invoke(*call, "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    root, logs = tmp_path / "cache", [tmp_path / "log0", tmp_path / "log1"]
    call = ["-m", "lpt_fast", *call, "--out", str(root), "--shard_mb", "0.01"]

    pair = [
        machines.torchrun(i, call, logs[i], LPT_DEADLINE=PATIENCE, PYTHONUNBUFFERED=1)
        for i in (0, 1)
    ]
    try:
        until(lambda: all(descendants(p.pid) for p in pair), "the workers")  # they import now
        machines.cut()
        started = time.monotonic()
        assert [p.wait(60) for p in pair] == [1, 1]
        assert time.monotonic() - started < 40 + PATIENCE  # (they start slowly where others run)
    finally:
        end(pair)
    said = [log.read_text() for log in logs]
    assert f"Nothing happened for {PATIENCE} s while waiting for the shards of the" in said[0]
    assert "lpt-fast: Process 1 of 2 could not agree with process 0 on what to compute" in said[1]
    assert f"within {PATIENCE} s (LPT_DEADLINE)" in said[1]
    kept = set(Folder.read(folder_of(root)).shard_names())
    assert kept  # the share of rank 0

    machines.mend()
    pair = [machines.torchrun(i, call, logs[i], LPT_DEADLINE=60) for i in (0, 1)]
    try:
        folder = folder_of(root)
        # More than one of them makes alone (there are as many to make as are kept, or one less), so
        # both have agreed and are at work.
        enough = 0.6 * len(kept)
        until(lambda: len(set(Folder(folder, None).shard_names()) - kept) > enough, "new shards")
        machines.cut()
        until(
            lambda: (
                "the share of the first of 2 processes" in logs[0].read_text()
                and not any(descendants(p.pid) for p in pair)
            ),
            "the end of the workers",
        )
    finally:
        end(pair)  # torchrun itself waits 300 s for the other torchrun
    assert kept < set(Folder.read(folder).shard_names())
    assert_equal_rows(root, tmp_path / "alone")


@pytest.mark.slow
def test_training(tmp_path, machines):
    """The cable is cut in mid-epoch: both machines say so within `ddp_timeout`; from the last
    checkpoint they come to the same end as one process that nothing happened to.
    """
    fill(tmp_path / "cache", 50)
    settings = {"cache": str(tmp_path / "cache"), "out": str(tmp_path / "run"), "batch": 4}
    settings |= {"save_strategy": "steps", "save_steps": 3, "ddp_timeout": PATIENCE}
    file, logs = tmp_path / "settings.json", [tmp_path / "log0", tmp_path / "log1"]
    step = tmp_path / "run" / "step"

    def start(**more) -> list:
        file.write_text(json.dumps({**settings, **more}))
        return [machines.torchrun(i, [ddp_script.__file__, str(file)], logs[i]) for i in (0, 1)]

    pair = start(pause=0.3)
    try:
        until(lambda: step.exists() and int(step.read_text() or 0) >= 10, "step 10")
        machines.cut()
        started = time.monotonic()
        assert [p.wait(60) for p in pair] == [1, 1]
        assert time.monotonic() - started < 10 + PATIENCE
    finally:
        end(pair)
    checkpoint = str(last_checkpoint(tmp_path / "run"))
    assert checkpoint.endswith("checkpoint-9")  # 7 steps an epoch
    for rank, log in enumerate(logs):
        words = f"Process {rank} of 2 lost the others after step 1[0-3], expected an answer within "
        words += rf"{PATIENCE} s \(ddp_timeout\); see .*, then start again, from {checkpoint}\."
        assert re.search(words, log.read_text())

    machines.mend()
    pair = start(checkpoint=checkpoint)
    try:
        assert [p.wait(60) for p in pair] == [0, 0]
    finally:
        end(pair)
    told = json.loads((tmp_path / "run" / "rank0.json").read_text())
    assert_close(told, train(**{**settings, "batch": 8, "out": str(tmp_path / "one")}))


def answer_late(machine, address, seconds) -> None:
    """On one of two machines: process 0 takes its time, process 1 waits for it."""
    enter(machine)
    os.environ.update(MASTER_ADDR=address, LPT_DEADLINE=seconds)
    ranks = Ranks.of_environment()
    if ranks.rank == 0:
        store = next(dist.rendezvous("env://"))  # which it keeps for both
        say("waited for")
        hear()
        del store
        return
    try:
        ranks.agree(dict)
    except CacheError as error:
        say(str(error))


@pytest.mark.slow
def test_a_cable_that_is_cut_while_a_process_waits_for_an_answer(machines):
    """(The store's own deadline does not end that wait.)"""
    port, words = free_port(), "Process 1 of 2 could not agree with process 0 on what to compute"
    both = [
        Child(as_rank, i, 2, port, answer_late, name, machines.addresses[0], "2")
        for i, name in enumerate(machines.names)
    ]
    assert both[0].wait() == "waited for"
    machines.cut()
    told = both[1].wait(20)
    assert told.startswith(words) and "the network did not answer for 5 s; see whether" in told
    assert both[1].end() == 0
    both[0].go()
    assert both[0].end() == 0


# -- without a second machine ----------------------------------------------------------------------


def build_in_vain(root, patience) -> None:
    os.environ["LPT_DEADLINE"] = patience
    try:
        built(root, texts(20), store="fp32")
    except CacheError as error:
        say(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "whom"), [(0, "the other processes"), (1, "process 0")])
def test_a_process_whose_others_never_come(tmp_path, rank, whom):
    child = Child(as_rank, rank, 2, free_port(), build_in_vain, tmp_path, "1.5")
    words = child.wait(30)
    assert (
        f"Process {rank} of 2 could not agree with {whom} on what to compute, expected an" in words
    )
    assert "within 2 s (LPT_DEADLINE): " in words and "then start again." in words
    assert child.end() == 0


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_deadline_that_is_none(monkeypatch, text):
    monkeypatch.setenv("LPT_DEADLINE", text)
    with pytest.raises(CacheError, match=f"LPT_DEADLINE is '{text}', expected a number of seconds"):
        deadline_seconds()
    monkeypatch.setenv("LPT_DEADLINE", "2.5")
    assert deadline_seconds() == 2.5
    monkeypatch.delenv("LPT_DEADLINE")
    assert deadline_seconds() == 600
