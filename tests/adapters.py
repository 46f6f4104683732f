"""Small adapters for tests, and a stand-in for training them."""

from __future__ import annotations

import torch

from lpt_fast import LPTConfig


def lpt(**more) -> LPTConfig:
    return LPTConfig(**{"bottleneck_size": 6, "num_virtual_tokens": 3, **more})


def stir(model, seed=3) -> None:
    """Stands in for training: moves everything trainable."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
