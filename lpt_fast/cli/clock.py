"""Seconds of a training without those of its evaluations, and what each evaluation found."""

from __future__ import annotations

import time

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Runs while a model trains (a cache that is filled first counts) and stands still while it is
    evaluated.

    Attributes:
        curve: (seconds, accuracy) of each evaluation.
    """

    def __init__(self):
        self.curve: list[tuple[float, float]] = []
        self._start = self._stopped = time.perf_counter()
        self._paused = 0.0

    def start(self) -> None:
        """From now."""
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._paused

    def on_step_end(self, args, state, control, **more):
        self._stopped = time.perf_counter()

    def on_epoch_end(self, args, state, control, **more):
        self._stopped = time.perf_counter()

    def on_evaluate(self, args, state, control, metrics=None, **more):
        if "eval_accuracy" in (metrics or {}):
            found = self._stopped - self._start - self._paused
            self.curve.append((round(found, 2), metrics["eval_accuracy"]))
        self._paused += time.perf_counter() - self._stopped
        self._stopped = time.perf_counter()
