"""One training on one, two and four processes: the same losses, rows shared out, and a run that is
stopped on some processes goes on on others with every example of the epoch once.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from lpt_fast.train.cursor import FILE, Cursor, SharedBatches, last_checkpoint
from tests.cache.cases import Child, say
from tests.train import ddp_script
from tests.train.ddp_script import adapted, as_rank, collate, examples, fill, train

COUNT, BATCH, STEPS = 50, 8, 7  # 7 batches of 8, the last of 2


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("ddp") / "cache"
    fill(root, COUNT)
    return root


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_child(rank, world, port, settings) -> None:
    as_rank(rank, world, port, say, settings)


def run(world: int, **settings) -> list[dict]:
    """What each of `world` processes says of a training."""
    port = free_port()
    children = [Child(on_child, rank, world, port, settings) for rank in range(world)]
    told = [child.wait(120) for child in children]
    assert [child.end() for child in children] == [0] * world
    return told


def launched(world: int, out: Path, **settings) -> list[dict]:
    """The same under torchrun."""
    out.mkdir(parents=True)
    file = out / "settings.json"
    file.write_text(json.dumps({**settings, "out": str(out)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(world), ddp_script.__file__, str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(world)]


def in_order(told: list[dict]) -> list:
    """What all processes trained on: step by step, in a step process by process."""
    return sorted(chain.from_iterable(one["seen"] for one in told), key=lambda seen: seen[0])


def epochs_of(told: list[dict], steps: int = STEPS) -> dict[int, list[int]]:
    """Numbers of the examples that all processes trained on, epoch by epoch, in order of steps."""
    out: dict[int, list[int]] = {}
    for step, numbers in in_order(told):
        out.setdefault(step // steps, []).extend(numbers)
    return out


def assert_close(told: dict, expected: dict) -> None:
    torch.testing.assert_close(
        torch.tensor(told["losses"]), torch.tensor(expected["losses"]), rtol=1e-5, atol=0
    )
    for name, values in expected["weights"].items():
        torch.testing.assert_close(
            torch.tensor(told["weights"][name]), torch.tensor(values), rtol=1e-4, atol=1e-6
        )


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """An undisturbed training on one process."""
    (told,) = run(1, cache=cache, out=tmp_path_factory.mktemp("whole"), count=COUNT, batch=BATCH)
    assert told["steps"] == 2 * STEPS and len(set(told["losses"])) == 2 * STEPS
    return told


@pytest.mark.slow
def test_one_process_trains_as_the_stock_trainer(whole, tmp_path):
    """On the text, with its own sampler: the same examples in the same order."""
    model = adapted()
    args = {"learning_rate": 5e-3, "num_train_epochs": 2, "logging_steps": 1, "seed": 7}
    args |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), **args, remove_unused_columns=False)

    trainer = Trainer(model, args, data_collator=collate, train_dataset=examples(COUNT))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(
        torch.tensor(whole["losses"]), torch.tensor(losses), rtol=1e-5, atol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_train_as_one(cache, whole, tmp_path, world):
    told = run(world, cache=cache, out=tmp_path, count=COUNT, batch=BATCH // world)
    assert_close(told[0], whole)
    assert epochs_of(told) == epochs_of([whole])
    assert sorted(epochs_of(told)[0]) == list(range(COUNT))
    for one in told:
        own = sum(len(numbers) for _, numbers in one["seen"])
        # Its own rows alone; in the last batch, of 2 texts, a process may take one for nothing.
        assert own <= one["rows_read"] <= own + 2
        assert abs(own - 2 * COUNT / world) <= 4
        assert one["losses"] == told[0]["losses"] and one["weights"] == told[0]["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"compute_dtype": "bfloat16"}, {"bf16": True}])
def test_bf16_on_several_processes(cache, whole, tmp_path, how):
    """Gradients of fp32 are averaged, and all processes stay one model."""
    (one,) = run(1, cache=cache, out=tmp_path / "one", count=COUNT, batch=BATCH, **how)
    told = run(2, cache=cache, out=tmp_path / "two", count=COUNT, batch=BATCH // 2, **how)
    assert told[1]["weights"] == told[0]["weights"] and told[1]["losses"] == told[0]["losses"]
    assert told[0]["losses"] == pytest.approx(one["losses"], abs=0.02)
    assert one["losses"] == pytest.approx(whole["losses"], abs=0.02)
    assert one["losses"] != whole["losses"] and epochs_of(told) == epochs_of([whole])


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["npg", "none"])
def test_late_lora_on_several_processes(cache, whole, tmp_path, generator):
    """Updates are averaged over processes as all that trains, from the cache of another adapter."""
    how = {"generator": generator, "lora_r": 2, "lora_target_modules": "all-linear"}
    how = {"cache": cache, "count": COUNT, "adapter": how}
    (one,) = run(1, out=tmp_path / "one", batch=BATCH, **how)
    told = run(2, out=tmp_path / "two", batch=BATCH // 2, **how)
    assert_close(told[0], one)
    assert told[1]["weights"] == told[0]["weights"]
    assert epochs_of(told) == epochs_of([one]) == epochs_of([whole])
    assert one["losses"][-1] != whole["losses"][-1]
    names = [name for name in one["weights"] if "lora_B" in name]
    assert len(names) == 2 * 6 and all(any(one["weights"][name]) for name in names)


@pytest.fixture(scope="module")
def stopped(cache, tmp_path_factory):
    """Under torchrun, on two processes, until after step 10: the third of the second epoch."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    told = launched(2, out, cache=str(cache), count=COUNT, batch=BATCH // 2, stop=10)
    assert told[0]["steps"] == 10
    cursor = Cursor.read(last_checkpoint(out))
    assert cursor == Cursor(seed=7, count=COUNT, epoch=1, examples=24, batch=8, processes=2)
    return told, out


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
def test_resuming_on_other_processes(cache, whole, stopped, tmp_path, world):
    before, out = stopped
    checkpoint = str(last_checkpoint(out))
    told = run(
        world, cache=cache, out=tmp_path, count=COUNT, batch=BATCH // world, checkpoint=checkpoint
    )
    assert_close(told[0], whole)
    assert epochs_of([*before, *told]) == epochs_of([whole])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "batch", "accumulation"), [(4, 4, 1), (1, 3, 1), (2, 3, 3)])
