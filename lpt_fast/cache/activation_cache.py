"""ActivationCache: the outputs of the frozen layers of one model, text by text, on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..backbone.families import FAMILIES
from ..packing import PackedBatch
from . import canary as canaries
from .choose import folder_of_model, name_of, only_folder
from .errors import CacheError, MissingRowsError
from .filling import Filling
from .folder import MANIFEST, Folder, folder_size
from .forward import device_of
from .guards import check_frozen
from .identity import Identity, Place, cut, identity_of
from .index import KeyTable, RowTable
from .planner import Plan, choose_tier
from .reader import RowReader, check_free_rows, check_mode, check_rows, take_over
from .rows import DatasetKeys, TextRules, as_keys, read_keys
from .shard import STORES
from .state import State
from .verify import VerifyReport, verify

logger = logging.getLogger(__name__)


class ActivationCache(Filling):
    """Hidden states of layer k for every text that was seen, computed once (DESIGN section 6).

    A folder holds caches of several models, layers and dtypes beside each other; an object of this
    class is one of them. Which one is said by a model (`open(path, model)`, `ensure(model, ...)`),
    by `insertion_layer` or `identity`, or by there being only one. Many processes may read while
    one builds.

    Example:
        cache = ActivationCache.open("cache", model)
        rows = cache.ensure(model, dataset)  # int64 [N], computes only what is missing
        batch = cache.read(rows[:32])
        loss = model(cached_hidden=batch, labels=labels[:32]).loss

    Args of `open`:
        path: folder of caches, or that of one cache. It need not exist before something is built.
        model: whose rows are wanted, an `nn.Module` of a known family. It is compared with the
            cache, weight by weight, and a few rows are computed again (`canary`).
        insertion_layer: k; default: that of the model's active late prompt.
        store: how a new cache keeps rows: "bf16" (default), "fp32", "fp16", "int8c" (8 bits with a
            scale for each channel and token) or "fp8" (e4m3).
        compute_dtype: "bfloat16" or "float16" to run the layers under autocast; default: as the
            model is.
        identity: sha256 of the cache, or its beginning, where several would fit.
        tier: where rows are read from, "device", "pinned", "page", "disk", or "auto" (planner.py).
        check: "read" compares the hash of every row that is read from a file, each time; "never".
        canary: whether a few rows are computed again when a model is given.
        device: where batches go; default: the model's device, else the CPU.

    Raises:
        CacheError: nothing there that fits; says what is there.
    """

    def __init__(
        self,
        root: Path,
        *,
        store: str | None = None,
        compute_dtype: str | None = None,
        insertion_layer: int | None = None,
        identity: str | None = None,
        tier: str = "auto",
        check: str = "read",
        canary: bool = True,
        device: torch.device | str | None = None,
    ):
        self.root = root
        self._store, self._compute_dtype = store, compute_dtype
        self._layer, self._identity_asked = insertion_layer, identity
        self._tier, self._check = tier, check
        self._device = None if device is None else torch.device(device)
        self._state: State | None = None
        self._table: RowTable | None = None
        self._keys: KeyTable | None = None
        self._reader: RowReader | None = None
        self._identity: Identity | None = None
        # Of the model, once one was seen (the identity in any store).
        self._rules: TextRules | None = None
        self._wanted: Identity | None = None
        self._looked = not canary

    # -- opening -----------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: str | Path,
        model: torch.nn.Module | None = None,
        *,
        insertion_layer: int | None = None,
        store: str | None = None,
        compute_dtype: str | None = None,
        identity: str | None = None,
        tier: str = "auto",
        check: str = "read",
        canary: bool = True,
        device: torch.device | str | None = None,
    ) -> ActivationCache:
        """Opens a cache, or a folder for one that `ensure` or `build` will fill. See the class."""
        path = Path(path).expanduser().absolute()  # wherever the process goes later
        if path.exists() and not path.is_dir():
            raise CacheError(f"{path} is a file, expected the folder of a cache; give its folder.")
        if store is not None and store not in STORES:
            raise CacheError(f"The store must be one of {', '.join(STORES)}, got {store!r}.")
        choose_tier(0, torch.device("cpu"), tier)  # wrong names are said now
        check_mode(check)
        cache = cls(
            path,
            store=store,
            compute_dtype=compute_dtype,
            insertion_layer=insertion_layer,
            identity=identity,
            tier=tier,
            check=check,
            canary=canary,
            device=device,
        )
        if model is not None:
            cache._bind_to(cut(model, insertion_layer))
        elif identity is not None or insertion_layer is not None or (path / MANIFEST).exists():
            cache._bind_only(needed=identity is not None)
        return cache

    def _bind_only(self, needed: bool) -> None:
        """Takes up the only cache of the folder that fits what was asked for."""

        def fits(own: Identity) -> bool:
            return (
                self._layer in (None, own.layer)
                and self._store in (None, own.store)
                and self._compute_dtype in (None, own.compute_dtype)
                and own.digest.startswith(self._identity_asked or "")
                and (self._wanted is None or self._wanted.at(store=own.store).digest == own.digest)
            )

        folder = only_folder(self.root, fits, needed)
        if folder is not None:
            self._bind(folder)

    def _bind_to(self, place: Place) -> Identity:
        """Finds the cache of a model; without a store given, any of that model's does."""
        check_frozen(place)
        wanted = identity_of(place, self._store or "bf16", self._compute_dtype)
        self._rules, self._wanted = TextRules.of(place.backbone, place.family), wanted
        if self._identity is not None:
            own = wanted.at(store=self._identity.store)
            if own.digest != self._identity.digest:
                raise CacheError(
                    f"The cache is that of {name_of(self._identity)}, expected of this model "
                    f"({name_of(own)}; weights, configuration, layer or dtype differ); open "
                    "another cache for it, ActivationCache.open(path, model)."
                )
            self._look(place)
            return self._identity
        own, folder = folder_of_model(self.root, wanted, self._store, self._identity_asked or "")
        if folder is not None:
            self._bind(folder, place)
            self._look(place)
        return own

    def _bind(self, folder: Folder, place: Place | None = None) -> None:
        """Takes up a cache that is on disk."""
        self._identity = folder.identity
        self._state = State(folder)
        if self._device is None:
            self._device = torch.device("cpu") if place is None else device_of(place)
        self.refresh()
        for problem in self._state.problems:
            logger.warning("%s (The sound rows of the cache are used.)", problem)

    def _look(self, place: Place) -> None:
        """The canary, before a model's rows are used for the first time."""
        if not self._looked:
            canaries.check(place, self._identity, self._table, self._reader)
            self._looked = True

    def refresh(self) -> None:
        """Sees what a builder has finished since. Numbers of rows that were known stay."""
        if self._state is None:
            return
        self._state.load(adopt=False)
        if self._table is not None and len(self._table.names) == len(self._state.shards):
            return
        self._table = RowTable.of(list(self._state.shards.items()))
        self._keys = KeyTable(self._table.key)
        identity = self._identity
        size = self._table.num_tokens * identity.token_bytes
        plan = choose_tier(size, self._device, self._tier)
        if self._reader is None or plan.tier != self._reader.plan.tier:
            logger.info("Activation cache %s is read from %s", self._state.folder.path, plan)
        reader = RowReader(self._state.folder, self._table, plan, self._device, self._check)
        if self._reader is not None:
            reader.rows_read, reader.bytes_read = self._reader.rows_read, self._reader.bytes_read
        self._reader = reader

    # -- reading -----------------------------------------------------------------------------------

    def rows(self, dataset, rules: TextRules | None = None) -> np.ndarray:
        """The row of every example of a data set that is in the cache already, int64 [N].

        Args:
            dataset: as for `ensure`.
            rules: of the model (`TextRules.of(backbone, family)`); default: those of the model that
                this object has seen, or else what is known of its family.

        Raises:
            MissingRowsError: some are not in it.
        """
        self._opened()
        rules = rules or self._rules
        if rules is None:
            family = FAMILIES.get(self._identity.content["backbone"])
            rules = TextRules(zero_types=family is None or not family.causal)
        return self._rows_of(read_keys(dataset, rules))

    def _rows_of(self, keys: DatasetKeys) -> np.ndarray:
        self._opened()
        found = self._keys.find(keys.keys)
        if (found < 0).any():
            lacking = np.flatnonzero(found < 0)
            raise MissingRowsError(
                f"{len(lacking)} of {len(found)} texts are not in the cache (row {lacking[0]} of "
                "the data set first), expected all; `ensure(model, dataset)` computes them."
            )
        return found

    def find(self, keys) -> np.ndarray:
        """Rows of keys (16 bytes each, or uint64 [B, 2]), int64 [B], -1 for those not here."""
        self._opened()
        return self._keys.find(as_keys(keys))

    def read(self, rows, *, room: int = 0, dtype: torch.dtype | None = None) -> PackedBatch:
        """Texts as one packed batch.

        Args:
            rows: row numbers int [B] (`ensure` gives them), or keys (16 bytes each, or uint64
                [B, 2]); any order, repeats allowed.
            room: free rows before each text, for its prompt.
            dtype: of the hidden states; default: the store's, bf16 for 8-bit stores.

        Raises:
            MissingRowsError: a row or key that is not in the cache.
            CorruptCacheError: a row whose bytes are not those that were written.
        """
        self._opened()
        check_free_rows(room)
        return self._reader.read(self._numbers(rows), room, dtype)

    def _numbers(self, rows) -> np.ndarray:
        keys = isinstance(rows, np.ndarray) and rows.ndim == 2
        keys = keys or (isinstance(rows, list | tuple) and rows and isinstance(rows[0], bytes))
        if not keys:
            return check_rows(rows, len(self._table))
        found = self._keys.find(as_keys(rows))
        if (found < 0).any():
            raise MissingRowsError(
                f"{int((found < 0).sum())} of {len(found)} keys are not in the cache, expected "
                "all; `ensure(model, dataset)` computes them."
            )
        return found

    def batches(
        self,
        order: Iterable,
        *,
        room: int = 0,
        dtype: torch.dtype | None = None,
        prefetch: int = 2,
    ) -> Iterator[PackedBatch]:
        """Batches in the order of a sampler, read ahead on one background thread.

        Args:
            order: row numbers (or keys) of each batch.
            room, dtype: as for `read`.
            prefetch: batches that are ready before they are asked for; 0 reads in this thread.
        """
        self._opened()
        check_free_rows(room)
        return self._reader.batches((self._numbers(rows) for rows in order), room, dtype, prefetch)

    @property
    def in_memory(self) -> bool:
        """Whether batches for the CPU come out of memory: a tenth of a millisecond each."""
        return not self.on_disk and self._reader.device.type == "cpu"

    @property
    def on_disk(self) -> bool:
        """Whether batches are read from files that memory has no room for."""
        self._opened()
        return self._reader.plan.tier == "disk"

    def reading_aside(self) -> Callable[..., Callable[[], PackedBatch]]:
        """For a thread that reads ahead: a function `ask(rows, room=, dtype=)` that reads as `read`
        does, on a GPU beside its work. What it returns is called in the thread that uses the batch
        and gives it.
        """
        self._opened()
        stream = self._reader.new_stream()

        def ask(rows, *, room: int = 0, dtype: torch.dtype | None = None):
            self._opened()
            reader, rows = self._reader, self._numbers(rows)
            if reader.plan.tier == "disk":
                reader.advise(rows)  # a disk serves many requests at once
            return partial(take_over, *reader.read_aside(stream, rows, room, dtype))

        return ask

    def device_store(self):
        """The whole cache as `lpt_kernels.gather.Store` on the device, for
        `lpt_fast.insertion.gather_insert_prompt`; its examples are the rows of this object.
        """
        self._opened()
        return self._reader.device_store()

    # -- looking after it --------------------------------------------------------------------------

    def verify(self, full: bool = False) -> VerifyReport:
        """Compares what is on disk with its digests; with `full` every byte of every row."""
        self._opened()
        return verify(self._state.folder, full)

    def stats(self) -> dict[str, Any]:
        """What is in the cache and what was read: identity, layer, store, rows, tokens, bytes on
        disk, tier and why, problems, rows and bytes read by this object.
        """
        self._opened()
        identity = self._identity
        return {
            "path": str(self._state.folder.path),
            "identity": identity.digest,
            "insertion_layer": identity.layer,
            "store": identity.store,
            "compute_dtype": identity.compute_dtype,
            "width": identity.width,
            "rows": len(self._table),
            "tokens": self._table.num_tokens,
            "shards": len(self._table.names),
            "bytes": folder_size(self._state.folder.path),
            "tier": self._reader.plan.tier,
            "why": self._reader.plan.why,
            "check": self._check,
            "problems": list(self._state.problems),
            "rows_read": self._reader.rows_read,
            "bytes_read": self._reader.bytes_read,
            "provenance": dict(self._state.folder.provenance),
        }

    @property
    def identity(self) -> Identity:
        """What the rows depend on beside their text."""
        self._opened()
        return self._identity

    @property
    def plan(self) -> Plan:
        """Where rows are read from, and why."""
        self._opened()
        return self._reader.plan

    @property
    def table(self) -> RowTable:
        """Where every row is, and what its text was."""
        self._opened()
        return self._table

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [N]."""
        self._opened()
        return self._table.length

    def __len__(self) -> int:
        """Number of rows; 0 before anything is there."""
        self._take_up()
        return 0 if self._table is None else len(self._table)

    def reopen(self) -> ActivationCache:
        """The same cache once more, for another process: its rows come from the files and go to the
        CPU. Pickling an open cache comes to the same.
        """
        function, args = self.__reduce__()
        return function(*args)

    def __reduce__(self):
        self._opened()
        tier = "disk" if self._reader.plan.tier == "disk" else "page"
        return _reopened, (self.root, self._identity.digest, tier, self._check)

    def close(self) -> None:
        """Lets go of files and memory."""
        if self._reader is not None:
            self._reader.files.close()
        self._state = self._table = self._keys = self._reader = self._identity = None

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _take_up(self) -> None:
        """The only cache of the folder that fits is meant (that of another model never does)."""
        if self._reader is None and self.root.is_dir():
            self._bind_only(needed=False)

    def _opened(self) -> None:
        self._take_up()
        if self._reader is None:
            raise CacheError(
                f"{self.root} holds no cache yet, expected one to read from; `ensure(model, "
                "dataset)` or `lpt-fast precompute` fills it."
            )


def _reopened(root: Path, identity: str, tier: str, check: str) -> ActivationCache:
    return ActivationCache.open(root, identity=identity, tier=tier, check=check, device="cpu")
