"""Where a training stands in its data, counted in examples: the same for any number of processes.

Transformers' Trainer counts batches. Where the number of processes changes between a stop and its
resume, and the batch that all share with it, it starts again at another example. And at the end of
an epoch Accelerate fills the last batch up with examples from its beginning, which so count twice,
with several processes alone. Here the order of an epoch depends on the seed alone, processes take
parts of one shared batch each, the last one is shared out as it is, and a checkpoint says how many
examples were trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

FILE = "lpt_cursor.json"
WEIGHT = "lpt_part_weight"  # of a part of a batch, among the inputs of a step


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file of a checkpoint; it has its name when all of it is there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(part, path)


@dataclass(frozen=True)
class Cursor:
    """What a checkpoint says.

    Attributes:
        seed: of the order of examples.
        count: examples of the data set.
        epoch: that is at work.
        examples: of it that were trained, the first ones of its order.
        batch: examples of an optimiser step, over all processes (informs only).
        processes: informs only.
        strategy: `train_sampling_strategy`, which the order depends on.
        grouped: examples of a group of like length, with that strategy; else 0.
    """

    seed: int
    count: int
    epoch: int
    examples: int
    batch: int
    processes: int
    strategy: str = "random"
    grouped: int = 0

    def write(self, folder: Path) -> None:
        """Writes the cursor beside a checkpoint's files."""
        write_json(folder / FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Cursor | None:
        """None where a checkpoint has none: the stock Trainer wrote it.

        Raises:
            ValueError: a file that is no cursor.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            cursor = cls(**json.loads(path.read_text(encoding="utf-8")))
            kinds = [type(value) for name, value in asdict(cursor).items() if name != "strategy"]
            if set(kinds) != {int} or not isinstance(cursor.strategy, str):
                raise TypeError("not whole numbers")
            if not 0 <= cursor.examples <= cursor.count or min(cursor.epoch, cursor.grouped) < 0:
                raise ValueError("out of range")
            if cursor.strategy == "group_by_length" and cursor.grouped == 0:
                raise ValueError("no size of a group")
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is no cursor of a training ({error}), expected what save_checkpoint "
                "wrote; resume from another checkpoint."
            ) from None
        return cursor


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a training that was written to its end; None where there is none.

    (`trainer_state.json` is what Trainer writes last. Of a process that died while it saved, there
    is a folder without, or half of one.)
    """
    found = []
    for path in Path(folder).expanduser().glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            step = int(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))
            state = json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            if state["global_step"] == step:
                found.append((step, path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(found)[1] if found else None


def is_numbered(dataset) -> bool:
    """Whether examples are taken by number, in an order that a sampler gives. Others come as a
    stream; one may know its length, and torch's have a `__getitem__` that only raises.
    """
    stream = isinstance(dataset, torch.utils.data.IterableDataset)
    return not stream and hasattr(dataset, "__getitem__") and has_length(dataset)


class Part(list):
    """Numbers of the examples that one process takes of a batch, and what its mean loss counts for
    (`weight`; 1 where all take equally many).
    """

    def __init__(self, examples, weight: float = 1.0):
        super().__init__(examples)
        self.weight = weight


class SharedBatches(Sampler[Part]):
    """Batches of one process, its part of each batch that all processes share.

    Args:
        count: examples of the data set.
        batch: examples that a process takes at a time.
        order: epoch -> the numbers of all examples, the same on every process.
        rank, processes: number of this process, and of all.
        accumulation: batches of an optimiser step.
        drop_last: leave out examples at the end that fill no shared batch.
        lengths: tokens of each example: those of an optimiser step are shared out anew among its
            batches, long ones together (Trainer's "batch_rebalance"); None: in their order.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        order: Callable[[int], np.ndarray],
        rank: int = 0,
        processes: int = 1,
        accumulation: int = 1,
        drop_last: bool = False,
        lengths: Sequence[int] | None = None,
    ):
        self.lengths = lengths
        self.count, self.shared, self.order = count, batch * processes, order
        self.rank, self.processes = rank, processes
        self.accumulation, self.drop_last = accumulation, drop_last
        self.epoch = 0
        self._begun = (0, 0, 0)  # epoch, examples, batches of it that were trained elsewhere

    @property
    def batch_sampler(self) -> SharedBatches:
        """Trainer looks for `set_epoch` here."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Says whose order is next."""
        self.epoch = epoch

    def _batches(self, examples: int) -> int:
        """Shared batches that so many examples make."""
        return examples // self.shared if self.drop_last else -(-examples // self.shared)

    def __len__(self) -> int:
        """Shared batches of a whole epoch."""
        return self._batches(self.count)

    @property
    def updates(self) -> int:
        """Optimiser steps of a whole epoch."""
        return max(1, -(-len(self) // self.accumulation))

    def resume(self, epoch: int, examples: int) -> int:
        """Lets an epoch go on after so many examples.

        Returns:
            Optimiser steps of that epoch that count as done: as many as leave enough for the rest.
        """
        rest = self._batches(self.count - examples)
        done = self.updates - -(-rest // self.accumulation)
        while done and len(self) - done * self.accumulation < rest:
            done -= 1  # no batch becomes larger than was asked for
        self._begun = (epoch, examples, done * self.accumulation)
        return done

    def trained(self, updates: int, epoch: int) -> int:
        """Examples of an epoch that were trained after so many of its optimiser steps."""
        edges = self._edges(epoch)
        return int(edges[min(updates * self.accumulation, len(edges) - 1)])

    def _edges(self, epoch: int) -> np.ndarray:
        """Where shared batches begin and end in the order of an epoch, int64 [batches + 1]. (Those
        before a resume are here for their number; nobody trains them again.)
        """
        total = self.count - self.count % self.shared if self.drop_last else self.count
        begun, start, done = self._begun
        if epoch != begun or start == 0:
            return np.minimum(np.arange(len(self) + 1) * self.shared, total)
        rest = self._batches(self.count - start)
        pieces = len(self) - done
        end = start + rest * self.shared if self.drop_last else total
        if rest == pieces:
            edges = np.minimum(start + np.arange(rest + 1) * self.shared, end)
        else:  # Trainer ends an epoch after a fixed number of batches: the rest in smaller ones
            edges = start + np.arange(pieces + 1) * (end - start) // max(1, pieces)
        return np.concatenate([np.full(done, start), edges])

    def __iter__(self) -> Iterator[Part]:
        order, edges = self.order(self.epoch), self._edges(self.epoch)
        if self.lengths is not None:
            yield from self._rebalanced(order, edges)
            return
        for a, b in pairwise(edges.tolist()):
            yield self._part(order, a, b)

    def _part(self, order: np.ndarray, a: int, b: int) -> Part:
        """This process's part of the batch a .. b of an order."""
        size = b - a
        parts = a + np.arange(self.processes + 1) * size // self.processes
        mine = order[parts[self.rank] : parts[self.rank + 1]].tolist()
        if mine:
            return Part(mine, len(mine) * self.processes / size)
        # All processes step together: an example that counts for nothing.
        return Part([int(order[min(a, self.count - 1)])], 0.0)

    def _rebalanced(self, order: np.ndarray, edges: np.ndarray) -> Iterator[Part]:
        """The examples of each optimiser step as Transformers' sampler shares them out; each
        example of a step counts the same.
        """
        for first in range(0, len(edges) - 1, self.accumulation):
            step = edges[first : first + self.accumulation + 1]
            mine, batches = order[step[0] : step[-1]].tolist(), len(step) - 1
            if len(mine) < batches * self.processes:
                yield from (self._part(order, a, b) for a, b in pairwise(step.tolist()))
                continue
            parts = BatchRebalanceSampler(
                [self.lengths[i] for i in mine],
                effective_batch_size=len(mine),
                dp_size=self.processes,
                grad_accum=batches,
                shuffle=False,
                rank=self.rank,
                drop_last=False,
            )
            for part in parts:
                weight = len(part) * self.processes * batches / len(mine)
                yield Part([mine[i] for i in part], weight)
