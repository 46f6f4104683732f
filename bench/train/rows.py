"""What the frozen layers give for the texts of `python -m bench train`, computed once and timed:
caches of layer k, and the features that a head alone is trained on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lpt_fast.backbone.families import find_backbone
from lpt_fast.cache import ActivationCache
from lpt_fast.cache.forward import BATCH_TOKENS, batches_of

from .data import Texts
from .models import Rows, Zoo


@dataclass(frozen=True)
class Filled:
    """Rows and what they took.

    Attributes:
        rows: for contestants.
        seconds: of computing them.
        texts, tokens: how many, without repeats.
        whole: seconds that all texts take; more than `seconds` only where not all were computed,
            and then in proportion to their tokens.
    """

    rows: Rows
    seconds: float
    texts: int
    tokens: int
    whole: float


def _whole(seconds: float, texts: Texts, chosen: np.ndarray) -> float:
    lengths = texts.lengths
    return seconds * float(lengths.sum() / lengths[chosen].sum())


def fill_cache(
    zoo: Zoo, texts: Texts, chosen: np.ndarray, k: int, folder: str, store: str
) -> Filled:
    """A cache of layer k in `folder`, through the model that trains on it."""
    model = zoo.contestant("cached_packed", k, texts).model
    cache = ActivationCache.open(folder, model, store=store, canary=False)
    examples = texts.take(chosen)
    _wait(zoo)
    start = time.perf_counter()
    numbers = cache.ensure(model, examples)
    _wait(zoo)
    seconds = time.perf_counter() - start
    rows = Rows.numbered(texts, chosen, numbers, cache=cache, dtype=read_dtype(zoo))
    tokens = int(texts.lengths[chosen].sum())
    return Filled(rows, seconds, len(chosen), tokens, _whole(seconds, texts, chosen))


def open_cache(zoo: Zoo, texts: Texts, chosen: np.ndarray, k: int, folder: str, model) -> Rows:
    """The rows that `fill_cache` left in `folder`, in another process."""
    cache = ActivationCache.open(folder, model, insertion_layer=k, canary=False)
    numbers = cache.rows(texts.take(chosen))
    return Rows.numbered(texts, chosen, numbers, cache=cache, dtype=read_dtype(zoo))


def read_dtype(zoo: Zoo) -> torch.dtype:
    """In which the layers above k take rows."""
    return torch.bfloat16 if zoo.dtype == "bf16" else torch.float32


def fill_features(zoo: Zoo, texts: Texts, chosen: np.ndarray) -> Filled:
    """First tokens after the last layer of the frozen model."""
    half = zoo.dtype == "bf16"
    model = zoo.base(half)
    _wait(zoo)
    start = time.perf_counter()
    features = first_tokens(model, texts, chosen, zoo.place)
    _wait(zoo)
    seconds = time.perf_counter() - start
    rows = Rows.numbered(texts, chosen, np.arange(len(chosen)), features=features)
    tokens = int(texts.lengths[chosen].sum())
    return Filled(rows, seconds, len(chosen), tokens, _whole(seconds, texts, chosen))


@torch.no_grad()
def first_tokens(model: nn.Module, texts: Texts, chosen: np.ndarray, device) -> torch.Tensor:
    """[len(chosen), D], computed in batches of texts of like length."""
    _, backbone, _ = find_backbone(model.eval())
    lengths = texts.lengths[chosen]
    order = np.argsort(-lengths, kind="stable")
    out = None
    for part in batches_of(lengths[order], BATCH_TOKENS[device.type]):
        inputs = texts.collate(chosen[order[part]], device)
        del inputs["labels"]
        states = backbone(**inputs).last_hidden_state[:, 0]
        if out is None:
            out = states.new_empty(len(chosen), states.shape[1])
        out[torch.as_tensor(order[part], device=device)] = states
    return out


def _wait(zoo: Zoo) -> None:
    if zoo.place.type == "cuda":
        torch.cuda.synchronize()
