"""Caches of lower cuts that a build can go on from instead of running their layers."""

from __future__ import annotations

from pathlib import Path

import torch

from . import planner, quantize
from .errors import CacheError
from .folder import Folder, find_folders
from .forward import Runner, device_of
from .identity import cut, identity_of
from .index import KeyTable, RowTable
from .reader import RowReader
from .shard import QUANTISED
from .state import State


def exact_sources(
    root: Path, model, compute_dtype: str | None, layers: list[int]
) -> list[tuple[int, RowReader, KeyTable]]:
    """Readers of the caches of lower cuts in `root` that keep every bit of what the model gives,
    where reading them is cheaper than running their layers; deepest first.

    Args:
        root: folder of caches.
        model, compute_dtype: as for identity_of.
        layers: the cuts to fill.
    """
    found = []
    for path in find_folders(root) if root.is_dir() else []:
        try:
            folder = Folder.read(path)
            identity = folder.identity
            if identity.layer >= min(layers) or identity.store in QUANTISED:
                continue
            place = cut(model, identity.layer)
            if identity_of(place, identity.store, compute_dtype).digest != identity.digest:
                continue
            dtype = Runner(place, [identity.layer], identity.compute_dtype).dtype
            if not quantize.exact_for(identity.store, dtype):
                continue
            state = State(folder).load(adopt=False)
        except CacheError:
            continue  # not of this model, or damaged: the layers run
        element = quantize.torch_dtype(identity.store).itemsize
        device = device_of(place)
        if state.shards and planner.continuing_pays(
            identity.width, identity.layer, element, device
        ):
            table = RowTable.of(list(state.shards.items()))
            plan = planner.Plan("page", "read once")
            reader = RowReader(folder, table, plan, torch.device("cpu"))
            found.append((identity.layer, reader, KeyTable(table.key)))
    return sorted(found, key=lambda source: -source[0])
