"""CachedLoading: a Trainer whose DataLoaders give rows of a cache in place of the text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch
from transformers.utils import is_datasets_available

from ..cache import ActivationCache
from ..cache.errors import CacheBusyError
from ..cache.rows import TextRules
from ..method.cached_call import rows_dtype
from .cached_dataset import TEXT, CachedDataset, TextsOf
from .collators import CachedCollator, Padding, WithReadout
from .cursor import is_numbered
from .projections import Projections, hold

logger = logging.getLogger(__name__)

BUILD_WAIT = 24 * 3600.0  # seconds; another run that fills the same cache saves us the work
IN_A_ROW = 8  # batches that are made one after another, at most,
ROW_BYTES = 2**25  # and what they should take
REMEMBERED = 8  # data sets whose rows are known without asking again


def open_for(folder, model, dtype: Callable[[], torch.dtype | None]) -> ActivationCache:
    """The cache of a model's active adapter; a fresh one in the dtype that layers compute in, which
    is asked for then alone.
    """
    cache = ActivationCache.open(folder, model)
    if len(cache) == 0 and dtype() == torch.bfloat16:
        # (A cache that is there already serves as well, and is there.)
        cache = ActivationCache.open(folder, model, compute_dtype="bfloat16")
    return cache


class CachedLoading:
    """Mixed into a Trainer that has `activation_cache` (a folder, an open cache or None),
    `hold_projections`, `_late_prompt`, `_ahead`, `_holding`, `_chosen_dtype()`, `_label_rules()`,
    `_has_own_loss()` and `_reads_one_token()`.
    """

    def _forget_rows(self) -> None:
        self._caches: dict[int, ActivationCache] = {}
        self._rows: list[tuple] = []

    def open_cache(self) -> ActivationCache | None:
        """The cache of the model's active adapter; None where there is none."""
        given = self.activation_cache
        if given is None or isinstance(given, ActivationCache):
            return given
        layer = self._late_prompt.active_config.insertion_layer
        if layer not in self._caches:
            self._caches[layer] = open_for(given, self.model, self._chosen_dtype)
        return self._caches[layer]

    def _keys_of(self, dataset, kept) -> tuple[ActivationCache, np.ndarray]:
        """Fills the cache with the rows of a data set, once.

        Args:
            dataset: as it was given.
            kept: its examples without the columns that the model is not given.

        Returns:
            The cache, and the keys uint64 [N, 2].
        """
        if self._late_prompt.active_config is None:
            raise ValueError(
                "`activation_cache` was given and no late prompt is active, expected one: the base "
                "model needs the text. Enable the adapter, or leave the cache out."
            )
        cache = self.open_cache()
        for known, size, owner, keys in self._rows:
            if known is dataset and size == len(dataset) and owner is cache:
                return cache, keys
        names = TEXT
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            names = [name for name in TEXT if name in self._signature_columns]
        texts = TextsOf(kept, names) if is_numbered(kept) else kept
        layer = self._late_prompt.active_config.insertion_layer
        how = {
            "insertion_layer": layer,
            "progress": not self.args.disable_tqdm and self.is_local_process_zero(),
        }
        try:
            rows = cache.ensure(self.model, texts, **how)
        except CacheBusyError as error:
            logger.info("%s Waiting for it.", error)
            rows = cache.ensure(self.model, texts, **how, wait=BUILD_WAIT)
        keys = cache.table.key[rows]
        self._rows = [*self._rows[1 - REMEMBERED :], (dataset, len(dataset), cache, keys)]
        return cache, keys

    # -- DataLoaders -------------------------------------------------------------------------------

    def get_train_dataloader(self):
        """As Trainer's. Rows that the cache lacks are computed here, in training also those of the
        evaluation data.

        Raises:
            ValueError: for data without labels.
            CacheError: for text that the model does not take.
        """
        if self.train_dataset is not None:
            self._check_labels()
        loader = super().get_train_dataloader()
        evaluates = self.args.eval_strategy != "no" or self.args.eval_on_start
        if self.activation_cache is not None and self.is_in_train and evaluates:
            # Now and not after the first epoch: wrong text is said before anything is trained.
            given = self.eval_dataset
            for dataset in given.values() if isinstance(given, dict) else [given]:
                if dataset is not None:
                    self._keys_of(dataset, self._kept(dataset, "Evaluation"))
        return loader

    def _kept(self, dataset, description: str):
        if is_datasets_available():
            import datasets

            if isinstance(dataset, datasets.Dataset):
                return self._remove_unused_columns(dataset, description=description)
        return dataset

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, *args, **kwargs):
        own = self.data_collator
        if self.activation_cache is None:
            if self._reads_one_token():
                self.data_collator = WithReadout(own, self._late_prompt.causal_lm)
        else:
            kept = self._kept(dataset, description)
            quick = Padding(own) if Padding.fits(own) else None
            collator = quick or own
            if kept is dataset:  # no data set that removed them by itself
                collator = self._get_collator_with_removed_columns(collator, description)
                if quick is not None and self.args.remove_unused_columns:
                    quick.names = frozenset(self._signature_columns)
            cache, keys = self._keys_of(dataset, kept)
            self.data_collator = self._cached_collator(collator, cache, quick)
            if description == "Training" and self.is_in_train:
                self._let_go()
                self._holding = self.data_collator
                self._holding.projections = self._projections(cache, keys)
            dataset = CachedDataset(kept, keys)
            if sampler_fn is not None:
                # Samplers see the data set that they would see, so the order is that of the text.
                choose, sampler_fn = sampler_fn, lambda _: choose(kept)
        try:
            return super()._get_dataloader(
                dataset, description, batch_size, sampler_fn, *args, **kwargs
            )
        finally:
            self.data_collator = own

    def _batches_in_a_row(self, stock) -> int:
        """Several, where none draws random numbers, waits for a disk or takes much memory."""
        collate, dataset = stock.collate_fn, stock.dataset
        quick = isinstance(collate, CachedCollator) and collate.quick is not None
        if not quick or stock.num_workers or not _is_plain(dataset.dataset):
            return 1
        cache = collate.cache
        if len(dataset) == 0 or cache.on_disk:
            return 1
        lengths = cache.lengths[cache.find(dataset.keys)]
        tokens = self._train_batch_size * float(np.quantile(lengths, 0.9))
        return max(1, min(IN_A_ROW, int(ROW_BYTES / (tokens * cache.identity.width * 4))))

    def _cached_collator(
        self, collator, cache: ActivationCache, quick: Padding | None = None
    ) -> CachedCollator:
        late = self._late_prompt
        config = late.active_config
        dtype = rows_dtype(late, config.insertion_layer)
        how = {"room": config.num_virtual_tokens, "dtype": dtype}
        text = TextRules.of(late.backbone, late.family)
        labels = self._label_rules()
        return CachedCollator(collator, cache, self._ahead, text, labels, how, quick=quick)

    def _projections(self, cache: ActivationCache, keys: np.ndarray) -> Projections | None:
        """Of the training texts, where they are wanted and there is room.

        Raises:
            ValueError: they were asked for and cannot be held.
        """
        self.model.train()  # as the loop will: dropout that is active counts
        with self.accelerator.autocast():  # as around the model in each step
            return hold(self._late_prompt, cache, keys, self.args, self.hold_projections)

    def _let_go(self) -> None:
        """Projections serve one training; its DataLoader outlives it."""
        if self._holding is not None:
            self._holding.projections = None
        self._holding = None

    def _check_labels(self) -> None:
        """Raises ValueError where the model would give no loss, before any row is computed."""
        if self.compute_loss_func is not None or self._has_own_loss() or not self.label_names:
            return
        dataset = self.train_dataset
        if not is_numbered(dataset) or len(dataset) == 0:
            return  # a stream is read when it is its turn
        names = {*self.label_names, "label", "label_ids"}
        with torch.random.fork_rng(devices=[]):  # these may draw; the order stays Trainer's
            example = dataset[0]
            if not isinstance(example, Mapping) or names & set(example):
                return
            made = self._get_collator_with_removed_columns(self.data_collator)([example])
        if isinstance(made, Mapping) and not names & set(made):
            raise ValueError(
                f"The training data has the columns {sorted(example)} and no labels, "
                f"expected {' or '.join(f'`{name}`' for name in self.label_names)}; add them, or "
                "give a data collator that makes them."
            )


def _is_plain(dataset) -> bool:
    """Whether reading an example twice gives the same, and draws nothing."""
    if type(dataset) is list:
        return True
    if is_datasets_available():
        import datasets

        return type(dataset) is datasets.Dataset and dataset.format["type"] is None
    return False
