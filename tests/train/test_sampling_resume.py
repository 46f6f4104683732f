"""Every order of examples goes on exactly where it was stopped, or is refused by name."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from lpt_fast import LPTTrainer
from lpt_fast.train.cursor import FILE, SharedBatches
from tests.train.cases import Stop, arguments, assert_same, collate, model_of, rows, trained

STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")
SAVES = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2, "seed": 5}


class Watched(LPTTrainer):
    """Notes which examples train, by their first two tokens, which differ among all."""

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.seen: list[int] = []

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen += [100 * int(a) + int(b) for a, b in inputs["input_ids"][:, :2].tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


def numbered(n=50):
    """Texts of which number i begins with (10 + i // 40, 10 + i % 40)."""
    data = rows(n)
    for i, row in enumerate(data):
        row["input_ids"] = [10 + i // 40, 10 + i % 40, *row["input_ids"][2:]]
    return data


def trainer_of(model, folder, cls=Watched, callbacks=(), cache=None, **settings):
    settings = {**SAVES, **settings}
    more = {} if cache is None else {"activation_cache": cache}
    return cls(
        model,
        arguments(folder, **settings),
        collate,
        numbered(),
        callbacks=list(callbacks),
        **more,
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("steps", "accumulate"), [(9, 1), pytest.param(6, 2, marks=pytest.mark.slow)]
)
def test_every_example_trains_once_an_epoch(tmp_path, strategy, steps, accumulate):
    """50 examples, 8 at a time: 7 batches an epoch. Stopped in the middle of the second, after 9
    steps or after 6 of 2 batches.
    """
    settings = {"train_sampling_strategy": strategy, "gradient_accumulation_steps": accumulate}
    whole, first = model_of(dropout=0.3), model_of(dropout=0.3)
    second = model_of(dropout=0.3, seed=8)  # what is not restored would show
    a = trainer_of(whole, tmp_path / "a", **settings)
    a.train()
    b = trainer_of(first, tmp_path / "b", callbacks=[Stop(steps)], **settings)
    b.train()
    c = trainer_of(second, tmp_path / "b", **settings)
    c.train(resume_from_checkpoint=True)
    assert Counter(a.seen) == dict.fromkeys(set(a.seen), 2) and len(set(a.seen)) == 50
    assert b.seen + c.seen == a.seen
    assert_same(trained(second), trained(whole), atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_with_a_cache(tmp_path, strategy):
    models = [model_of(), model_of(), model_of(seed=8)]
    how = {"train_sampling_strategy": strategy, "cls": LPTTrainer, "cache": tmp_path / "cache"}
    trainer_of(models[0], tmp_path / "a", **how).train()
    trainer_of(models[1], tmp_path / "b", callbacks=[Stop(9)], **how).train()
    trainer_of(models[2], tmp_path / "b", **how).train(resume_from_checkpoint=True)
    assert_same(trained(models[2]), trained(models[0]), atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_with_another_batch_size(tmp_path, strategy):
    """3 steps of 8 examples are 24; the other 26 of the epoch follow, 5 at a time."""
    settings = {"train_sampling_strategy": strategy, "num_train_epochs": 1}
    first = trainer_of(model_of(), tmp_path, callbacks=[Stop(3)], **settings)
    first.train()
    settings["per_device_train_batch_size"] = 5
    second = trainer_of(model_of(), tmp_path, **settings)
    second.train(resume_from_checkpoint=True)
    assert (len(first.seen), len(second.seen)) == (24, 26)
    assert len({*first.seen, *second.seen}) == 50


def test_groups_are_of_like_length(tmp_path):
    """The order is that of Transformers' own function, drawn from the seed and the epoch."""
    settings = {"train_sampling_strategy": "group_by_length", "num_train_epochs": 1, "seed": 7}
    trainer = trainer_of(model_of(), tmp_path, **settings, save_strategy="no")
    trainer.train()
    data = numbered()
    lengths = [len(row["input_ids"]) for row in data]
    order = get_length_grouped_indices(lengths, 8, generator=torch.Generator().manual_seed(7))
    names = [100 * row["input_ids"][0] + row["input_ids"][1] for row in data]
    assert trainer.seen == [names[i] for i in order]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_rebalanced_batches(processes):
    """Each step holds the examples that it would hold in their order; each counts once in it."""
    lengths = [3 + (7 * i) % 11 for i in range(50)]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).numpy()

    def sampler(rank, lengths):
        return SharedBatches(50, 4, lambda epoch: order, rank, processes, 2, lengths=lengths)

    plain = [list(sampler(rank, None)) for rank in range(processes)]
    mine = [list(sampler(rank, lengths)) for rank in range(processes)]
    for first in range(0, len(plain[0]), 2):
        step = [part for parts in mine for part in parts[first : first + 2]]
        old = [part for parts in plain for part in parts[first : first + 2] if part.weight]
        counted = [i for part in step if part.weight for i in part]
        assert sorted(counted) == sorted(i for part in old for i in part)
        total = len(counted)
        batches = len(step) // processes
        for part in step:
            if part.weight:
                assert part.weight == pytest.approx(len(part) * processes * batches / total)
    assert {len(part) for part in mine[0]} != {len(part) for part in plain[0]}


def test_another_strategy_is_refused(tmp_path):
    trainer_of(model_of(), tmp_path, callbacks=[Stop(3)]).train()
    again = trainer_of(model_of(), tmp_path, train_sampling_strategy="group_by_length")
    message = "train_sampling_strategy random, got group_by_length, .*ignore_data_skip=True"
    with pytest.raises(ValueError, match=message) as error:
        again.train(resume_from_checkpoint=True)
    assert len(str(error.value)) - len(str(tmp_path)) <= 300


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_of_the_stock_trainer(tmp_path, strategy):
    """Orders that the seed gives go on; an order that nobody can draw again is refused in
    mid-epoch, but not at an epoch's end.
    """
    stock = {"cls": Trainer, "train_sampling_strategy": strategy}
    trainer_of(model_of(), tmp_path / "a", callbacks=[Stop(3)], **stock).train()
    assert not list((tmp_path / "a").rglob(FILE))
    again = trainer_of(model_of(), tmp_path / "a", train_sampling_strategy=strategy)
    if strategy in ("random", "sequential"):
        again.train(resume_from_checkpoint=True)
        assert len(again.seen) == 26 + 50 and Counter(again.seen).most_common(1)[0][1] == 2
        return
    with pytest.raises(ValueError, match=f"mid-epoch with train_sampling_strategy='{strategy}'"):
        again.train(resume_from_checkpoint=True)
    stock |= {"save_strategy": "epoch"}
    trainer_of(model_of(), tmp_path / "b", callbacks=[Stop(7)], **stock).train()
    again = trainer_of(model_of(), tmp_path / "b", train_sampling_strategy=strategy)
    again.train(resume_from_checkpoint=True)
    assert Counter(again.seen) == dict.fromkeys(set(again.seen), 1) and len(again.seen) == 50


def test_a_sampler_of_ones_own(tmp_path):
    """It is used, and where its order cannot be drawn again that is said."""

    class Own(Watched):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(train_dataset)

    first = trainer_of(model_of(), tmp_path, Own, [Stop(3)])
    first.train()
    assert first.seen == [1010 + i for i in range(24)]
    settings = {"train_sampling_strategy": "group_by_length"}
    with pytest.raises(ValueError, match="a sampler of one's own"):
        trainer_of(model_of(), tmp_path, Own, **settings).train(resume_from_checkpoint=True)


def test_a_cursor_that_is_none(tmp_path):
    trainer_of(model_of(), tmp_path, callbacks=[Stop(3)]).train()
    (path,) = tmp_path.rglob(FILE)
    content = json.loads(path.read_text())
    assert content["strategy"] == "random" and content["grouped"] == 0
    for change in ({"strategy": 3}, {"strategy": "group_by_length"}, {"grouped": -1}):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match="is no cursor of a training"):
            trainer_of(model_of(), tmp_path).train(resume_from_checkpoint=True)
    old = {name: content[name] for name in content if name not in ("strategy", "grouped")}
    path.write_text(json.dumps(old))
    again = trainer_of(model_of(), tmp_path)
    again.train(resume_from_checkpoint=True)
    assert len(again.seen) == 26 + 50
