"""Texts of one adapter among those of a call, and how that adapter runs, whatever is active."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..packing import PackedBatch

# PEFT's name for no adapter.
BASE = "__base__"


@dataclass(frozen=True)
class Group:
    """Texts that one adapter runs on.

    Attributes:
        name: of the adapter, or BASE.
        texts: their numbers in the call.
    """

    name: str
    texts: tuple[int, ...]


@contextmanager
def running(late, name: str, wrappers: list | None = None, modes: bool = True) -> Iterator[None]:
    """One adapter runs, or with BASE none, whatever is active; what trains stays as it is.

    Args:
        wrappers: the model's heads, where they are known.
        modes: whether layers of the model will run, whose modes follow the adapter.
    """
    parts = [late, *(heads_of(late) if wrappers is None else wrappers)]
    before = [(part._active_adapter, part._disable_adapters) for part in parts]
    follow = late._sync if modes else late._sync_labels
    try:
        for part in parts:
            part._disable_adapters = name == BASE
            if name != BASE:
                part._active_adapter = [name]
        follow()
        yield
    finally:
        for part, (active, disabled) in zip(parts, before, strict=True):
            part._active_adapter, part._disable_adapters = active, disabled
        follow()


def heads_of(late) -> list[nn.Module]:
    """The modules of which each adapter trains a copy."""
    return [m for m in late.root.modules() if isinstance(m, ModulesToSaveWrapper)]


def entries_of(value, texts: tuple[int, ...], batch: int):
    """Entries of some texts, of what has one for each of the batch."""
    several = isinstance(value, PackedBatch | list | tuple) or (
        isinstance(value, Tensor) and value.dim() > 0
    )
    if not several or len(value) != batch or texts == tuple(range(batch)):
        return value
    if isinstance(value, list | tuple):
        return [value[i] for i in texts]
    index = torch.tensor(texts, device=value.device if isinstance(value, Tensor) else None)
    return value.select(index) if isinstance(value, PackedBatch) else value.index_select(0, index)
