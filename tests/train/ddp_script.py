"""A training from a cache, on one process or as one of several, that says what it did: torchrun
starts it with a file of settings, tests call `train` in children.

    torchrun --nproc_per_node 2 tests/train/ddp_script.py settings.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import TrainerCallback, TrainingArguments

from bench.cluster.fault_worker import collate
from lpt_fast import LPTConfig, LPTTrainer
from lpt_fast.cache import ActivationCache
from lpt_fast.train.cursor import WEIGHT
from tests.cache.cases import SHARD_BYTES, K
from tests.tiny import VOCAB, tiny


def examples(count: int) -> list[dict]:
    """Different texts whose label is whether their second token is small."""
    own = torch.Generator().manual_seed(0)
    out = []
    for i in range(count):
        ids = torch.randint(3, VOCAB, (4 + i % 5,), generator=own).tolist()
        out.append({"input_ids": ids, "labels": int(ids[1] < 50)})
    assert len({tuple(example["input_ids"]) for example in out}) == count
    return out


def fill(root, count: int) -> None:
    """Computes the rows of all examples."""
    made = adapted()
    ActivationCache.open(root, made, store="fp32").ensure(
        made, examples(count), shard_bytes=SHARD_BYTES
    )


def adapted(**more):
    """The model, the same in every process; nothing in it is random in training. `more` is for the
    adapter's configuration.
    """
    base = tiny("bert", "SEQ_CLS")
    base.config.hidden_dropout_prob = base.config.classifier_dropout = 0.0
    torch.manual_seed(3)
    settings = {"bottleneck_size": 8, "num_virtual_tokens": 3, "prompt_dropout": 0.0}
    config = LPTConfig(
        task_type="SEQ_CLS", insertion_layer=K, upper_dropout=False, **settings | more
    )
    made = get_peft_model(base, config)
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return made


class Recording:
    """Notes the examples of every step that this process trains on (a mixin for trainers)."""

    def compute_loss(self, model, inputs, *args, **more):
        if model.training and inputs.get(WEIGHT, 1) != 0:
            batch = inputs["cached_hidden"]
            texts = [tuple(x.tolist()) for x in batch.input_ids.split(batch.lengths.tolist())]
            numbers = [self.number_of[text] for text in texts]
            self.seen.append([self.state.global_step, numbers])
        return super().compute_loss(model, inputs, *args, **more)


class CachedTrainer(Recording, LPTTrainer):
    pass


class StopAt(TrainerCallback):
    """Saves after a step, and ends there; each step takes a while where it is told to."""

    def __init__(self, step: int, pause: float, told: Path | None = None):
        self.step, self.pause, self.told = step, pause, told

    def on_step_end(self, args, state, control, **more):
        time.sleep(self.pause)
        if self.told is not None:
            self.told.write_text(str(state.global_step))
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def train(
    cache,
    out,
    count=50,
    batch=8,
    checkpoint=None,
    stop=0,
    pause=0.0,
    adapter=None,
    compute_dtype=None,
    **more,
) -> dict:
    """Trains two epochs, or goes on from a checkpoint.

    Args:
        cache: folder that holds the rows.
        out: folder of the run.
        count: examples.
        batch: of this process.
        checkpoint: to go on from.
        stop: step after which to save and end.
        pause: seconds after each step.
        adapter: more of its configuration.
        compute_dtype: of LPTTrainer.
        more: training arguments.
    """
    data = examples(count)
    adapted_model = adapted(**adapter or {})
    opened = ActivationCache.open(cache, adapted_model)

    settings = {"learning_rate": 5e-3, "num_train_epochs": 2, "logging_steps": 1, "seed": 7}
    settings |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    settings |= {"dataloader_pin_memory": False, "per_device_train_batch_size": batch, **more}
    if "WORLD_SIZE" in os.environ:
        settings["ddp_backend"] = "gloo"
    args = TrainingArguments(output_dir=str(out), **settings)
    told = Path(out) / "step" if args.process_index == 0 else None
    Path(out).mkdir(parents=True, exist_ok=True)
    trainer = CachedTrainer(
        adapted_model,
        args,
        data_collator=collate,
        train_dataset=data,
        activation_cache=opened,
        compute_dtype=compute_dtype,
        callbacks=[StopAt(stop, pause, told)],
    )
    trainer.seen, trainer.number_of = [], {tuple(e["input_ids"]): i for i, e in enumerate(data)}
    before = opened.stats()["rows_read"]
    trainer.train(resume_from_checkpoint=checkpoint)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rates": [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry],
        "seen": trainer.seen,
        "steps": trainer.state.global_step,
        "rows_read": opened.stats()["rows_read"] - before,
        "weights": {
            name: p.detach().flatten().tolist()
            for name, p in adapted_model.named_parameters()
            if p.requires_grad
        },
    }


def leave() -> None:
    """Together: gloo may abort a process whose peers close their connections while it works."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def as_rank(rank: int, world: int, port: int, say, settings: dict) -> None:
    """In a child: what torchrun would set, then the training."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    if world > 1:
        os.environ.update({name: str(value) for name, value in variables.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    say(train(**settings))
    if world > 1:
        leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.loads(Path(sys.argv[1]).read_text())
    result = train(**settings)
    name = f"rank{os.environ.get('RANK', 0)}.json"
    (Path(settings["out"]) / name).write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        leave()
