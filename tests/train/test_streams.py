"""Data that comes as a stream: it trains from the text, and a cache says what it wants instead."""

from __future__ import annotations

import datasets
import pytest
import torch
from transformers import Trainer

from lpt_fast import LPTTrainer
from lpt_fast.cache.errors import CacheError
from tests.train.cases import Stop, arguments, assert_same, collate, model_of, rows, trained


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows())


class Counted(Stream):
    """A stream that knows how long it is."""

    def __len__(self):
        return 32


class Bare:
    """Rows that can be walked through, and no class of torch's."""

    def __iter__(self):
        return iter(rows())


def stream_of(kind):
    if kind == "datasets":
        return datasets.IterableDataset.from_generator(lambda: iter(rows()))
    return {"torch": Stream, "counted": Counted}[kind]()


def trained_on(data, folder, cls=LPTTrainer, model=None, resume=None, callbacks=(), **more):
    model = model or model_of()
    args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=3)
    trainer = cls(model, args, collate, data, callbacks=list(callbacks), **more)
    trainer.train(resume_from_checkpoint=resume)
    return trained(model)


@pytest.mark.parametrize("kind", ["torch", "datasets", "counted"])
def test_a_stream_trains_as_with_the_stock_trainer(tmp_path, kind):
    stock = trained_on(stream_of(kind), tmp_path / "a", Trainer)
    assert_same(trained_on(stream_of(kind), tmp_path / "b"), stock, atol=0, rtol=0)
    start = trained(model_of())
    assert any(not torch.equal(start[name], stock[name]) for name in start)


def test_a_stream_goes_on_where_it_was(tmp_path):
    whole = trained_on(Stream(), tmp_path / "a")
    trained_on(Stream(), tmp_path / "b", callbacks=[Stop(3)])
    again = trained_on(Stream(), tmp_path / "b", model=model_of(seed=8), resume=True)
    assert_same(again, whole, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["torch", "datasets", "counted"])
def test_a_cache_needs_rows_by_number(tmp_path, kind):
    message = r"The data set is a \w+, expected one with a length whose rows can be taken by number"
    with pytest.raises(CacheError, match=message) as error:
        trained_on(stream_of(kind), tmp_path / "a", activation_cache=tmp_path / "cache")
    assert len(str(error.value)) <= 300
    trainer = LPTTrainer(model_of(), arguments(tmp_path), collate, activation_cache=tmp_path / "c")
    with pytest.raises(CacheError, match=message):
        trainer.evaluate(stream_of(kind))
