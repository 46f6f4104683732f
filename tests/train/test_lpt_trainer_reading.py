"""How LPTTrainer reads: ahead, on one thread that ends, or in the workers of a DataLoader."""

from __future__ import annotations

import pickle
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from lpt_fast import ActivationCache, PackedBatch
from lpt_fast.cache import CacheError, CorruptCacheError
from lpt_fast.train.cached_dataset import CachedDataset, PendingBatch, ReadAhead
from tests.cache.cached_texts import flip
from tests.train.cases import Stop, assert_same, cached, collate, model_of, rows, stock, trained


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if "lpt-fast" in t.name]


def on_disk(model, folder) -> ActivationCache:
    """(From memory a batch is read in less time than a thread takes to wake.)"""
    return ActivationCache.open(folder, model, store="fp32", tier="disk")


class Slow:
    """Notes when rows are read, by which thread; each read takes a moment."""

    def __init__(self, monkeypatch, seconds=0.0):
        self.events: list[str] = []
        self.names: set[str] = set()
        read = ActivationCache.reading_aside

        def reading_aside(cache):
            ask = read(cache)

            def noted(found, **how):
                self.names.add(threading.current_thread().name)
                self.events.append("begin")
                time.sleep(seconds)
                out = ask(found, **how)
                self.events.append("end")
                return out

            return noted

        monkeypatch.setattr(ActivationCache, "reading_aside", reading_aside)


