"""The options of `python -m bench train`, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lpt_fast.cache.shard import STORES

from .contestants import contestants_of
from .models import ENCODERS


@dataclass(frozen=True)
class Settings:
    """The options of the command, checked."""

    data: Path | None
    task: str
    batch_size: int
    batch_tokens: int | None
    layers: tuple[int, ...]
    encoder: str
    model: str | None
    dtype: str
    store: str
    device: str
    contestants: tuple[str, ...] | None
    steps: int
    warmup: int
    rows: int | None
    build_rows: int
    memory: bool
    quick: bool
    seed: int

    def __post_init__(self):
        for name, value, allowed in (
            ("encoder", self.encoder, ENCODERS),
            ("dtype", self.dtype, ("fp32", "bf16")),
            ("store", self.store, tuple(STORES)),
            ("device", self.device, ("cpu", "cuda")),
        ):
            if value not in allowed:
                raise ValueError(f"`--{name}` must be one of {', '.join(allowed)}, got {value!r}.")
        known = [name for name, _ in contestants_of(self.dtype, self.device)]
        for name in self.contestants or ():
            if name not in known:
                raise ValueError(
                    f"`--contestants` must be of {', '.join(known)} in {self.dtype}, got {name!r}."
                )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("`--device` is cuda, but no CUDA device was found; use cpu.")
        if self.data is not None and not (self.data / self.task / "train.tsv").is_file():
            raise ValueError(f"There is no {self.data / self.task / 'train.tsv'}; check --data.")
