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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Sampler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

FILE = "lpt_cursor.json"
WEIGHT = "lpt_part_weight"  # of a part of a batch, among the inputs of a step


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
    """

    seed: int
    count: int
    epoch: int
    examples: int
    batch: int
    processes: int

    def write(self, folder: Path) -> None:
        """Writes the cursor beside a checkpoint's files."""
        path = folder / FILE
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
        os.replace(part, path)

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
            if not all(type(value) is int for value in asdict(cursor).values()):
                raise TypeError("not whole numbers")
            if not 0 <= cursor.examples <= cursor.count or cursor.epoch < 0:
                raise ValueError("out of range")
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
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            step = int(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))
            state = json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            if state["global_step"] == step:
                found.append((step, path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(found)[1] if found else None


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
    ):
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
        for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            size = b - a
            parts = a + np.arange(self.processes + 1) * size // self.processes
            mine = order[parts[self.rank] : parts[self.rank + 1]].tolist()
            if mine:
                yield Part(mine, len(mine) * self.processes / size)
            else:  # all processes step together: an example that counts for nothing
                yield Part([int(order[min(a, self.count - 1)])], 0.0)
