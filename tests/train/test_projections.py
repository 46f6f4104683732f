"""Queries, keys and values that are held: the numbers of a step that computes them itself, and held
only where that is of use and there is room.
"""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from lpt_fast import ActivationCache, LPTTrainer
from lpt_fast.backbone.families import find_backbone
from lpt_fast.cache import planner
from lpt_fast.packed import ops as packed_ops
from lpt_fast.packed import stack as packed
from lpt_fast.train.projections import Projections
from lpt_fast.train.trainer import find_late_prompt
from tests.packed.cases import assert_same, labels_for, outcome, pair, still
from tests.packed.test_packed import DECODERS, ENCODERS
from tests.tiny import LAYERS
from tests.train.cases import K, arguments, cached, model_of, rows, trained
from tests.train.cases import assert_same as assert_same_weights

IDS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16, 17, 18], [8, 9, 10, 11, 12, 13]]
EXAMPLES = [{"input_ids": ids} for ids in IDS]


def filled(model, folder, store="fp32", examples=EXAMPLES):
    opened = ActivationCache.open(folder, model, store=store)
    numbers = opened.ensure(model, examples)
    return opened, opened.table.key[numbers]


def batches(model, opened, keys, order, room=3, **how):
    """The texts in an order, without and with their projections."""
    late = find_late_prompt(model)
    late.upper = "packed"
    batch = opened.read(keys[order], room=room, **how)
    held = Projections(late, opened, keys).of(keys[order])
    return batch, replace(batch, held=held)


@pytest.fixture
def projected(monkeypatch) -> list[int]:
    """How many rows each first layer projected."""
    seen, run = [], packed_ops.FromPrompts.forward

    def forward(ctx, x, project, project_backward, plan, held=None, reads=True):
        def counted(x, rows):
            seen.append(len(x))
            return project(x, rows)

        return run(ctx, x, counted, project_backward, plan, held, reads)

    monkeypatch.setattr(packed_ops.FromPrompts, "forward", forward)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, LAYERS - 2])
@pytest.mark.parametrize("head", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_equals_projecting_in_the_step(family, head, k, tmp_path, projected):
    # (In double precision: what is not a matter of rounding is equal to twelve digits.)
    model = still(pair(family, head, torch.float64, k=k, num_virtual_tokens=3)[1])
    opened, keys = filled(model, tmp_path)
    for order in ([0, 1, 2, 3], [4, 2, 0], [3]):
        batch, held = batches(model, opened, keys, order)
        call = labels_for(head, {"attention_mask": batch.mask().long()})
        call["at"] = batch.mask() if head == "TOKEN_CLS" else None
        expected = outcome(model, "packed", cached_hidden=batch, **call)
        assert projected.pop() == len(batch.hidden) and not projected
        got = outcome(model, "packed", cached_hidden=held, **call)
        assert projected.pop() == 3 * len(order) and not projected
        assert_same(got, expected, 1e-12)
        torch.testing.assert_close(got[1], expected[1], atol=1e-12, rtol=1e-12)
        # Another time: nothing that is held was written to.
        assert_same(outcome(model, "packed", cached_hidden=held, **call), got, 1e-12)
        assert_same(outcome(model, "padded", cached_hidden=held, **call), expected, 1e-12)
        projected.clear()


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_positions_of_the_texts(family, tmp_path):
    """Where texts come with positions of their own."""
    model = still(pair(family, "SEQ_CLS", k=1, num_virtual_tokens=3)[1])
    examples = [{"input_ids": ids, "position_ids": [7 + i for i in range(len(ids))]} for ids in IDS]
    opened, keys = filled(model, tmp_path, examples=examples)
    batch, held = batches(model, opened, keys, [1, 0, 3])
    call = {"labels": torch.tensor([0, 1, 1])}
    expected = outcome(model, "packed", cached_hidden=batch, **call)
    assert_same(outcome(model, "packed", cached_hidden=held, **call), expected)


def test_what_was_computed_for_something_else_is_not_taken(tmp_path, projected):
    model = still(pair("llama", "SEQ_CLS", k=1, num_virtual_tokens=3)[1])
    opened, keys = filled(model, tmp_path)
    batch, held = batches(model, opened, keys, [0, 1])
    outcome(model, "packed", cached_hidden=held)
    assert projected.pop() == 6
    with torch.no_grad():
        for other in (replace(held.held, kind=(*held.held.kind[:3], 4)),):
            model(cached_hidden=replace(held, held=other))
            assert projected.pop() == len(batch.hidden)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(cached_hidden=held).logits
            assert projected.pop() == len(batch.hidden)
            torch.testing.assert_close(got, model(cached_hidden=batch).logits, atol=0, rtol=0)


def test_under_autocast(tmp_path, projected):
    """Made under autocast they are for steps under autocast, in its dtype."""
    model = still(pair("bert", "SEQ_CLS", k=1, num_virtual_tokens=3)[1])
    opened, keys = filled(model, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        batch, held = batches(model, opened, keys, [0, 1, 3])
    assert {t.dtype for t in held.held.tables} == {torch.bfloat16}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, got = (model(cached_hidden=b).logits for b in (batch, held))
        assert projected == [len(batch.hidden), 9]
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)
        projected.clear()
    with torch.no_grad():
        model(cached_hidden=held)
    assert projected == [len(batch.hidden)]


def test_texts_once_and_only_those_that_are_asked_for(tmp_path):
    model = pair("bert", "SEQ_CLS", k=1)[1]
    opened, keys = filled(model, tmp_path)
    held = Projections(find_late_prompt(model), opened, keys[[4, 0, 1]])
    assert [len(t) for t in held.tables] == [9] * 3  # texts 1 and 4 are one
    assert held.bytes == sum(t.nbytes for t in held.tables)
    assert held.of(keys[[0, 1]]).begins.tolist() == [6, 0]
    assert held.of(keys[[0, 3]]) is None
    with pytest.raises(ValueError, match=r"of 2 texts take 3,456 bytes, expected at most 3,455;"):
        Projections(find_late_prompt(model), opened, keys[:2], 3455)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"insertion_layer": LAYERS - 1}, f"layer {LAYERS} is the last one"),
        ({"upper": "padded"}, "upper is 'padded'"),
        ({"upper_dropout": True}, "active dropout"),
    ],
)
def test_of_no_use(tmp_path, config, words, caplog):
    dropout = 0.1 if "upper_dropout" in config else 0.0
    model = model_of(dropout=dropout, **config)
    trainer = cached(model, tmp_path, tmp_path / "cache", hold_projections=True)
    with pytest.raises(ValueError, match=f"of no use, expected layers that .*{words}"):
        trainer.train()
    caplog.set_level(logging.INFO, logger="lpt_fast.train.projections")
    cached(model, tmp_path, tmp_path / "cache", num_train_epochs=1).train()
    assert words in caplog.text


