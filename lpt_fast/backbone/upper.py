"""The upper half of a backbone in its padded form: layers k+1..L over [prompt; hidden], by the
model's own code.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..insertion.padded_layout import PromptLayout
from .arguments import given_cache, set_cache
from .cache_view import CacheView
from .copies import cut_copy, set_submodule, shallow_copy
from .families import Family, get_layers
from .low_rank import LowRank, with_updates


def _checkpointed(layer: nn.Module) -> nn.Module:
    """A copy of a layer in eval mode that recomputes itself in the backward.

    Transformers checkpoints a layer only while it is in training mode, and a frozen layer is not.
    The copy is in training mode itself; its children keep their mode, and a dropout of its own is
    switched off.
    """
    clone = shallow_copy(layer)
    clone.training = True
    if isinstance(getattr(clone, "dropout", None), float):
        clone.dropout = 0.0
    return clone


def _with_position_bias(layer: nn.Module, first: nn.Module) -> nn.Module:
    """T5: a copy of layer k+1 that makes the relative position bias itself, with the table of
    layer 1.
    """
    table = first.layer[0].SelfAttention.relative_attention_bias
    attention = shallow_copy(layer.layer[0].SelfAttention)
    attention.has_relative_attention_bias = True
    attention.relative_attention_bias = table
    sublayer = shallow_copy(layer.layer[0])
    sublayer.SelfAttention = attention
    clone = shallow_copy(layer)
    clone.layer = nn.ModuleList([sublayer, *layer.layer[1:]])
    return clone


def build_upper(
    backbone: nn.Module,
    family: Family,
    k: int,
    training: bool,
    updates: dict[int, dict[str, LowRank]] | None = None,
) -> nn.Module:
    """A copy of `backbone` (same weights) that starts at layer k+1 and takes `inputs_embeds` as its
    input.

    Args:
        backbone: the whole backbone.
        family: its line of the table.
        k: the insertion layer.
        training: whether the model trains (gradient checkpointing asks for it).
        updates: low-rank updates by the number of their layer, counted from 0 (low_rank.py).
    """
    layers = list(get_layers(backbone, family))
    above = layers[k:]
    for number, own in (updates or {}).items():
        above[number - k] = with_updates(above[number - k], own)
    if family.bias_owner:
        above[0] = _with_position_bias(above[0], layers[0])
    if training:
        above = [
            _checkpointed(layer)
            if getattr(layer, "gradient_checkpointing", False) and not layer.training
            else layer
            for layer in above
        ]
    upper = cut_copy(backbone, family.layers, above)
    upper.training = training
    family.skip_embeddings(upper)
    if family.pooler:
        # Row 0 is a prompt row here; the pooler runs on the stripped rows.
        setattr(upper, family.pooler, None)
    if family.first_layer_extra:
        set_submodule(upper, family.first_layer_extra, None)
    if family.layer_types:
        upper.config = copy.copy(backbone.config)
        upper.config.layer_types = list(backbone.config.layer_types)[k:]
    return upper


def _checkpoints(upper: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in upper.modules())


def run_upper(
    backbone: nn.Module,
    family: Family,
    k: int,
    rows: Tensor,
    layout: PromptLayout,
    *,
    training: bool,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    updates: dict[int, dict[str, LowRank]] | None = None,
    **kwargs,
):
    """Layers k+1..L over rows [B, S', D] that hold the prompt already.

    Args:
        backbone, family, k: as for `run_lower`.
        rows: prompt and text rows; text rows alone in a decoding step (the prompt is in the cache).
        layout: where the prompt stands.
        training: whether the model trains.
        attention_mask: [B, T + m] over everything attended to, or None for all.
        position_ids: [B, S'] or None.
        updates: as of `build_upper`.
        kwargs: for the backbone's own forward, the whole model's KV cache among them.

    Returns:
        The backbone's usual output; its rows still hold the prompt.
    """
    upper = build_upper(backbone, family, k, training, updates)
    if training and torch.is_grad_enabled() and not rows.requires_grad and _checkpoints(upper):
        # Reentrant checkpointing gives weights a gradient only where an input has one.
        rows = rows.detach().requires_grad_()
    if family.takes_positions:
        kwargs["position_ids"] = position_ids
    cache = given_cache(kwargs)
    if cache is not None:
        set_cache(backbone, kwargs, CacheView(cache, k, None))
    return upper(inputs_embeds=rows, attention_mask=attention_mask, **kwargs)
