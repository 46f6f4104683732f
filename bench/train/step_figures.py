"""What `python -m bench train` says of its contestants' seconds: steps, ratios, epochs after which
a cache has paid for itself, shares of the machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import cycle

import torch

from ..data import Figure
from ..timing import percentiles
from .contestants import HELD, HOLDS, LATE, LORA, LPTRAINER, OURS, OWN_BF16, RECIPES
from .flops import matmul_rate, necessary_flops
from .models import Contestant
from .targets import LOOP_AT_MOST, LORA_AT_MOST, payback, target_of

RIVALS = ("recipe", "recipe_bf16", "recipe_autocast", "lora", "lora_bf16", "lora_autocast")
MIB = 2**20


class StepFigures:
    """Mixed into the Bench: `settings`, `texts`, `zoo`, `batches`, `filled`, `starts`,
    `epoch_steps`."""

    def _step_figures(self, contestants, peaks: dict[tuple, int]) -> Iterator[Figure]:
        lengths = self.texts.lengths
        tokens = [int(lengths[rows].sum()) for rows in self.batches[self.settings.warmup :]]
        for c in contestants:
            spread = percentiles(c.seconds)
            details = {
                "p20": 1e3 * spread["p20"],
                "p80": 1e3 * spread["p80"],
                "epoch_s": spread["p50"] * self.epoch_steps,
                "trainable": c.trainable,
            }
            if c.name != LPTRAINER:  # (which has batches of its own)
                rates = [n / t for n, t in zip(cycle(tokens), c.seconds, strict=False)]
                details["tokens_a_second"] = statistics.median(rates)
            if c.rows is not None and c.rows.held is not None:
                # Of the rows of the cache; all texts have so many times their tokens.
                times = float(lengths.sum() / lengths[c.rows.computed].sum())
                details["held_MiB"] = c.rows.held.bytes * times / MIB
                details["held_s"] = c.rows.held_seconds * times
            if (c.name, c.k) in peaks:
                details["peak_MiB"] = peaks[c.name, c.k] / MIB
            yield Figure("step", c.label, 1e3 * spread["p50"], "ms", details=details)

    def _ratios(self, contestants: list[Contestant]) -> Iterator[Figure]:
        s = self.settings
        by = {(c.name, c.k): c for c in contestants}
        for k in s.layers:
            yield from self._beside_held(k, by)
            loop, bare = by.get((LPTRAINER, k)), by.get(("ours_bf16", k))
            if loop is not None and bare is not None:
                ratio = statistics.median(loop.seconds) / statistics.median(bare.in_a_row)
                label = f"{loop.label} over {bare.label}, in a row"
                yield Figure("loop", label, ratio, "x", LOOP_AT_MOST, False)
            for name in OURS:
                own = by.get((name, k))
                for other in RIVALS:
                    them = by.get((other, k if other in LATE else None))
                    if own is None or them is None:
                        continue
                    seconds = self._beside(them, own)
                    rounds = [a / b for a, b in zip(seconds, own.seconds, strict=True)]
                    target = None
                    if s.model is None and not s.quick:
                        target = target_of(s.encoder, k, s.device, s.dtype, other, name)
                    yield Figure(
                        "ratio",
                        f"{other} over {own.label}",
                        statistics.median(seconds) / statistics.median(own.seconds),
                        "x",
                        target,
                        True,
                        {"median_of_rounds": statistics.median(rounds)},
                    )

    def _beside(self, them: Contestant, own: Contestant) -> list[float]:
        """Somebody's seconds in the rounds of `own`. (Who has no k may be in those of each k.)"""
        first = self.starts.get(own.k, {}).get(them.name, 0)
        return them.seconds[first : first + len(own.seconds)]

    def _beside_held(self, k: int, by: dict) -> Iterator[Figure]:
        """Late LoRA over the prompt alone, both as LPTTrainer runs them."""
        alone = by.get((HELD, k)) or by.get(("cached_packed", k))
        for name in RECIPES:
            own = by.get((name, k))
            if own is not None and alone is not None:
                ratio = statistics.median(own.seconds) / statistics.median(alone.seconds)
                label = f"{own.label} over {alone.label}"
                yield Figure("late LoRA", label, ratio, "x", LORA_AT_MOST, False)

    def _paybacks(self, contestants: list[Contestant]) -> Iterator[Figure]:
        epoch = {
            (c.name, c.k): statistics.median(c.seconds) * self.epoch_steps for c in contestants
        }
        for k in self.settings.layers:
            build, cached = self.filled[k].whole, epoch.get(("cached_packed", k))
            for other in ("uncached", "recipe"):
                if cached is None or (other, k) not in epoch:
                    continue
                yield Figure(
                    "payback",
                    f"epochs until the cache is paid for, beside {other}, k = {k}",
                    payback(build, epoch[other, k], cached),
                    "epochs",
                    details={"build_s": build, "epoch_s": epoch[other, k], "cached_s": cached},
                )

    def _shares(self, contestants: list[Contestant]) -> Iterator[Figure]:
        """What a step's necessary arithmetic reaches of the rate of a large matrix product."""
        s, config = self.settings, self.zoo.config
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        size = (8192 if s.device == "cuda" else 1024) if not s.quick else 256
        rates = {n: matmul_rate(self.zoo.place, dtype, size) for n, dtype in dtypes.items()}
        timed = self.batches[s.warmup :]
        for c in contestants:
            if c.name not in LATE or c.name in LORA:  # (its updates' arithmetic is not counted)
                continue
            rate = rates["bf16" if c.name in OWN_BF16 or c.autocast else s.dtype]
            works = [
                necessary_flops(
                    self.texts.lengths[rows],
                    m=c.model.peft_config["default"].num_virtual_tokens,
                    width=config.hidden_size,
                    heads=config.num_attention_heads,
                    layers=config.num_hidden_layers,
                    k=c.k,
                    cached=LATE[c.name][1],
                    held=c.name in HOLDS and s.device == "cpu",
                )
                for rows in timed
            ]
            reached = [work / t for work, t in zip(works, c.seconds, strict=True)]
            yield Figure(
                "share",
                f"{c.label}: necessary arithmetic, of the matmul rate",
                100 * statistics.median(reached) / rate,
                "%",
                details={
                    "necessary_GFLOP": statistics.median(works) / 1e9,
                    "GFLOP_a_second": statistics.median(reached) / 1e9,
                    "matmul_GFLOP_a_second": rate / 1e9,
                    "matmul_size": size,
                },
            )
