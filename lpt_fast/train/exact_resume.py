"""CountedTraining: a Trainer whose place in the data is a number of examples (cursor.py)."""

from __future__ import annotations

import os
from collections import deque
from datetime import timedelta
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from .cursor import WEIGHT, Cursor, Part, SharedBatches, is_numbered, last_checkpoint
from .training_record import RecordedTraining

_LOADER = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
_LOADER += ("prefetch_factor", "persistent_workers", "pin_memory_device", "in_order")
_STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")


def _of_network(error: RuntimeError) -> bool:
    """Whether other processes did not answer. (gloo has no error class of its own: "Application
    timeout caused pair closure", ".../gloo/...: Connection closed by peer [...]".)
    """
    words = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(
        sign in words for sign in ("gloo", "pair closure", "nccl", "connection closed")
    )


@cache
def _know_numbered_cpus() -> None:
    """Lets torch.load map to "cpu:0". (Accelerate numbers the CPUs of several processes, and
    older Transformers, 5.17 among them, ask for that when they go on from a checkpoint.)
    """
    torch.serialization.register_package(
        90,
        lambda storage: None,
        lambda storage, location: storage if location.startswith("cpu:") else None,
    )


class _Items(Dataset):
    """A data set that hands the weight of a part on with its examples."""

    def __init__(self, data):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        return self.data[index]

    def __getitems__(self, part: Part) -> tuple[list, float]:
        get = getattr(self.data, "__getitems__", None)
        items = [self.data[i] for i in part] if get is None else get(list(part))
        return items, part.weight


class _AheadLoader(DataLoader):
    """Makes a batch before the one ahead of it is used, as Accelerate's loaders do: rows of a cache
    are read meanwhile.

    Attributes:
        in_a_row: how many batches are made one after another. (Between two steps the processor has
            forgotten how it is done, and takes three times as long.)
    """

    in_a_row: int = 1

    def __iter__(self):
        batches, waiting = super().__iter__(), deque()
        while True:
            if len(waiting) < 2:
                waiting.extend(islice(batches, max(self.in_a_row, 2 - len(waiting))))
            if not waiting:
                return
            yield waiting.popleft()


