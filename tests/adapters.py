"""Small adapters for tests, and a stand-in for training them."""

from __future__ import annotations

import peft
import pytest
import torch
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

from lpt_fast import LPTConfig

# Transformers 5.24 asks for a PEFT that is not published, whatever the method.
needs_own_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers adapts models with peft >= {MIN_PEFT_VERSION} alone",
)


def lpt(**more) -> LPTConfig:
    return LPTConfig(**{"generator": "npg", "bottleneck_size": 6, "num_virtual_tokens": 3, **more})


def stir(model, seed=3) -> None:
    """Stands in for training: moves everything trainable."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
