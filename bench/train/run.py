"""The body of `python -m bench train`: rows, gate, memory, rounds of steps, figures."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from ..data import Figure, Source, WrongResult, temporary
from .contestants import (
    HALF,
    LATE,
    LPTRAINER,
    OURS,
    OWN_BF16,
    contestants_of,
)
from .data import drawn_texts, padding_ratio, plan_batches, real_texts
from .gate import LateGate, check_other
from .memory import LOAD, LOAD_HALF, peak_bytes, write_job
from .models import Contestant, Zoo
from .rows import Filled, fill_cache, fill_features
from .settings import Settings
from .step_figures import MIB, StepFigures
from .whole_loop import TURN, WholeLoop

MEMORY_STEPS = 3
GATE_TEXTS = {"cpu": 32, "cuda": 256}  # at the most


class Bench(StepFigures):
    """One run of the benchmark."""

    def __init__(self, settings: Settings):
        self.settings = s = settings
        self.wrong: list[str] = []  # what is said of contestants that failed the gate
        self.starts: dict[int, dict[str, int]] = {}  # k -> who had how many seconds before its loop
        if s.data is None:
            self.texts = drawn_texts(s.task, s.rows, s.seed)
        else:
            self.texts = real_texts(Source(s.data, s.model), s.task, s.rows)
        pretrained = s.model
        if pretrained is None and s.encoder == "minilm":
            from lpt_fast.cli.demo import demo_model

            pretrained = demo_model()
        self.zoo = Zoo(
            s.encoder,
            pretrained,
            self.texts.classes,
            s.dtype,
            s.device,
            self.texts.pad_id,
            quick=s.quick,
            seed=s.seed,
        )
        depth = self.zoo.config.num_hidden_layers
        for k in s.layers:
            if not 1 <= k < depth:
                raise ValueError(
                    f"`--layers` must be from 1 to {depth - 1} for this encoder, got {k}."
                )
        count = s.warmup + s.steps
        self.batches = plan_batches(self.texts.lengths, count, s.batch_size, s.batch_tokens, s.seed)

    def describe(self) -> str:
        s, texts = self.settings, self.texts
        size = f"{s.batch_tokens:,} tokens" if s.batch_tokens else f"{s.batch_size} texts"
        weights = self.zoo.model_name or "random weights"
        return (
            f"{s.encoder} ({weights}), {s.dtype} on {s.device}, {torch.get_num_threads()} "
            f"thread(s); {len(texts):,} texts ({texts.origin}), batches of {size}; "
            f"{s.steps} timed steps of each after {s.warmup}, in turns. Ratios are of medians; "
            "an epoch is the median step times the batches of all the texts."
        )

    def common(self) -> dict:
        """Of every line of results."""
        names = ("task", "encoder", "model", "dtype", "device", "steps", "quick", "seed")
        s = asdict(self.settings)
        return {name: s[name] for name in names} | {
            "batch_size": None if s["batch_tokens"] else s["batch_size"],
            "batch_tokens": s["batch_tokens"],
            "texts": self.texts.origin,
            "rows": len(self.texts),
            "threads": torch.get_num_threads(),
        }

    @cached_property
    def epoch_steps(self) -> int:
        """Batches of all the texts."""
        s, lengths = self.settings, self.texts.lengths
        if s.batch_tokens:
            return math.ceil(lengths.sum() / s.batch_tokens)
        return math.ceil(len(lengths) / s.batch_size)

    @cached_property
    def needed(self) -> np.ndarray:
        """Numbers of the texts that steps read, and of more, up to what a build should be."""
        used = np.unique(np.concatenate(self.batches))
        others = np.setdiff1d(np.arange(len(self.texts)), used)
        draw = np.random.default_rng(self.settings.seed)
        more = draw.permutation(others)[: max(0, self.settings.build_rows - len(used))]
        return np.sort(np.concatenate((used, more)))

    @property
    def _gate_batch(self) -> np.ndarray:
        batch = self.batches[0]
        return batch[: GATE_TEXTS[self.settings.device]]

    # -- figures -----------------------------------------------------------------------------------

    def figures(self) -> Iterator[Figure]:
        with temporary() as folder:
            yield from self._batch_figures()
            self.folder, self.filled = folder, {}
            for k in self.settings.layers:
                yield self._fill(k)
            self.features = fill_features(self.zoo, self.texts, self.needed)
            yield self._built("features of the head alone", self.features)
            yield from self._gate()
            peaks = self._peaks_of_processes() if self._memory_by_process else {}
            contestants = self._contestants(peaks)
            self._time(contestants)
            yield from self._step_figures(contestants, peaks)
            yield from self._ratios(contestants)
            yield from self._paybacks(contestants)
            if self.settings.batch_tokens:
                yield from self._shares(contestants)
        if self.wrong:
            raise WrongResult("; ".join(self.wrong))

    def _batch_figures(self) -> Iterator[Figure]:
        lengths, timed = self.texts.lengths, self.batches[self.settings.warmup :]
        tokens = [int(lengths[rows].sum()) for rows in timed]
        yield Figure(
            "batches",
            "padded places over real tokens",
            padding_ratio(lengths, timed),
            "x",
            details={
                "tokens": float(statistics.mean(tokens)),
                "texts": float(statistics.mean(map(len, timed))),
                "longest": int(max(lengths[rows].max() for rows in timed)),
                "steps_an_epoch": self.epoch_steps,
            },
        )

    def _fill(self, k: int) -> Figure:
        folder = str(Path(self.folder, f"k{k}"))
        filled = fill_cache(self.zoo, self.texts, self.needed, k, folder, self.settings.store)
        self.filled[k] = filled
        stats = filled.rows.cache.stats()
        more = {"MiB": stats["bytes"] / MIB, "store": stats["store"], "tier": stats["tier"]}
        return self._built(f"cache, k = {k}", filled, more)

    def _built(self, name: str, filled: Filled, more: dict | None = None) -> Figure:
        whole = filled.texts == len(self.texts)
        how = "whole" if whole else "scaled by tokens"
        return Figure(
            "build",
            f"{name}: all texts, {how}",
            filled.whole,
            "s",
            details={"measured_s": filled.seconds, "measured_texts": filled.texts, **(more or {})},
        )

    def _gate(self) -> Iterator[Figure]:
        """Those that fail it, or break in it, leave `self._who` and are named in `self.wrong`."""
        batch = self._gate_batch
        gates = {
            k: LateGate(self.zoo, self.texts, k, self.filled[k].rows, batch)
            for k in self.settings.layers
        }
        for name, k in list(self._who):
            if k is None:
                figures = check_other(self.zoo, self.texts, self.features.rows, batch, name)
            elif name in OURS:
                figures = gates[k].check(name)
            else:
                continue
            try:
                yield from list(figures)
            except Exception as error:  # a contestant that breaks must not end the run
                known = isinstance(error, WrongResult)
                self.wrong.append(str(error) if known else f"{name}: {error!r}")
                self._who.remove((name, k))

    def _rows_of(self, name: str, k: int | None):
        if name == "head":
            return self.features.rows
        return self.filled[k].rows if name in LATE and LATE[name][1] else None

    @cached_property
    def _who(self) -> list[tuple[str, int | None]]:
        """Names and insertion layers in the order of a round."""
        only = self.settings.contestants
        names = contestants_of(self.settings.dtype, self.settings.device)
        names = [(n, each) for n, each in names if only is None or n in only]
        if self.settings.batch_tokens:  # which a Trainer's batches cannot be made by
            names = [(n, each) for n, each in names if n != LPTRAINER]
        late = [(n, k) for k in self.settings.layers for n, each in names if each]
        return late + [(n, None) for n, each in names if not each]

    # -- memory ------------------------------------------------------------------------------------

    @property
    def _memory_by_process(self) -> bool:
        return self.settings.memory and self.settings.device == "cpu"

    def _peaks_of_processes(self) -> dict[tuple, int]:
        """Bytes beyond those of the loaded model, by (name, k)."""
        job = Path(self.folder, "job.json")
        batches = self.batches[:MEMORY_STEPS]
        features = self.features.rows
        write_job(job, self.zoo, self.texts, batches, features, torch.get_num_threads())
        half = self.settings.dtype == "bf16"
        loaded = {False: peak_bytes(job, LOAD, None, None)}
        if half:
            loaded[True] = peak_bytes(job, LOAD_HALF, None, None)
        found = {}
        for name, k in self._who:
            if name == LPTRAINER:  # it takes what its step takes
                continue
            cache = str(Path(self.folder, f"k{k}")) if name in LATE and LATE[name][1] else None
            peak = peak_bytes(job, name, k, cache)
            found[name, k] = peak - loaded[half and name in HALF]
        return found

    def _contestants(self, peaks: dict[tuple, int]) -> list[Contestant]:
        """Fresh ones, each having made its first step. On CUDA their memory is found on the way,
        beyond the loaded model: what training allocated at the most, optimizer included.
        """
        made = []
        device = self.zoo.place
        counted = self.settings.memory and device.type == "cuda"
        for name, k in self._who:
            rows = self._rows_of(name, k)
            if name == LPTRAINER:
                folder = str(Path(self.folder, f"loop{k}"))
                made.append(WholeLoop(self.zoo, self.texts, k, rows, folder))
                continue
            half = self.settings.dtype == "bf16" and name in HALF
            model = self.zoo.base(half)
            if counted:
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            made.append(self.zoo.contestant(name, k, self.texts, rows, model=model))
            if counted:
                for batch in self.batches[:MEMORY_STEPS]:
                    made[-1].step(batch)
                torch.cuda.synchronize()
                peaks[name, k] = torch.cuda.max_memory_allocated() - before
        return made

    # -- time --------------------------------------------------------------------------------------

    def _time(self, contestants: list[Contestant]) -> None:
        """Each batch is a round: all train on it, in an order that is one further each time."""
        gc.collect()
        bare = [c for c in contestants if c.name != LPTRAINER]
        loops = [c for c in contestants if c.name == LPTRAINER]
        for loop in loops:  # with those of its k, and those without
            own = [c for c in bare if c.k in (None, loop.k)]
            self.starts[loop.k] = {c.name: len(c.seconds) for c in own}
            size, turns = self.settings.batch_size, len(self.batches)
            loop.run(size, turns, self.settings.warmup, partial(self._round, own, quick=TURN))
        left = [c for c in bare if not c.seconds]
        for turn in range(len(self.batches)) if left else ():
            self._round(left, turn)

    def _round(self, contestants: list[Contestant], turn: int, quick: int = 1) -> None:
        """A step of each; of OWN_BF16 further ones, as a training makes them one after another."""
        if not contestants:
            return
        first, batch = turn % len(contestants), self.batches[turn]
        for contestant in contestants[first:] + contestants[:first]:
            took = [self._timed(contestant, batch)]
            if contestant.name in OWN_BF16:
                more = [self.batches[(turn + i) % len(self.batches)] for i in range(1, quick)]
                took += [self._timed(contestant, own) for own in more]
            if turn >= self.settings.warmup:
                contestant.seconds.append(took[0])
                contestant.in_a_row.append(statistics.mean(took))

    def _timed(self, contestant: Contestant, batch: np.ndarray) -> float:
        on_gpu = self.zoo.place.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        contestant.step(batch)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    # -- where the time goes -----------------------------------------------------------------------

    def profiled(self) -> Iterator[Figure]:
        """Prints torch.profiler's table of one step from the cache, packed; gate first."""
        from torch.profiler import ProfilerActivity, profile

        device = self.zoo.place
        with temporary() as folder:
            self.folder, self.filled = folder, {}
            k = self.settings.layers[0]
            self._fill(k)
            rows = self.filled[k].rows
            gate = LateGate(self.zoo, self.texts, k, rows, self._gate_batch)
            yield from gate.check("cached_packed")
            contestant = self.zoo.contestant("cached_packed", k, self.texts, rows)
            for batch in self.batches[: self.settings.warmup]:
                self._timed(contestant, batch)
            activities = [ProfilerActivity.CPU]
            if device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            with profile(activities=activities) as seen:
                self._timed(contestant, self.batches[self.settings.warmup])
        key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(f"One step of {contestant.label}, {len(batch)} texts:")
        averages = seen.key_averages()
        print(averages.table(sort_by=key, row_limit=20, max_name_column_width=60), flush=True)
