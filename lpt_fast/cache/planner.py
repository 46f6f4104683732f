"""Where rows are best read from, and whether a cache pays at all."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from .errors import CacheError

TIERS = ("device", "pinned", "page", "disk")
# Shares of what is free that a cache may take: a model trains beside it.
DEVICE_SHARE, PINNED_SHARE, PAGE_SHARE = 0.5, 0.4, 0.7
# Of all memory, that projections of the rows may take (lpt_fast/train/projections.py). (Not of what
# is free: whether they are held changes the last bits of a training, which should rarely hang on
# what else is running.)
HELD_SHARE = 0.1


@dataclass(frozen=True)
class Plan:
    """Where rows are read from.

    Attributes:
        tier: "device": the whole cache lies on the GPU; "pinned": in host memory (page-locked where
            it goes to a GPU), a copy for each process; "page": files that the page cache holds, one
            copy for a machine; "disk": files that it does not, asked for ahead of their use.
        why: one sentence.
    """

    tier: str
    why: str

    def __str__(self) -> str:
        return f"{self.tier}: {self.why}"


def available_memory() -> int:
    """Bytes of host memory that this process may still take: the machine's, its control group's or
    its own limit's, whichever is least.
    """
    free = psutil.virtual_memory().available
    limit = _group_limit()
    with suppress(OSError, ValueError):
        if limit is not None:
            free = min(free, limit - int((_group() / "memory.current").read_text()))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        free = min(free, soft - psutil.Process().memory_info().vms)
    return max(0, free)


def _group() -> Path:
    return Path("/sys/fs/cgroup")


def _group_limit() -> int | None:
    """Bytes that this process's control group may take; None: any."""
    with suppress(OSError, ValueError):
        return int((_group() / "memory.max").read_text())  # ("max" is no number)
    return None


def held_limit() -> int:
    """Bytes that projections may take."""
    whole = min(psutil.virtual_memory().total, _group_limit() or 1 << 62)
    return min(int(HELD_SHARE * whole), available_memory() // 2)


def choose_tier(
    cache_bytes: int,
    device: torch.device,
    tier: str = "auto",
    host_free: int | None = None,
    device_free: int | None = None,
    processes: int | None = None,
) -> Plan:
    """The fastest tier that leaves room for training.

    Args:
        cache_bytes: of the hidden states.
        device: where batches go.
        tier: one of TIERS to take it whatever fits; "auto" to choose.
        host_free, device_free: bytes; default: asked of the system.
        processes: of this machine that read the cache; default: as torchrun says.

    Raises:
        CacheError: an unknown tier.
    """
    if tier not in ("auto", *TIERS):
        raise CacheError(f"`tier` must be auto, {', '.join(TIERS)}, got {tier!r}.")
    if tier == "device" and device.type != "cuda":
        return Plan("pinned", "device was asked for, and the device is the host's memory")
    if tier != "auto":
        return Plan(tier, "asked for")
    host_free = available_memory() if host_free is None else host_free
    size = amount(cache_bytes)
    if device.type == "cuda":
        if device_free is None:
            device_free = torch.cuda.mem_get_info(device)[0]
        if cache_bytes <= DEVICE_SHARE * device_free:
            return Plan("device", f"{size} fit beside {amount(device_free)} free on the GPU")
        if processes is None:
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # (Several processes would hold a copy each; the page cache is one for all, and batches are
        # page-locked in any case.)
        if processes == 1 and cache_bytes <= PINNED_SHARE * host_free:
            return Plan(
                "pinned",
                f"{size} are too much for the GPU ({amount(device_free)} free) and fit in host "
                f"memory ({amount(host_free)} free)",
            )
    if cache_bytes <= PAGE_SHARE * host_free:
        return Plan("page", f"{size} fit in the page cache ({amount(host_free)} free)")
    return Plan("disk", f"{size} are more than memory holds ({amount(host_free)} free): read ahead")


def amount(size: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


# Cautious figures for what has not been measured: floating-point operations and bytes a second.
FLOPS = {"cuda": 1e14, "cpu": 5e10}
DISK_RATE = 2e8


def continuing_pays(width: int, layers: int, element: int, device: torch.device) -> bool:
    """Whether reading rows at a lower cut costs less than running its layers again.

    Args:
        width: D.
        layers: of the lower cut.
        element: bytes of a number in its store.
        device: that computes.
    """
    reading = width * element / DISK_RATE
    running = 24 * width * width * layers / FLOPS.get(device.type, FLOPS["cuda"])
    return reading < running


@dataclass(frozen=True)
class Payoff:
    """Whether a cache pays for so many epochs."""

    pays: bool
    why: str

    def __str__(self) -> str:
        return self.why


def payoff(epochs: float, forward: float, missing: float, reading: float) -> Payoff:
    """Compares the lower layers of all epochs with filling and reading a cache.

    Args:
        epochs: planned, over all runs that will use the cache.
        forward: seconds of the lower layers over all texts once.
        missing: share of the tokens that the cache does not hold yet.
        reading: seconds to read all texts once.
    """
    without = epochs * forward
    with_cache = 1.1 * missing * forward + epochs * reading
    even = "never"
    if forward > reading:
        even = f"from epoch {int(1.1 * missing * forward / (forward - reading)) + 1} on"
    verdict = "pays" if with_cache < without else "does not pay"
    return Payoff(
        with_cache < without,
        f"caching {verdict} for {epochs:g} epochs: the lower layers take {without:,.1f} s without "
        f"it and {with_cache:,.1f} s with it (it pays {even})",
    )
