"""Memory that a training on a CPU frees stays with the process until the training ends."""

from __future__ import annotations

import resource

import pytest
import torch

from lpt_fast.train import kept_memory
from lpt_fast.train.kept_memory import _MMAP_THRESHOLD, _TRIM_THRESHOLD, KEPT, USUAL
from tests.train.cases import cached, model_of


class Libc:
    def __init__(self):
        self.calls = []

    def mallopt(self, name, value):
        self.calls.append((name, value))
        return 1

    def malloc_trim(self, pad):
        self.calls.append(("trim", pad))


@pytest.fixture
def libc(monkeypatch):
    made = Libc()
    monkeypatch.setattr(kept_memory, "_libc", lambda: made)
    return made


def test_thresholds_go_back_with_the_outermost(libc):
    begins = [(_MMAP_THRESHOLD, 1 << 25), (_TRIM_THRESHOLD, 1 << 30)]
    with kept_memory.kept_memory():
        with pytest.raises(ZeroDivisionError), kept_memory.kept_memory():
            raise ZeroDivisionError
        assert libc.calls == begins
    assert libc.calls == [*begins, *USUAL.items(), ("trim", 0)]


def test_a_training_keeps_and_gives_back(libc, tmp_path):
    seen, model = [], model_of()
    trainer = cached(model, tmp_path, tmp_path / "cache", num_train_epochs=1)
    step = trainer.training_step
    trainer.training_step = lambda *a, **k: seen.append(libc.calls[-1]) or step(*a, **k)
    trainer.train()
    assert set(seen) == {(_TRIM_THRESHOLD, KEPT)} and libc.calls[-1] == ("trim", 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1000000"),
        ("MALLOC_MMAP_THRESHOLD_", "1000000"),
        ("MALLOC_TOP_PAD_", "1000000"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000000"),
    ],
)
def test_who_has_chosen_thresholds_keeps_them(name, value, monkeypatch):
    kept_memory._libc.cache_clear()
    monkeypatch.setenv(name, value)
    try:
        assert kept_memory._libc() is None
        with kept_memory.kept_memory():
            pass
    finally:
        monkeypatch.undo()
        kept_memory._libc.cache_clear()


def test_another_c_library_has_none(monkeypatch):
    class Musl:
        def __getattr__(self, name):
            raise AttributeError(name)

    kept_memory._libc.cache_clear()
    monkeypatch.setattr(kept_memory.ctypes, "CDLL", lambda name: Musl())
    try:
        assert kept_memory._libc() is None
    finally:
        kept_memory._libc.cache_clear()


def test_pages_stay(monkeypatch):
    """Of glibc itself: what is freed is still the process's, until the end."""
    if kept_memory._libc() is None:
        pytest.skip("no glibc")

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def churn():  # 160 MB in pieces below the threshold, as a step's activations
        kept = [torch.ones(2**21) for _ in range(20)]
        return len(kept)

    with kept_memory.kept_memory():
        churn()
        inside = resident()
    after = resident()
    assert inside - after > 100 * 2**20