def test_resuming_with_another_batch(cache, whole, stopped, tmp_path, world, batch, accumulation):
    """More processes of the same batch each, or an odd size: the order goes on at the same
    example.
    """
    _, out = stopped
    settings = {"batch": batch, "gradient_accumulation_steps": accumulation}
    checkpoint = str(last_checkpoint(out))
    told = run(world, cache=cache, out=tmp_path, count=COUNT, checkpoint=checkpoint, **settings)
    order = epochs_of([whole])[1]
    rest = list(chain.from_iterable(numbers for _, numbers in in_order(told)))
    assert sorted(rest) == sorted(order[24:])
    assert accumulation > 1 or rest == order[24:]
    updates = -(-COUNT // (world * batch * accumulation))
    assert told[0]["steps"] == 2 * updates
    # The learning rate goes on along the same line, which falls to 0 at the end.
    first = told[0]["rates"][10]
    assert first == pytest.approx(
        5e-3 * (1 - (2 * updates - len(told[0]["losses"]) + 10) / (2 * updates))
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_other_orders_on_other_processes(cache, tmp_path, strategy):
    """Stopped on two processes in the middle of the second epoch, taken up by one."""
    how = {"cache": cache, "out": tmp_path, "count": COUNT, "train_sampling_strategy": strategy}
    before = run(2, batch=BATCH // 2, stop=10, **how)
    after = run(1, batch=BATCH, checkpoint=str(last_checkpoint(tmp_path)), **how)
    both = epochs_of([*before, *after])
    assert sorted(both[0]) == sorted(both[1]) == list(range(COUNT))
    assert both[0] != both[1] and after[0]["steps"] == 2 * STEPS


# -- the sampler and the cursor alone --------------------------------------------------------------


def sizes(dice, count: int, order: np.ndarray) -> tuple[list[SharedBatches], int, int]:
    """Samplers of all processes of some run, with its batch of each and its accumulation."""
    batch, world, accumulation = (int(dice.integers(1, most)) for most in (6, 5, 4))
    made = [
        SharedBatches(count, batch, lambda epoch: order, rank, world, accumulation)
        for rank in range(world)
    ]
    return made, batch, accumulation


def test_stopping_twice_with_any_sizes():
    """Each example once, in the order of the epoch, whatever the sizes of three runs are."""
    for seed in range(300):
        dice = np.random.default_rng(seed)
        count, epoch = int(dice.integers(1, 60)), int(dice.integers(0, 3))
        order, seen = dice.permutation(count), []
        for last in (False, False, True):
            ranks, batch, accumulation = sizes(dice, count, order)
            for sampler in ranks:
                sampler.set_epoch(epoch)
            done = {sampler.resume(epoch, len(seen)) for sampler in ranks}.pop()
            stop = ranks[0].updates if last else int(dice.integers(done, ranks[0].updates + 1))
            parts = [list(sampler) for sampler in ranks]
            assert {len(part) for part in parts} == {len(ranks[0])}
            for place in range(done * accumulation, min(stop * accumulation, len(ranks[0]))):
                together = [part[place] for part in parts]
                assert all(1 <= len(part) <= batch for part in together)
                new = [example for part in together if part.weight for example in part]
                seen += new
                total = sum(part.weight for part in together)
                assert total == pytest.approx(len(ranks) if new else 0)
            assert ranks[0].trained(stop, epoch) == len(seen)
        assert seen == order.tolist(), seed


def test_dropping_the_last_batch():
    order = np.arange(50)
    ranks = [SharedBatches(50, 4, lambda e: order, r, 2, drop_last=True) for r in (0, 1)]
    assert [len(sampler) for sampler in ranks] == [6, 6]
    assert sorted(chain(*ranks[0], *ranks[1])) == list(range(48))
    assert all(part.weight == 1 for part in ranks[0])


def test_a_cursor_that_is_none(tmp_path):
    assert Cursor.read(tmp_path) is None
    Cursor(seed=1, count=5, epoch=0, examples=3, batch=2, processes=1).write(tmp_path)
    assert Cursor.read(tmp_path).examples == 3
    good = json.loads((tmp_path / FILE).read_text())
    for bad in ({"examples": 6}, {"examples": "3"}, {"epoch": -1}, {"more": 1}):
        (tmp_path / FILE).write_text(json.dumps({**good, **bad}))
        with pytest.raises(ValueError, match="is no cursor of a training .* resume from another"):
            Cursor.read(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ValueError, match="is no cursor of a training"):
        Cursor.read(tmp_path)


@pytest.mark.slow
def test_another_seed_or_data_set_is_refused(cache, stopped, tmp_path):
    checkpoint = str(last_checkpoint(stopped[1]))
    with pytest.raises(ValueError, match="with the seed .* 7, got 8, with which examples would be"):
        train(cache, tmp_path, COUNT, checkpoint=checkpoint, seed=8)
    with pytest.raises(ValueError, match="with the number of examples 50, got 40"):
        train(cache, tmp_path, 40, checkpoint=checkpoint)


def test_the_last_checkpoint_is_one_that_was_finished(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "none") is None
    for step, text in ((5, '{"global_step": 5}'), (10, '{"global_step": 10}'), (15, '{"glo')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