@pytest.mark.slow
def test_batches_are_read_while_a_step_runs(tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    model = model_of()

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            slow.events.append("step")
            # The step waits here for the read that goes on beside it.
            wanted = min(state.global_step % 4 + 2, 4) + 4 * (state.global_step // 4)
            until = time.monotonic() + 20
            while slow.events.count("end") < wanted and time.monotonic() < until:
                time.sleep(0.001)
            assert slow.events.count("end") == wanted
            assert len(readers()) == 1

    cache = on_disk(model, tmp_path / "cache")
    trainer = cached(model, tmp_path, cache, callbacks=[Note()], num_train_epochs=2)
    trainer.train()
    assert slow.events.count("begin") == slow.events.count("step") == 8
    assert len(slow.names) == 1 and "lpt-fast cache reader" in next(iter(slow.names))
    assert not readers()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["stop", "error", "evaluation", "whole"])
def test_the_thread_ends_with_the_loop(tmp_path, end):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert readers()
            raise RuntimeError("somebody's own")

    class During(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if state.global_step < 12:
                assert readers()  # the training's is not ended by its evaluation

    callbacks = {"stop": Stop(2), "error": Fail(), "evaluation": During(), "whole": Stop(99)}
    more = {"eval_dataset": rows(9), "callbacks": [callbacks[end]]}
    more["eval_strategy"] = "epoch" if end == "evaluation" else "no"
    model = model_of()
    trainer = cached(model, tmp_path, on_disk(model, tmp_path / "cache"), **more)
    if end == "error":
        with pytest.raises(RuntimeError, match="somebody's own"):
            trainer.train()
    else:
        trainer.train()
    assert not readers()
    trainer.remove_callback(callbacks[end])
    trainer.evaluate()
    trainer.predict(rows(5))
    assert not readers()
    trainer.train()  # and once more
    assert not readers()


@pytest.mark.slow
def test_what_goes_wrong_on_the_thread_is_raised_as_itself(tmp_path):
    model = model_of()
    cache = on_disk(model, tmp_path / "cache")
    cache.ensure(model, rows())
    flip(tmp_path / "cache", cache, 7)
    trainer = cached(model, tmp_path, cache, num_train_epochs=1)
    with pytest.raises(CorruptCacheError, match="Row 7 of the cache .* does not match its hash"):
        trainer.train()
    assert not readers()


def test_pending_batches(tmp_path):
    model = model_of()
    cache = on_disk(model, tmp_path / "cache")
    numbers = cache.ensure(model, rows())
    ahead = ReadAhead()
    at_once = ahead.read(cache, numbers[:3], room=2)
    assert isinstance(at_once, PackedBatch) and at_once.room == 2
    with ahead.running():
        pending = ahead.read(cache, numbers[:3], room=2, dtype=torch.bfloat16)
        assert isinstance(pending, PendingBatch) and len(pending) == 3
        assert pending.to("cpu", non_blocking=True) is pending and pending.pin_memory() is pending
        assert pending.lengths.tolist() == cache.lengths[numbers[:3]].tolist()
        batch = pending.result()
        assert pending.result() is batch and batch.hidden.dtype == torch.bfloat16
        torch.testing.assert_close(batch.text(), at_once.text().bfloat16(), atol=0, rtol=0)
        # It is moved where accelerate wanted it.
        moved = ahead.read(cache, numbers[:3]).to("meta").result()
        assert moved.hidden.device.type == "meta"
        for tier in ("pinned", "page"):
            held = ActivationCache.open(tmp_path / "cache", model, store="fp32", tier=tier)
            batch = ahead.read(held, numbers[:3], room=2)
            assert isinstance(batch, PackedBatch) and torch.equal(batch.text(), at_once.text())
    assert not readers()


def test_batches_outside_of_a_loop(tmp_path):
    """Who goes through a DataLoader by hand gets batches that the model takes."""
    trainer = cached(model_of(), tmp_path, tmp_path / "cache", eval_dataset=rows(9))
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        for inputs in loader:
            assert isinstance(inputs["cached_hidden"], PackedBatch)
            assert trainer.model(**inputs).loss > 0
    assert not readers()


def test_workers(tmp_path):
    """Workers read by themselves, from files, on the CPU: forks of this process, and others, to
    which a pickle goes.
    """
    model = model_of()
    cache = ActivationCache.open(tmp_path / "cache", model, store="fp32", tier="pinned")
    trainer = cached(model, tmp_path, cache)
    _, keys = trainer._keys_of(trainer.train_dataset, trainer.train_dataset)
    collator = trainer._cached_collator(collate, cache)
    items = CachedDataset(rows(), keys)
    forks = DataLoader(items, 8, collate_fn=collator, num_workers=1, multiprocessing_context="fork")
    with trainer._ahead.running():
        others = DataLoader(items, 8, collate_fn=pickle.loads(pickle.dumps(collator)))
        for loader in (forks, others):
            for i, inputs in enumerate(loader):
                wanted, got = cache.read(keys[8 * i : 8 * i + 8], room=3), inputs["cached_hidden"]
                assert got.room == 3 and torch.equal(got.text(), wanted.text())
                labels = [row["labels"] for row in rows()[8 * i : 8 * i + 8]]
                assert inputs["labels"].tolist() == labels
            assert i == 3
    assert others.collate_fn.cache.plan.tier == "page"


def test_a_cache_that_is_opened_again(tmp_path):
    model = model_of()
    cache = ActivationCache.open(tmp_path / "cache", model, store="fp32", check="never")
    with pytest.raises(CacheError, match="holds no cache yet"):
        pickle.dumps(cache)
    numbers = cache.ensure(model, rows())
    for other in (cache.reopen(), pickle.loads(pickle.dumps(cache))):
        assert other is not cache and other.stats()["check"] == "never"
        assert other.plan.tier == "page" and other.identity.digest == cache.identity.digest
        keys = cache.table.key[numbers]
        got, wanted = other.read(keys), cache.read(numbers)
        torch.testing.assert_close(got.text(), wanted.text(), atol=0, rtol=0)


@pytest.mark.slow
def test_more_data_while_a_batch_waits(tmp_path):
    """An evaluation on new texts in the middle of an epoch: rows are added while one is read."""
    models = [model_of(), model_of()]

    class More(TrainerCallback):
        trainer = None

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step < 6:
                found = self.trainer.evaluate(rows(6, seed=50 + state.global_step))
                assert np.isfinite(found["eval_loss"])

    ends = []
    for make, model, more in (
        (stock, models[0], ()),
        (cached, models[1], (tmp_path / "cache",)),
    ):
        callback = More()
        callback.trainer = make(model, tmp_path, *more, callbacks=[callback])
        callback.trainer.train()
        ends.append(
            [e["eval_loss"] for e in callback.trainer.state.log_history if "eval_loss" in e]
        )
    np.testing.assert_allclose(*ends, rtol=1e-4)
    assert_same(trained(models[1]), trained(models[0]), atol=1e-6, rtol=1e-4)
    assert len(callback.trainer.open_cache()) > 32 and len(callback.trainer._rows) <= 8
