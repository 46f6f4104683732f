"""A frozen backbone in parts on two processes (gloo, CPU) trains as the whole one does."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import TrainingArguments

from lpt_fast import LPTTrainer
from lpt_fast.backbone.families import find_backbone, get_layers
from lpt_fast.cache import ActivationCache, CacheError
from lpt_fast.train.fsdp import is_sharded, layers_to_shard, shard_frozen
from tests.cache.cases import SHARD_BYTES, Child, say
from tests.tiny import tiny
from tests.train.ddp_script import adapted, collate, examples
from tests.train.test_ddp_training import free_port

STEPS = 4


def trained(model, out, batch, **named) -> dict:
    """A few steps, a checkpoint after every other, an evaluation."""
    more = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    args = TrainingArguments(
        str(out),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        learning_rate=5e-3,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )
    trainer = LPTTrainer(model, args, data_collator=collate, train_dataset=examples(48), **named)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": losses,
        "evaluated": trainer.evaluate(examples(16))["eval_loss"],
        "weights": [p.detach().flatten().tolist() for p in model.parameters() if p.requires_grad],
    }


def sharded(rank, port, out, config) -> None:
    """In a child: one of two processes."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.distributed.init_process_group("gloo")
    model = shard_frozen(adapted(**config))
    own = sum(p.to_local().numel() for p in model.parameters() if is_sharded(p))
    all_ = sum(p.numel() for p in model.parameters() if is_sharded(p))
    whole = [n for n, p in model.named_parameters() if not is_sharded(p) and not p.requires_grad]
    told = trained(model, out, batch=4)
    left = sum(p.to_local().numel() for p in model.parameters() if is_sharded(p))
    say({**told, "own": own, "all": all_, "whole": whole, "left": left})
    torch.distributed.destroy_process_group()


LORA = {"lora_r": 2, "lora_target_modules": "all-linear"}


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, LORA, {**LORA, "generator": "none"}])
def test_two_processes_with_a_part_each(tmp_path, config):
    expected = trained(adapted(**config), tmp_path / "one", batch=8)
    port = free_port()
    children = [Child(sharded, rank, port, tmp_path / "two", config) for rank in range(2)]
    told = [child.wait(60) for child in children]
    assert [child.end() for child in children] == [0, 0]
    for one in told:
        torch.testing.assert_close(
            torch.tensor(one["losses"]), torch.tensor(expected["losses"]), rtol=1e-5, atol=0
        )
        assert one["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5)
        for got, want in zip(one["weights"], expected["weights"], strict=True):
            torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=1e-6)
        # Half of every layer, before the training and after it. What stays whole: position and
        # type embeddings and their norm, and what PEFT keeps of the head as it was.
        assert 0.4 < one["own"] / one["all"] < 0.6 and one["left"] == one["own"]
        assert one["whole"]
        for name in one["whole"]:
            assert "embeddings" in name or "original_module" in name
    assert told[0]["own"] + told[1]["own"] == told[0]["all"]
    assert (tmp_path / "two" / "checkpoint-4" / "adapter_model.safetensors").exists()


def test_what_is_sharded():
    model = adapted()
    _, backbone, family = find_backbone(model)
    words = backbone.get_input_embeddings()
    assert layers_to_shard(model) == [*get_layers(backbone, family), words]
    get_layers(backbone, family)[3].requires_grad_(True)
    assert layers_to_shard(model) == [*get_layers(backbone, family)[:3], words]
    # The head of a language model reads the same weight beside its module.
    gpt2 = tiny("gpt2", "CAUSAL_LM", tie_word_embeddings=True).requires_grad_(False)
    assert len(layers_to_shard(gpt2)) == 4


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="found no process group, expected one; start with"):
        shard_frozen(adapted())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="found no layer whose weights are all frozen"):
        shard_frozen(tiny("bert").requires_grad_(True))


def filled_in_parts(rank, port, root) -> None:
    """In a child: fills a cache with a model in parts, and trains from one of a whole model."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", LPT_DEADLINE="20")
    torch.distributed.init_process_group("gloo")
    model = shard_frozen(adapted())
    with pytest.raises(CacheError, match="store is int8c, whose scales one process computes"):
        ActivationCache.open(root / "c", model, store="int8c").build(model, examples(48))
    new = ActivationCache.open(root / "new", model, store="fp32")
    report = new.build(model, examples(48), shard_bytes=SHARD_BYTES, batch_tokens=16)
    old = ActivationCache.open(root / "old", model, store="fp32")
    before = len(old)
    told = trained(model, root / "run", batch=4, activation_cache=old)
    say({**told, "computed": report.computed, "new": len(new), "grown": len(old) - before})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_cache_and_a_model_in_parts(tmp_path):
    """It has the identity of the whole model, and fills a cache with the same rows."""
    whole = adapted()
    expected = trained(whole, tmp_path / "one", batch=8)
    with ActivationCache.open(tmp_path / "old", whole, store="fp32") as old:
        rows = old.ensure(whole, examples(48), shard_bytes=SHARD_BYTES)
        want = old.read(rows).hidden
    port = free_port()
    children = [Child(filled_in_parts, rank, port, tmp_path) for rank in range(2)]
    told = [child.wait(60) for child in children]
    assert [child.end() for child in children] == [0, 0]
    assert sum(one["computed"] for one in told) == 48
    assert [(one["new"], one["grown"]) for one in told] == [(48, 0)] * 2
    for one in told:
        torch.testing.assert_close(
            torch.tensor(one["losses"]), torch.tensor(expected["losses"]), rtol=1e-5, atol=0
        )
    with ActivationCache.open(tmp_path / "new", whole, store="fp32") as new:
        got = new.read(new.rows(examples(48))).hidden
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
