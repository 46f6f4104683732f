"""The lower half of a backbone: embeddings and layers 1..k, frozen, without gradient, in eval
mode, always.
"""

from __future__ import annotations

import torch
from torch import nn

from .cache_view import CacheView
from .copies import cut_copy
from .families import Family, get_layers


def build_lower(backbone: nn.Module, family: Family, k: int) -> nn.Module:
    """A copy of `backbone` (same weights) whose `last_hidden_state` is the output of layer k."""
    lower = cut_copy(backbone, family.layers, get_layers(backbone, family)[:k])
    for name in family.after:
        if getattr(lower, name, None) is not None:
            setattr(lower, name, nn.Identity())
    if family.pooler:
        setattr(lower, family.pooler, None)
    return lower


def run_lower(backbone: nn.Module, family: Family, k: int, inputs: dict):
    """Output of layer k for the given inputs of the backbone.

    Nothing below the insertion ever has a gradient or dropout (dropout there would make a cache of
    these states a lie), whatever mode the model is in.

    Args:
        backbone: the whole backbone.
        family: its line of the table.
        k: number of layers to run.
        inputs: keyword arguments of the backbone's own forward.

    Returns:
        The backbone's usual output; `last_hidden_state` [B, S, D] is what layer k gave, before any
        final norm.
    """
    lower = build_lower(backbone, family, k)
    if any(module.training for module in lower.modules()):
        lower.eval()
    cache = inputs.get("past_key_values")
    if cache is not None:
        inputs = {**inputs, "past_key_values": CacheView(cache, 0, k)}
    with torch.no_grad():
        return lower(**inputs)
