"""The packed layers for texts of several adapters at once: one pass over the frozen weights. Texts
whose prompts come in above a higher layer join the others there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbone.families import Family, get_layers
from ..backbone.low_rank import LowRank
from .compute import with_filler
from .held import HeldRows
from .low_rank import Among
from .plan import Plan
from .stack import final_norms, run_layers


@dataclass(frozen=True)
class Share:
    """Texts of one adapter in a stage, which stand together.

    Attributes:
        texts: how many.
        rows: theirs with their prompts.
        updates: the adapter's late LoRA, as of `run_packed`.
    """

    texts: int
    rows: int
    updates: dict[int, dict[str, LowRank]]


@dataclass(frozen=True)
class Stage:
    """Texts whose prompts come in above one layer.

    Attributes:
        k: that layer.
        rows: [N, D], the output of layer k with the prompts filled in.
        lengths: int64 [n], tokens of each text.
        longest: of them.
        m: prompt rows of each text, n of them.
        positions: int64 [N] for rotary models, else None.
        shares: one for each adapter, in the order of the rows.
        held: what layer k+1 makes of the text rows, where it is known; of the first stage alone.
    """

    k: int
    rows: Tensor
    lengths: Tensor
    longest: int
    m: list[int]
    positions: Tensor | None
    shares: list[Share]
    held: HeldRows | None = None


def run_stages(
    backbone: nn.Module,
    family: Family,
    stages: list[Stage],
    *,
    readout: bool,
    place: Tensor | None,
    filler: bool,
) -> Tensor:
    """All layers above the lowest stage's k, and the final norm.

    Args:
        backbone, family: as for `run_lower`.
        stages: by rising k.
        readout, place: as of `run_packed`, for the texts in the order of the stages.
        filler: whether to round the number of rows up (`with_filler`).

    Returns:
        [N, D], or [B, D] for a readout, in the order of the stages.
    """
    x = positions = None
    lengths, m, updates = [], [], []
    texts = rows = 0
    ends = [*(stage.k for stage in stages[1:]), len(get_layers(backbone, family))]
    for stage, end in zip(stages, ends, strict=True):
        lengths.append(stage.lengths)
        m += stage.m
        if x is None:
            x, positions = stage.rows, stage.positions
        else:
            x = torch.cat((x, stage.rows))
            if positions is not None:
                positions = torch.cat((positions, stage.positions))
        for share in stage.shares:
            own = slice(rows, rows + share.rows), slice(texts, texts + share.texts)
            updates.append((share.updates, *own))
            rows, texts = rows + share.rows, texts + share.texts
        tokens = torch.zeros(texts + 1, dtype=torch.int32, device=x.device)
        tokens[1:] = torch.cat(lengths).cumsum(0)
        longest = max(s.longest for s in stages if s.k <= stage.k)
        plan = full = Plan(tokens, longest, m, rows)
        last, held, at, places = stage is stages[-1], stage.held, place, positions
        if filler:
            x, full, places, at, held = with_filler(x, plan, positions, place, held)
        x = run_layers(
            backbone,
            family,
            range(stage.k, end),
            x,
            full,
            positions=places,
            readout=readout and last,
            place=at,
            held=None if held is None else held.take(full),
            updates=[(u, Among(r, t, full.rows)) for u, r, t in updates if u],
            first=stage is stages[0],
        )
        x = x[: plan.texts] if readout and last else x[: plan.rows]
    return final_norms(backbone, family, x)
