"""What the processes of the fault campaign do: fill a cache, or train from it, two together.

They are forks of a server that has imported everything, and may be killed at any moment. Models are
tiny; steps take a while, so that there are moments to be hit in.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

from lpt_fast import LPTConfig, LPTTrainer
from lpt_fast.cache import ActivationCache
from lpt_fast.cache.forward import Runner
from lpt_fast.train.cursor import last_checkpoint

from .two_machines import enter

TEXTS, TRAINED, K, WIDTH = 400, 120, 2, 32
SHARD_BYTES = 64 * WIDTH * 4  # of 64 tokens
EPOCHS, BATCH, SAVE = 2, 16, 3


@dataclass(frozen=True)
class Job:
    """What a process is to do.

    Attributes:
        what: "precompute" or "training".
        root: folder with `cache` and `run`.
        rank, world: of the process.
        address, port: of rank 0.
        machine: network namespace of the process, or None.
        patience: seconds to wait for others.
        pause: seconds that a step takes, at least.
    """

    what: str
    root: Path
    rank: int = 0
    world: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    machine: str | None = None
    patience: float = 600.0
    pause: float = 0.0


@cache
def examples() -> list[dict]:
    """Different texts of 1 .. 24 tokens, labelled."""
    own = torch.Generator().manual_seed(0)
    out = []
    for i in range(TEXTS):
        ids = torch.randint(3, 99, (2 + i * 7 % 23,), generator=own).tolist()
        out.append({"input_ids": [i % 90 + 5, i // 90 + 3, *ids], "labels": int(ids[0] < 50)})
    return out


def adapted():
    """The model, the same in every process. Nothing in its training is random but the order."""
    config = BertConfig(
        vocab_size=99,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    base = BertForSequenceClassification(config)
    with torch.no_grad():
        for p in base.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn_like(p) * 0.15)
    late = LPTConfig(
        task_type="SEQ_CLS",
        insertion_layer=K,
        generator="npg",
        num_virtual_tokens=3,
        bottleneck_size=8,
        prompt_dropout=0.0,
    )
    return get_peft_model(base, late)


def collate(rows: list[dict]) -> dict:
    """A padded batch."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    masks = [torch.ones_like(x) for x in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad(masks, batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def precompute(model, job: Job) -> ActivationCache:
    """Fills the cache with all texts."""
    opened = ActivationCache.open(job.root / "cache", model, store="fp32")
    opened.ensure(model, examples(), shard_bytes=SHARD_BYTES, batch_tokens=128)
    return opened


class Pause(TrainerCallback):
    """Lets every step take a while."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_step_end(self, args, state, control, **more):
        time.sleep(self.seconds)


def train(model, job: Job) -> dict:
    """Fills up what the cache lacks, trains from the last checkpoint on; losses and weights."""
    opened = precompute(model, job)
    run = job.root / "run"
    run.mkdir(exist_ok=True)
    more = {"ddp_backend": "gloo"} if job.world > 1 else {}
    args = TrainingArguments(
        str(run),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH // job.world,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="steps",
        save_steps=SAVE,
        save_total_limit=2,
        ddp_timeout=max(1, int(job.patience)),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )
    trainer = LPTTrainer(
        model,
        args,
        data_collator=collate,
        train_dataset=examples()[:TRAINED],
        activation_cache=opened,
        callbacks=[Pause(job.pause)],
    )
    trainer.log = lambda logs, *_: trainer.state.log_history.append(
        {**logs, "step": trainer.state.global_step}
    )
    kept = last_checkpoint(run)
    trainer.train(resume_from_checkpoint=None if kept is None else str(kept))
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": {
            name: p.detach().flatten().tolist()
            for name, p in model.named_parameters()
            if p.requires_grad
        },
        "from": 0 if kept is None else int(kept.name.split("-")[1]),
    }


def work(job: Job, pipe, log: str) -> None:
    """The body of a process: says "begun", then ("done", result) or ("failed", sentence)."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if job.machine is not None:
        enter(job.machine)
        os.environ["GLOO_SOCKET_IFNAME"] = "cable"
    if job.world > 1:
        variables = {"RANK": job.rank, "LOCAL_RANK": job.rank, "WORLD_SIZE": job.world}
        variables |= {"MASTER_ADDR": job.address, "MASTER_PORT": job.port}
        os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ["LPT_DEADLINE"] = str(job.patience)
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate asks for it
    torch.set_num_threads(1)
    model = adapted()
    run = Runner.run
    Runner.run = lambda *args, **more: (time.sleep(job.pause), run(*args, **more))[1]
    pipe.send(("begun", None))
    try:
        if job.what == "precompute":
            precompute(model, job)
            result = {}
        else:
            result = train(model, job)
    except BaseException as error:
        notes = getattr(error, "__notes__", [])
        text = " ".join([*str(error).split(), *notes])
        pipe.send(("failed", json.loads(json.dumps(f"{type(error).__name__}: {text}"))))
        raise
    pipe.send(("done", result))
