"""Where rows are read from, and whether a cache pays, by given numbers."""

from __future__ import annotations

import itertools
import resource
from pathlib import Path

import psutil
import pytest
import torch

from lpt_fast.cache import ActivationCache, CacheError, planner
from lpt_fast.cache.planner import (
    TIERS,
    amount,
    available_memory,
    choose_tier,
    continuing_pays,
    payoff,
)
from tests.cache.cached_texts import filled, ragged
from tests.tiny import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # nothing here asks a GPU


@pytest.mark.parametrize(
    ("size", "device", "host", "gpu", "tier", "why"),
    [
        (700, CPU, 1000, None, "page", "700 B fit in the page cache (1000 B free)"),
        (
            701,
            CPU,
            1000,
            None,
            "disk",
            "701 B are more than memory holds (1000 B free): read ahead",
        ),
        (0, CPU, 0, None, "page", "0 B fit in the page cache (0 B free)"),
        (5000, CUDA, 0, 10_000, "device", "4.9 KiB fit beside 9.8 KiB free on the GPU"),
        (5001, CUDA, 20_000, 10_000, "pinned", "too much for the GPU (9.8 KiB free) and fit in"),
        (8001, CUDA, 20_000, 10_000, "page", "7.8 KiB fit in the page cache (19.5 KiB free)"),
        (14_001, CUDA, 20_000, 10_000, "disk", "are more than memory holds (19.5 KiB free)"),
    ],
)
def test_the_fastest_tier_that_fits(size, device, host, gpu, tier, why):
    plan = choose_tier(size, device, host_free=host, device_free=gpu)
    assert plan.tier == tier and why in plan.why and str(plan) == f"{tier}: {plan.why}"


def test_several_processes_of_a_machine_share_one_copy(monkeypatch):
    how = {"host_free": 20_000, "device_free": 10_000}
    assert choose_tier(5001, CUDA, **how, processes=2).tier == "page"
    assert choose_tier(5000, CUDA, **how, processes=2).tier == "device"  # each on its own GPU
    assert choose_tier(5001, CUDA, "pinned", **how, processes=2).tier == "pinned"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert choose_tier(5001, CUDA, **how).tier == "page"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert choose_tier(5001, CUDA, **how).tier == "pinned"


def test_a_tier_that_was_asked_for():
    for tier, device in itertools.product(TIERS, (CPU, CUDA)):
        plan = choose_tier(10**15, device, tier, host_free=0, device_free=0)
        falls = tier == "device" and device == CPU
        assert plan.tier == ("pinned" if falls else tier)
        assert plan.why == (
            "device was asked for, and the device is the host's memory" if falls else "asked for"
        )
    with pytest.raises(
        CacheError, match="`tier` must be auto, device, pinned, page, disk, got 'g'"
    ):
        choose_tier(0, CPU, "g")


def test_memory_that_is_free(monkeypatch, tmp_path):
    """The least of the machine's, the control group's and the process's own."""
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=10**15))
    monkeypatch.setattr(planner, "Path", lambda path: tmp_path if "cgroup" in path else Path(path))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert available_memory() == 10**15
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert available_memory() == 10**15
    (tmp_path / "memory.max").write_text("1000\n")
    assert available_memory() == 300
    assert planner.held_limit() == 100  # a tenth of all
    (tmp_path / "memory.current").write_text("950\n")
    assert planner.held_limit() == 25  # half of what is free
    (tmp_path / "memory.current").write_text("1100\n")
    assert available_memory() == 0 == planner.held_limit()
    (tmp_path / "memory.max").write_text("?")
    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (used + 2**30, -1))
    assert 0 < available_memory() < 2**31


def test_the_plan_is_made_anew_as_a_cache_grows(monkeypatch, tmp_path):
    """For its bytes as they are kept, and what is free then."""
    model = tiny("bert")
    # 60 tokens of 32 numbers, of which 0.7 of what is free may be taken.
    tokens = sum(len(example["input_ids"]) for example in ragged())
    for store, element in (("fp32", 4), ("bf16", 2), ("int8c", 1)):
        monkeypatch.setattr(planner, "available_memory", lambda e=element: tokens * 32 * e / 0.699)
        cache, _ = filled(tmp_path, model, ragged(), store=store)
        assert cache.plan.tier == "page" and "fit in the page cache" in cache.stats()["why"]
        cache.ensure(model, ragged(14))
        assert cache.plan.tier == cache.stats()["tier"] == "disk"
        again = ActivationCache.open(tmp_path, insertion_layer=2, store=store, tier="page")
        assert (again.plan.tier, again.plan.why) == ("page", "asked for")


def test_whether_a_cache_pays():
    """What is said of N epochs, and from which on it pays, agree."""
    for forward, missing, reading in itertools.product(
        (10.0, 3.0, 1.0), (0.0, 0.5, 1.0), (0.0, 0.7, 1.0, 2.5, 20.0)
    ):
        pays = {epochs: payoff(epochs, forward, missing, reading) for epochs in range(1, 40)}
        first = next((epochs for epochs, p in pays.items() if p.pays), None)
        for epochs, plan in pays.items():
            own = 1.1 * missing * forward + epochs * reading
            assert plan.pays == (own < epochs * forward)
            assert plan.pays == (first is not None and epochs >= first)
            says = "never" if first is None else f"from epoch {first} on"
            assert str(plan).endswith(f"(it pays {says})")
            verdict = "pays" if plan.pays else "does not pay"
            assert f"caching {verdict} for {epochs} epochs: " in plan.why
    # Exactly even is not yet a gain.
    assert "it pays from epoch 3 on" in str(payoff(2, 1.1, 1.0, 0.495))


def test_whether_to_continue_from_a_lower_cut():
    assert continuing_pays(768, 1, 4, CPU) and not continuing_pays(32, 1, 4, CPU)
    # Reading is paid once, running for every layer; half the bytes are read in half the time.
    assert [continuing_pays(1024, k, 4, CUDA) for k in (12, 60, 100)] == [False, False, True]
    assert [continuing_pays(1024, k, 2, CUDA) for k in (12, 60, 100)] == [False, True, True]


def test_amounts():
    assert [amount(n) for n in (0, 1023, 1024, 1536, 2**20, 2**30, 2**40, 2**50)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "1.0 MiB",
        "1.0 GiB",
        "1.0 TiB",
        "1024.0 TiB",
    ]
