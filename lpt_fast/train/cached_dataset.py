"""Examples of a data set with the keys of their rows in a cache; rows that are read ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset

from ..cache import ActivationCache
from ..packing import PackedBatch
from .projections import HeldRows

# What a model takes of a text, and what a batch of a cache stands in for.
TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class TextsOf(Dataset):
    """The texts of a data set, without the columns that the model will not be given.

    Args:
        dataset: examples by number.
        names: of TEXT, those that are kept.
    """

    def __init__(self, dataset, names: Sequence[str]):
        self.dataset, self.names = dataset, names

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        example = self.dataset[index]
        if not isinstance(example, Mapping):
            return example  # the cache says what it is
        return {name: example[name] for name in self.names if name in example}


class CachedDataset(Dataset):
    """Examples with the keys of their rows: item i is (uint64 [2], example i).

    Args:
        dataset: examples by number.
        keys: uint64 [N, 2]. (Keys and not numbers: another process may number rows otherwise.)
    """

    def __init__(self, dataset, keys: np.ndarray):
        self.dataset, self.keys = dataset, keys

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.keys[index], self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list:
        # (datasets.Dataset fetches a batch faster than its examples.)
        if hasattr(self.dataset, "__getitems__"):
            examples = self.dataset.__getitems__(indices)
        else:
            examples = [self.dataset[i] for i in indices]
        return list(zip(self.keys[indices], examples, strict=True))


class PendingBatch:
    """A batch of a cache that is being read on another thread.

    Attributes:
        lengths: int64 [B], tokens of each text.
        held: their projections, or None.
    """

    held: HeldRows | None = None

    def __init__(self, future: Future, lengths: np.ndarray):
        self._future, self.lengths = future, lengths
        self._device: torch.device | None = None
        self._batch: PackedBatch | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max())

    def to(self, device, **kwargs) -> PendingBatch:
        """Notes where the batch is wanted. (accelerate calls this where it would move a tensor.)"""
        self._device = torch.device(device)
        return self

    def pin_memory(self) -> PendingBatch:
        """Itself: the reader's memory is page-locked where it goes to a GPU."""
        return self

    def result(self) -> PackedBatch:
        """The batch; waits for it. What went wrong on the other thread is raised here."""
        if self._batch is None:
            batch = self._future.result()()
            if self.held is not None:
                batch = replace(batch, held=self.held)
            if self._device is not None:
                batch = batch.to(self._device, non_blocking=True)
            self._batch = batch
        return self._batch


class ReadAhead:
    """Reads batches on one thread, in the order in which they are asked for.

    The thread lives while `running` is entered; outside, and where they come out of memory, batches
    are read where they are asked for.
    """

    def __init__(self):
        self._depth = 0
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._ask: dict[int, tuple[ActivationCache, Callable]] = {}

    @contextmanager
    def running(self):
        """Around a loop over batches; loops may be nested."""
        with self._lock:
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                threads = None
                if self._depth == 0:
                    threads, self._threads = self._threads, None
                    self._ask.clear()
            if threads is not None:
                threads.shutdown(wait=True, cancel_futures=True)

    def read(self, cache: ActivationCache, rows: np.ndarray, **how) -> PackedBatch | PendingBatch:
        """Rows of a cache; `how` as for `ActivationCache.read`."""
        if cache.in_memory:  # to wake a thread takes ten times as long as to read
            return cache.read(rows, **how)
        with self._lock:
            if self._depth == 0:
                return cache.read(rows, **how)
            if self._threads is None:
                self._threads = ThreadPoolExecutor(1, "lpt-fast cache reader")
            if id(cache) not in self._ask:
                self._ask[id(cache)] = cache, cache.reading_aside()
            ask = self._ask[id(cache)][1]
            return PendingBatch(self._threads.submit(ask, rows, **how), cache.lengths[rows])