class CountedTraining(RecordedTraining):
    """A mixin for `transformers.Trainer` (before it in the list of bases): resumes are counted in
    examples, so that another number of processes or another batch size goes on where a run ended,
    and every example of an epoch trains once.

    It acts where data sets have a length, with every `train_sampling_strategy`; elsewhere, and with
    a `_get_train_sampler` of somebody's own, all is as the Trainer does it.
    """

    _shared: SharedBatches | None = None
    _step_of_scheduler: int | None = None
    _lengths: list[int] | None = None  # tokens of each example, where the order asks for them
    _grouped: int = 0  # examples of a group whose lengths are alike

    def example_order(self, epoch: int) -> np.ndarray:
        """Numbers of all training examples in the order of an epoch: that of the stock Trainer on
        one process, which is drawn from the seed and the number of the epoch. (The stock Trainer
        draws groups of like length from the process's random state, which nobody can go back to.)
        """
        strategy, count = self.args.train_sampling_strategy, len(self.train_dataset)
        if strategy == "sequential":
            return np.arange(count)
        generator = torch.Generator().manual_seed(self._order_seed() + epoch)
        if strategy == "group_by_length":
            size = self._grouped
            return np.array(get_length_grouped_indices(self._lengths, size, generator=generator))
        return torch.randperm(count, generator=generator).numpy()

    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _counts(self) -> bool:
        config = self.args.accelerator_config
        return (
            is_numbered(self.train_dataset)
            and self.args.train_sampling_strategy in _STRATEGIES
            and type(self)._get_train_sampler is CountedTraining._get_train_sampler
            and not config.split_batches
            and not config.dispatch_batches
        )

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        self._lengths = getattr(sampler, "lengths", None)
        return sampler

    def shared_batches(self) -> SharedBatches:
        """The sampler of this process."""
        rebalances = self.args.train_sampling_strategy == "batch_rebalance"
        self._grouped = self._train_batch_size * self.args.gradient_accumulation_steps
        return SharedBatches(
            len(self.train_dataset),
            self._train_batch_size,
            self.example_order,
            self.args.process_index,
            self.args.world_size,
            self.args.gradient_accumulation_steps,
            self.args.dataloader_drop_last,
            self._lengths if rebalances else None,
        )

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's, with parts of batches that all processes share."""
        stock = super().get_train_dataloader()
        self._shared = None
        if not self._counts():
            return stock
        self._shared = self.shared_batches()
        collate = stock.collate_fn
        masks = self.model_accepts_loss_kwargs or self.compute_loss_func is not None

        def weighted(given: tuple[list, float]) -> dict[str, Any]:
            items, weight = given
            batch = collate(items)
            if weight != 1:
                batch = {**batch, WEIGHT: weight}
                if weight == 0 and masks:  # the Trainer divides by the number of labels of all
                    batch["labels"] = torch.full_like(batch["labels"], -100)
            return batch

        loader = _AheadLoader(
            _Items(stock.dataset),
            batch_sampler=self._shared,
            collate_fn=weighted,
            **{name: getattr(stock, name) for name in _LOADER if hasattr(stock, name)},
        )
        loader.in_a_row = self._batches_in_a_row(stock)
        return loader

    def _batches_in_a_row(self, stock: DataLoader) -> int:
        """How many batches of a DataLoader may be made before the first of them is used."""
        return 1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As Trainer's; a part of a batch counts by its examples."""
        weight = 1.0
        if WEIGHT in inputs:
            inputs = dict(inputs)
            kept = inputs.pop(WEIGHT)
            # Losses that are divided by the number of labels of all processes are right already.
            weight = 1.0 if num_items_in_batch is not None else float(kept)
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if weight == 1:
            return found
        return (found[0] * weight, *found[1:]) if return_outputs else found * weight

    # -- stopping and going on ---------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As Trainer's; a lost connection names the checkpoint to go on from."""
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            # As Trainer does with `output_dir`, in which checkpoints are.
            resume_from_checkpoint = os.path.expanduser(resume_from_checkpoint)
        dist = torch.distributed
        if self.args.use_cpu and dist.is_available() and dist.is_initialized():
            # (Transformers gives `ddp_timeout` to groups of GPUs alone; others wait 30 minutes.)
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.args.ddp_timeout))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except RuntimeError as error:
            if self.args.world_size > 1 and _of_network(error):
                kept = last_checkpoint(self.args.output_dir)
                error.add_note(
                    f"Process {self.args.process_index} of {self.args.world_size} lost the others "
                    f"after step {self.state.global_step}, expected an answer within "
                    f"{self.args.ddp_timeout} s (ddp_timeout); see whether they run and the "
                    "network holds, then start again, "
                    + ("from the beginning." if kept is None else f"from {kept}.")
                )
            raise

    def _save_rng_state(self, output_dir: str) -> None:
        # `trainer_state.json`, by which a checkpoint is known to be whole, comes after this: so the
        # cursor is there by then, and the state of every process, none of it in half.
        folder = Path(output_dir)
        part = folder / f"rng-{self.args.process_index}.part"
        super()._save_rng_state(str(part))
        for path in part.iterdir():
            os.replace(path, folder / path.name)
        part.rmdir()
        self._save_cursor(folder)
        if self.args.world_size > 1:
            torch.distributed.barrier()

    def _save_cursor(self, folder: Path) -> None:
        shared = self._shared
        if shared is None or not self.args.should_save:
            return
        epoch, updates = divmod(self.state.global_step, shared.updates)
        Cursor(
            seed=self._order_seed(),
            count=shared.count,
            epoch=epoch,
            examples=shared.trained(updates, epoch),
            batch=shared.shared * shared.accumulation,
            processes=shared.processes,
            strategy=self.args.train_sampling_strategy,
            grouped=self._grouped if self.args.train_sampling_strategy == "group_by_length" else 0,
        ).write(folder)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._step_of_scheduler = None
        shared = self._shared
        if resume_from_checkpoint is None or self.args.ignore_data_skip:
            return found
        cursor = None if shared is None else Cursor.read(Path(resume_from_checkpoint))
        if cursor is None:
            self._check_uncounted(resume_from_checkpoint, in_mid_epoch=found[1] > 0)
            return found
        here = {
            "seed (data_seed, or else seed)": (cursor.seed, self._order_seed()),
            "number of examples": (cursor.count, shared.count),
            "train_sampling_strategy": (cursor.strategy, self.args.train_sampling_strategy),
        }
        for what, (before, now) in here.items():
            if before != now:
                raise ValueError(
                    f"The checkpoint {resume_from_checkpoint} was trained with the {what} {before}"
                    f", got {now}, with which examples would be lost or repeated; give the same, "
                    "or ignore_data_skip=True to begin the epoch again."
                )
        self._grouped = cursor.grouped  # which the order depends on
        done = shared.resume(cursor.epoch, cursor.examples)
        step = cursor.epoch * shared.updates + done
        if step != self.state.global_step:  # the shared batch is another one now
            self.state.global_step = self._step_of_scheduler = step
        return cursor.epoch, done * shared.accumulation

    def _check_uncounted(self, checkpoint: str, in_mid_epoch: bool) -> None:
        """Of a checkpoint or a training that is not counted: refuses orders that nobody can draw
        again.
        """
        strategy = self.args.train_sampling_strategy
        redrawn = strategy in ("group_by_length", "batch_rebalance") and is_numbered(
            self.train_dataset
        )
        if in_mid_epoch and redrawn:
            why = "it does not say where it stands"
            if self._shared is None:
                why = "a sampler of one's own, split_batches and dispatch_batches are not counted"
            raise ValueError(
                f"The checkpoint {checkpoint} is of mid-epoch with train_sampling_strategy="
                f"{strategy!r}, expected one of an epoch's end ({why}): examples would be lost and "
                "repeated; give ignore_data_skip=True to begin the epoch again."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.args.device.type == "cpu":
            _know_numbered_cpus()
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        if self._step_of_scheduler is None or not isinstance(
            scheduler, torch.optim.lr_scheduler.LambdaLR
        ):
            return
        # As far along its curve as before, in steps of the new size.
        scheduler.last_epoch = self._step_of_scheduler - 1
        scheduler.step()
