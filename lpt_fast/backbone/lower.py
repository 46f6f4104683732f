"""The lower half of a backbone: embeddings and layers 1..k, frozen, without gradient, in eval
mode, always.
"""

from __future__ import annotations

import torch
from torch import nn

from .arguments import given_cache, set_cache
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
    # (What is exported is in evaluation mode, and tracing cannot look into a copy.)
    if not torch.compiler.is_exporting() and any(m.training for m in lower.modules()):
        lower.eval()
    cache = given_cache(inputs)
    if cache is not None:
        inputs = dict(inputs)
        set_cache(backbone, inputs, CacheView(cache, 0, k))
    with torch.no_grad():
        return lower(**inputs)


def run_lower_at(
    backbone: nn.Module, family: Family, layers: list[int], inputs: dict
) -> dict[int, torch.Tensor]:
    """Outputs of several layers in one pass.

    Args:
        backbone, family, inputs: as for `run_lower`.
        layers: which layers, counted from 1.

    Returns:
        layer -> [B, S, D], each as `run_lower` would give it.
    """
    deepest = max(layers)
    states, handles = {}, []

    def looking(layer: int):
        # What comes into the next layer: some models do more between two layers (DeBERTa-v2's
        # convolution after the first).
        def look(module, args, kwargs):
            states[layer] = args[0] if args else kwargs["hidden_states"]

        return look

    try:
        for layer in layers:
            if layer < deepest:
                module = get_layers(backbone, family)[layer]
                hook = module.register_forward_pre_hook(looking(layer), with_kwargs=True)
                handles.append(hook)
        states[deepest] = run_lower(backbone, family, deepest, inputs).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return states


def run_between(
    backbone: nn.Module,
    family: Family,
    below: int,
    layers: list[int],
    hidden: torch.Tensor,
    inputs: dict,
) -> dict[int, torch.Tensor]:
    """Outputs of several layers, from the output of a layer below them.

    Args:
        backbone, family: as for `run_lower`.
        below: the layer that gave `hidden`.
        layers: which layers, counted from 1, all above `below`.
        hidden: [B, S, D].
        inputs: attention_mask and, for rotary models, position_ids.

    Returns:
        layer -> [B, S, D].
    """
    from .upper import build_upper

    rest = build_upper(backbone, family, below, training=False)
    if not family.takes_positions:
        inputs = {name: value for name, value in inputs.items() if name != "position_ids"}
    inputs = {**inputs, "inputs_embeds": hidden}
    states = run_lower_at(rest, family, [layer - below for layer in layers], inputs)
    return {layer + below: state for layer, state in states.items()}
