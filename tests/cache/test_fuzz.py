"""The fuzzer of bench/cache/fuzz.py, for a few seconds."""

from __future__ import annotations

import logging
from functools import partial

import pytest

from bench.cache import fuzz as cache_fuzz


@pytest.fixture
def samples(caplog):
    caplog.set_level(logging.CRITICAL, "lpt_fast")
    with cache_fuzz.made_samples() as made:
        yield made


@pytest.mark.slow
def test_mutations_at_random(samples):
    told = []
    counts = cache_fuzz.fuzz(samples, range(20_000), seed=1, seconds=12, tell=told.append)
    assert not counts["findings"], told
    assert counts["refused"] > 1000 and counts["harmless"] > 100


@pytest.mark.slow
def test_the_fuzzer_finds_what_is_wrong(samples, monkeypatch):
    """Without the hashes of rows, it sees other bits; and it is not held up by a hang."""
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(cache_fuzz, "RowReader", partial(cache_fuzz.RowReader, check="never"))
        counts = cache_fuzz.fuzz(samples, range(600), seed=1, tell=told.append)
    assert counts["findings"] == len(told) > 1 and "other bits" in " ".join(told)
    with monkeypatch.context() as patch:
        patch.setattr(cache_fuzz, "SECONDS", 0.05)
        patch.setattr(cache_fuzz, "open_parts", lambda path: [0 for _ in iter(int, 1)])
        counts = cache_fuzz.fuzz(samples, range(1, 3), seed=1, tell=told.append)
    assert counts["findings"] == 2 and "Hang" in told[-1]
    assert cache_fuzz.main(["--mutations", "300"]) == 0