# -- LPTTrainer ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "half"), [(0, False), (2, False), (0, True)])
def test_training(tmp_path, projected, workers, half, caplog):
    """Held and not held, in fp32 and under the Trainer's autocast: one training. Worker processes
    make batches without, so nothing is held for them.
    """
    caplog.set_level(logging.INFO, logger="lpt_fast.train.projections")
    # (In bf16 a text more, of zeros, makes a round number of rows: `with_filler`.)
    weights, prompts = {}, (9 if half else 8) * 3
    for hold in (None if workers else True, False, None):
        model = model_of()
        trainer = cached(
            model, tmp_path, tmp_path / "cache",
            eval_dataset=rows(9, seed=2), eval_strategy="epoch", per_device_eval_batch_size=9,
            hold_projections=hold, dataloader_num_workers=workers, bf16=half,
        )  # fmt: skip
        trainer.train()
        weights[hold] = trained(model)
        used = hold is not False and workers == 0
        steps, own = [n for n in projected if n > 9 * 3], projected.count(prompts)
        assert own == (12 if used else 0)
        assert len(steps) == (3 if used else 15)  # evaluations run without
        projected.clear()
    held = caplog.text.count("Projections of the training texts are held: ")
    assert held == (0 if workers else 2)
    close = {"atol": 2e-2, "rtol": 5e-2} if half else {"atol": 1e-6, "rtol": 1e-4}
    assert_same_weights(weights[None], weights[False], **close)
    assert_same_weights(weights[None], weights.get(True, weights[None]), atol=0, rtol=0)


@pytest.mark.slow
def test_nothing_is_held_after_training(tmp_path, monkeypatch):
    """Nor twice in the next one: the Trainer and its DataLoader live on."""
    made, alive = [], []
    plain = Projections.__init__

    def init(self, *args, **kwargs):
        gc.collect()
        alive.append(sum(one() is not None for one in made))
        made.append(weakref.ref(self))
        plain(self, *args, **kwargs)

    monkeypatch.setattr(Projections, "__init__", init)
    trainer = cached(model_of(), tmp_path, tmp_path / "cache", num_train_epochs=1)
    for _ in range(2):
        trainer.train()
        gc.collect()
        assert made[-1]() is None
    assert alive == [0, 0]
    trainer.get_train_dataloader()  # outside of training none are made
    assert len(made) == 2


