"""Filling an ActivationCache: what a data set lacks is computed, and nothing else."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from .build import Builder
from .build_settings import BuildReport, BuildSettings
from .choose import state_at
from .errors import CacheError
from .forward import device_of
from .guards import check_frozen
from .identity import cut, identity_of
from .plan import Target
from .rows import TextRules, read_keys
from .sources import exact_sources


class Filling:
    """Mixed into ActivationCache, whose state and binding to a model it uses."""

    def build(
        self,
        model: torch.nn.Module,
        dataset,
        *,
        insertion_layer: int | list[int] | None = None,
        batch_tokens: int | None = None,
        shard_bytes: int = BuildSettings.shard_bytes,
        max_bytes: int | None = None,
        wait: float = 0.0,
        progress: bool = False,
        provenance: dict[str, Any] | None = None,
    ) -> BuildReport:
        """Computes the rows of a tokenised data set that are missing, and nothing else.

        An interrupted build is taken up where it ended: finished shards stay. Under torchrun, all
        processes call this together and share the work.

        Args:
            model: of a known family, frozen up to the cut.
            dataset: examples with `input_ids` (and `attention_mask`, `token_type_ids`,
                `position_ids`), a datasets.Dataset or a list of dicts.
            insertion_layer: k, or several cuts to fill in one pass (this object is then that of the
                first); default: as opened, else that of the model's active late prompt.
            batch_tokens: tokens of a batch, padding counted.
            shard_bytes: most bytes of a file's hidden states.
            max_bytes: most bytes that a cache may take.
            wait: seconds to wait while another process builds.
            progress: show a progress bar.
            provenance: said of a new cache in its manifest, beside model and versions.

        Raises:
            CacheBusyError: another process builds; says which.
            CacheError: a model that is not frozen below the cut, a text that the model does not
                take, no room, hidden states that are not finite (the row is named).
        """
        settings = BuildSettings(batch_tokens, shard_bytes, max_bytes, wait, progress)
        layers = self._layer if insertion_layer is None else insertion_layer
        layers = layers if isinstance(layers, list) else [layers]
        places = [cut(model, layer) for layer in layers]
        if len({place.layer for place in places}) != len(places):
            raise CacheError(f"`insertion_layer` names a layer twice: {layers}.")
        rules = TextRules.of(places[0].backbone, places[0].family)
        keys = read_keys(dataset, rules)
        return self._build(model, places, dataset, keys, rules, settings, provenance)

    def _build(self, model, places, dataset, keys, rules, settings, provenance) -> BuildReport:
        if self._device is None:
            self._device = device_of(places[0])
        targets = []
        for i, place in enumerate(places):
            if i == 0:
                identity = self._bind_to(place)
                state = self._state
            else:
                check_frozen(place)
                store = targets[0].folder.identity.store
                identity = identity_of(place, store, self._compute_dtype)
                state = None
            if state is None:
                state = state_at(self.root, identity, partial(_provenance, model, provenance))
            targets.append(Target(place, state))
        sources = exact_sources(self.root, model, self._compute_dtype, [p.layer for p in places])
        report = Builder(targets, dataset, keys, rules, settings, sources).run()
        if self._state is None:
            self._bind(targets[0].folder)
            self._looked = True  # this very model made the rows
        else:
            self.refresh()
        return report

    def ensure(self, model: torch.nn.Module, dataset, **settings) -> np.ndarray:
        """The row of every example of a data set, computing those that are missing.

        Args:
            model, dataset, settings: as for `build`, with one cut.

        Returns:
            int64 [N], in the order of the data set, for `read` and `batches` of this object.
        """
        layer = settings.pop("insertion_layer", None)
        place = cut(model, self._layer if layer is None else layer)
        provenance = settings.pop("provenance", None)
        try:
            settings = BuildSettings(**settings)
        except TypeError as error:
            raise CacheError(f"ensure() got an unknown setting: {error}.") from None
        rules = TextRules.of(place.backbone, place.family)
        keys = read_keys(dataset, rules)
        self._build(model, [place], dataset, keys, rules, settings, provenance)
        return self._rows_of(keys)


def _provenance(model, more: dict[str, Any] | None) -> dict[str, Any]:
    """Where a new cache comes from, for people. No times: the same build gives the same bytes."""
    import transformers

    from .. import __version__

    config = getattr(model, "config", None)
    return {
        "model": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "lpt_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **(more or {}),
    }
