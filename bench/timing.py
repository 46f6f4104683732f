"""How a contestant is run: prepared, warmed and timed.

On CUDA a round is one batch of calls between two events, by default the replay of a CUDA graph that
holds them, so that the time is the kernels' and not the launches'. Calls take turns over as many
sets of tensors as exceed the L2 cache several times over, outputs included: each call finds its
input in memory, as one finds it behind the rest of a model, and leaves as much to write back as it
wrote. (Flushing the cache between calls instead would leave the flush's own lines to be written
back in the next call's time.)
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .case import Inputs, Operator

CACHE_TIMES = 4  # sets of tensors together, in multiples of the L2 cache
MAX_SETS = 64
MAX_CALLS = 128  # in a batch
BATCH_SECONDS = {"cuda": 0.004, "cpu": 0.02}  # what a batch should last
# Before a replay is timed, so that the host has launched it when the device gets there.
SLEEP_CYCLES = 400_000


def outputs_of(result) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def map_inputs(value, change: Callable):
    if isinstance(value, dict):
        return {name: map_inputs(v, change) for name, v in value.items()}
    return change(value)


def prepare(operator: Operator, function, inputs: Inputs, gradients: list[Tensor] | None):
    """A call without arguments that does what is timed, once and again.

    Of an operator with `wrt` the forward pass runs here and the call is the backward pass alone.
    Otherwise gradients are off.

    Args:
        gradients: of the outputs; None of a forward operator.
    """
    inputs = {n: v.clone() if n in operator.mutates else v for n, v in inputs.items()}
    if not operator.wrt:

        def forward():
            with torch.no_grad():
                return outputs_of(function(inputs))

        return forward
    leaves = []

    def leaf(value):
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    for name in operator.wrt:
        inputs[name] = map_inputs(inputs[name], leaf)
    out = outputs_of(function(inputs))
    return lambda: list(torch.autograd.grad(out, leaves, gradients, retain_graph=True))


def sets_needed(nbytes: int, device: torch.device) -> int:
    """Sets of tensors that calls take turns over."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size or 64 * 2**20
    return min(MAX_SETS, max(1, -(-CACHE_TIMES * cache // max(1, nbytes))))


@dataclass
class Contestant:
    """One provider of an operator, ready to be timed.

    Attributes:
        name: provider.
        calls: one for each set of tensors.
        graph: whether rounds replay a CUDA graph.
        note: what did not go as asked for.
        seconds: of one call, a round each.
    """

    name: str
    calls: list[Callable[[], list[Tensor]]]
    graph: bool = False
    note: str = ""
    count: int = 1
    seconds: list[float] = field(default_factory=list)
    _run: Callable[[], None] | None = None

    def _batch(self) -> None:
        # Outputs stay alive for one turn over the sets, so that their memory takes turns too.
        alive = deque(maxlen=len(self.calls))
        for i in range(self.count):
            alive.append(self.calls[i % len(self.calls)]())

    def warm(self, device: torch.device, graph: bool, stream) -> None:
        """Compiles, allocates, finds how many calls a batch needs, captures the graph."""
        for call in self.calls:
            call()
        self._run = self._batch
        self._measure(device)
        once = self._measure(device)
        self.count = max(1, min(MAX_CALLS, round(BATCH_SECONDS[device.type] / max(once, 1e-7))))
        if device.type == "cuda":
            self.count = max(self.count, min(MAX_CALLS, 2 * len(self.calls)))
            if graph:
                self._capture(stream)
        self._measure(device)

    def _capture(self, stream) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self._batch()
        except Exception as error:  # whatever a provider does that a graph cannot hold
            torch.cuda.synchronize()
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.note = f"no CUDA graph: {lines[0][:200]}"
            return
        self.graph, self._run = True, graph.replay

    def _measure(self, device: torch.device) -> float:
        """Seconds of one call, by one batch."""
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if self.graph:
                torch.cuda._sleep(SLEEP_CYCLES)
            start.record()
            self._run()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / 1e3 / self.count
        start = time.perf_counter()
        self._run()
        return (time.perf_counter() - start) / self.count

    def round(self, device: torch.device) -> None:
        self.seconds.append(self._measure(device))


def time_interleaved(contestants: list[Contestant], device, repeats: int, seconds: float) -> None:
    """Rounds in which each contestant runs one batch, in an order shuffled anew each time.

    Ends after `repeats` rounds, or when `seconds` for each contestant are over (but not before
    three rounds).
    """
    order, shuffle = list(contestants), random.Random(0)
    start = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - start > seconds * len(order):
            break
        shuffle.shuffle(order)
        for contestant in order:
            contestant.round(device)


def percentiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80, between measured values in a straight line."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    found = torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("p20", "p50", "p80"), found.tolist(), strict=True))


def peak_memory(call: Callable, device: torch.device) -> int | None:
    """Bytes allocated at the most while `call` runs, beyond those before; None on the CPU, where
    nobody counts.
    """
    if device.type != "cuda":
        return None
    call()  # so that what is allocated once (compiled code, workspaces) does not count
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def waits_for_device(call: Callable, device: torch.device) -> bool | None:
    """Whether a call makes the host wait for the device; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False
