"""Late LoRA of a LatePrompt: which layers it updates, its parameters, and merging it."""

from __future__ import annotations

import torch
from torch import nn

from ..backbone.low_rank import LowRankUpdates, find_targets, merged_weight
from .config import LPTConfig


def lora_targets(late, config: LPTConfig) -> list[tuple[int, str, nn.Module]]:
    """The layers that late LoRA updates, as of `find_targets`."""
    name = next(n for n, module in late.root.named_modules() if module is late.backbone)
    k, wanted = config.insertion_layer, config.lora_target_modules
    return find_targets(name, late.backbone, late.family, k, wanted)


def build_lora(late, config: LPTConfig) -> LowRankUpdates:
    """The updates of a new adapter."""
    how = (config.lora_r, config.lora_alpha, config.lora_dropout)
    return LowRankUpdates(lora_targets(late, config), *how)


def merge_lora(late, adapter_name: str, safe: bool) -> None:
    """Adds an adapter's late LoRA to the frozen weights: to all or, where one cannot take it
    (ValueError of `merged_weight`), to none.
    """
    updates = late.updates(adapter_name)
    targets = lora_targets(late, late.lpt_config[adapter_name])
    merged = [merged_weight(m, updates[layer][name], safe) for layer, name, m in targets]
    with torch.no_grad():
        for (*_, module), weight in zip(targets, merged, strict=True):
            module.weight.copy_(weight)
