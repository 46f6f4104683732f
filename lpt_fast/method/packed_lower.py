"""The layers below the insertion for texts that run packed above it: without padding too, on a CPU
where there is some.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backbone.lower import run_lower
from ..backbone.watch import spine
from ..packed.stack import run_layers, why_not_its_own, why_padded
from .packed_rows import Rows

LITTLE = 1 / 32  # of all places: with less padding nothing is won below the insertion


@torch.no_grad()
def lower_states(
    late, k: int, inputs: dict, tokens: Tensor | None, positions: Tensor | None
) -> Tensor:
    """Output of layer k, [B, S, D], of texts that run packed above it. On a CPU plain layers below
    it run packed too where that saves something, and what stands at padding is zero then.

    Args:
        late: the LatePrompt.
        k: number of layers to run.
        inputs: keyword arguments of the backbone's forward.
        tokens, positions: of the texts, as `tokens_of` gives them.
    """
    backbone, family = late.backbone, late.family
    if not _packs_below(late, tokens):
        return run_lower(backbone, family, k, inputs).last_hidden_state
    embedded = run_lower(backbone, family, 0, inputs).last_hidden_state
    rows = Rows.of_text(embedded, tokens, positions, 0)
    out = run_layers(
        backbone,
        family,
        range(k),
        rows.buffer,
        rows.plan,
        positions=rows.rotary_positions() if family.takes_positions else None,
        readout=False,
        place=None,
        first=False,
    )
    return rows.padded(out)


def _packs_below(late, tokens: Tensor | None) -> bool:
    """Whether all layers are plain, what they hang in too, and there is padding."""
    # (On a GPU it was not tried.)
    if tokens is None or tokens.device.type != "cpu":
        return False
    if int(tokens.sum()) > (1 - LITTLE) * tokens.numel():
        return False
    backbone, family = late.backbone, late.family
    holders = spine(backbone, family)[1:]  # whose forward would run on embeddings
    return all(why_not_its_own(holder) is None for holder in holders) and (
        why_padded(backbone, family, 0, tokens.shape[1], False, late.plain) is None
    )
