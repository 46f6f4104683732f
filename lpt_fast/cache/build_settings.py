"""What is asked of a build, what it reports, and whether there is room for it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from .errors import CacheError
from .plan import SHARD_BYTES, Target, bytes_needed
from .rows import DatasetKeys


@dataclass(frozen=True)
class BuildSettings:
    """How a build works; none of it changes a row beyond rounding.

    Attributes:
        batch_tokens: tokens of a batch, padding counted; None: what suits the device.
        shard_bytes: hidden states of a shard, at most.
        max_bytes: most bytes that a cache may take on the disk; None: what is free.
        wait: seconds to wait for another builder.
        progress: show a progress bar.
    """

    batch_tokens: int | None = None
    shard_bytes: int = SHARD_BYTES
    max_bytes: int | None = None
    wait: float = 0.0
    progress: bool = False

    def __post_init__(self):
        for name in ("batch_tokens", "shard_bytes", "max_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not value >= 1):
                raise CacheError(f"`{name}` must be at least 1, got {value!r}.")


@dataclass
class BuildReport:
    """What a build did.

    Attributes:
        rows: texts of the data set.
        unique: different ones among them.
        computed: texts that ran through the model.
        tokens: of those.
        bytes: of hidden states written, over all cuts.
        seconds: in all.
        continued_from: the lower cut whose rows served as input, 0 for none.
    """

    rows: int = 0
    unique: int = 0
    computed: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    continued_from: int = 0


def check_room(targets: list[Target], keys: DatasetKeys, settings: BuildSettings) -> None:
    """Raises CacheError before anything is computed where the rows would not fit."""
    needed = [bytes_needed(target, keys, settings.shard_bytes) for target in targets]
    root = targets[0].folder.path
    free = shutil.disk_usage(root).free
    if sum(needed) > free:
        raise CacheError(
            f"The missing rows need {sum(needed):,} bytes and {root} has {free:,} free, expected "
            "room for all; make room, name another folder, or take a smaller store (bf16, int8c)."
        )
    if settings.max_bytes is not None:
        for target, size in zip(targets, needed, strict=True):
            held = sum(entry.bytes for entry in target.state.entries.values())
            if held + size > settings.max_bytes:
                raise CacheError(
                    f"The cache {target.folder.path} would take {held + size:,} bytes, expected at "
                    f"most {settings.max_bytes:,} (--max_bytes); allow more, or take fewer texts, "
                    "fewer cuts or a smaller store."
                )