@pytest.mark.slow
def test_no_room(tmp_path, monkeypatch, projected, caplog):
    monkeypatch.setattr(planner.psutil, "virtual_memory", lambda: Memory())
    caplog.set_level(logging.INFO, logger="lpt_fast.train.projections")
    model = model_of()
    cached(model, tmp_path, tmp_path / "cache", num_train_epochs=1).train()
    assert "Projections of 32 texts take " in caplog.text and 24 not in projected


class Memory:
    total = available = 80


def test_only_on_the_cpu_as_it_is(tmp_path):
    model = model_of()
    opened, keys = filled(model, tmp_path / "cache")
    trainer = cached(model, tmp_path, opened)
    assert trainer._projections(opened, keys).of(keys) is not None
    for name, value, words in (
        ("torch_compile", True, "torch_compile=True and dataloader_num_workers=0, exp"),
        ("dataloader_num_workers", 2, "torch_compile=False and dataloader_num_workers=2, exp"),
    ):
        before = getattr(trainer.args, name)
        setattr(trainer.args, name, value)
        trainer.hold_projections = True
        with pytest.raises(ValueError, match=f"`hold_projections` is True on 'cpu' with {words}"):
            trainer._projections(opened, keys)
        trainer.hold_projections = None
        assert trainer._projections(opened, keys) is None
        setattr(trainer.args, name, before)


def test_there_has_to_be_a_cache(tmp_path):
    with pytest.raises(ValueError, match="`hold_projections` is True without `activation_cache`"):
        LPTTrainer(model_of(), arguments(tmp_path), hold_projections=True)


def test_no_texts(tmp_path):
    model = model_of()
    opened, keys = filled(model, tmp_path)
    held = Projections(find_late_prompt(model), opened, keys[:0])
    assert held.bytes == 0 and held.of(keys[:1]) is None


def test_several_processes_read_their_own_rows_alone(tmp_path, monkeypatch):
    model = model_of()
    opened, keys = filled(model, tmp_path / "cache")
    trainer = cached(model, tmp_path, opened)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    assert trainer._projections(opened, keys) is None
    trainer.hold_projections = True  # asked for
    assert trainer._projections(opened, keys) is not None


def test_a_wrong_row_would_show(tmp_path):
    """That the comparison above can fail."""
    model = still(pair("bert", "SEQ_CLS", k=1, num_virtual_tokens=3)[1])
    opened, keys = filled(model, tmp_path)
    batch, held = batches(model, opened, keys, [0, 1, 3])
    wrong = replace(held, held=replace(held.held, begins=held.held.begins.flip(0)))
    expected = outcome(model, "packed", cached_hidden=batch)
    with pytest.raises(AssertionError):
        assert_same(outcome(model, "packed", cached_hidden=wrong), expected)


def test_project_first_is_what_the_model_projects(tmp_path):
    """Against the model's own modules."""
    model = pair("roberta", "SEQ_CLS", k=K)[1]
    _, backbone, family = find_backbone(model)
    x = torch.randn(4, backbone.config.hidden_size)
    own = backbone.encoder.layer[K].attention.self
    made = packed.project_first(backbone, family, K, x, None)
    for got, module in zip(made, (own.query, own.key, own.value), strict=True):
        np.testing.assert_allclose(got.detach(), module(x).detach(), atol=1e-6)


# -- GELU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_in_less(dtype):
    """Equal to PyTorch's own backward to the bit, written in place or not."""
    x = torch.randn(64, 48).to(dtype).requires_grad_()
    pull = torch.randn(64, 48).to(dtype)
    (want,) = torch.autograd.grad(torch.nn.functional.gelu(x), x, pull)
    (found,) = torch.autograd.grad(packed_ops.activation(ACT2FN["gelu"], x), x, pull.clone())
    torch.testing.assert_close(found, want, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_gelu(name):
    """Value and gradient are those of the model's own module, also of gradients that nobody may
    write to.
    """
    act = ACT2FN[name]
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    expected = act(x)
    pull = torch.randn(5, 7, dtype=torch.float64).t()
    for grad in (pull, pull.contiguous(), torch.ones(1, dtype=torch.float64).expand(7, 5)):
        kept = grad.clone()
        (want,) = torch.autograd.grad(expected, x, grad, retain_graph=True)
        got = packed_ops.activation(act, x)
        torch.testing.assert_close(got, expected, atol=1e-14, rtol=1e-14)
        (found,) = torch.autograd.grad((2 * got), x, grad)  # whose gradient is the step's own
        torch.testing.assert_close(found, 2 * want, atol=1e-12, rtol=1e-12)
        if not grad.is_contiguous():
            torch.autograd.grad(packed_ops.activation(act, x), x, grad)
        torch.testing.assert_close(grad, kept, atol=0, rtol=0)
