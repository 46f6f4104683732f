"""Texts of one adapter among those of a call, and how that adapter runs, whatever is active."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..packing import PackedBatch

# PEFT's name for no adapter.
BASE = "__base__"


@dataclass(frozen=True, eq=False)
class Group:
    """Texts that one adapter runs on.

    Attributes:
        name: of the adapter, or BASE.
        texts: int64 [n], their numbers in the call.
    """

    name: str
    texts: Tensor


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


def entries_of(value, texts: Tensor, batch: int):
    """Entries of some texts, of what has one for each."""
    if isinstance(value, PackedBatch):
        return value.select(texts)
    if isinstance(value, Tensor):
        own = value.dim() > 0 and len(value) == batch
        return value.index_select(0, texts.to(value.device)) if own else value
    if isinstance(value, list | tuple) and len(value) == batch:
        return [value[i] for i in texts.tolist()]
    return value
