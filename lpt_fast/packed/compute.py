"""The frozen layers above the insertion in another dtype than the model's, held once.

A CPU with bf16 instructions multiplies bf16 at two to four times fp32's rate. Autocast loses most
of that: it casts the frozen weights again in every step. Here they are cast once, beside the
model, which keeps its own; activations are in that dtype, sums inside products, scores of
attention, softmax and the insides of norms in fp32. What trains (generator, late LoRA, head) stays
as it is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..backbone.copies import cut_copy, shallow_copy
from ..backbone.families import Family, frozen_above, get_layers
from ..backbone.watch import Remembered, Watch, descendants
from .held import HeldRows
from .plan import Plan
from .prepacked import prepack

ROWS = 64


def cast_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module of the same class with frozen weights of its own in `dtype`; buffers are shared."""
    clone = shallow_copy(module)
    clone._parameters = {
        name: None if p is None else nn.Parameter(_cast(p, dtype), requires_grad=False)
        for name, p in module._parameters.items()
    }
    for name, child in module._modules.items():
        clone._modules[name] = None if child is None else cast_copy(child, dtype)
    return clone


def _cast(p: Tensor, dtype: torch.dtype) -> Tensor:
    return p.detach().to(dtype) if p.is_floating_point() else p.detach()


def with_filler(
    rows: Tensor,
    plan: Plan,
    positions: Tensor | None,
    place: Tensor | None,
    held: HeldRows | None,
) -> tuple[Tensor, Plan, Tensor | None, Tensor | None, HeldRows | None]:
    """A batch with one text more, of zeros, so that it has a multiple of ROWS rows: oneDNN compiles
    a program for each product of a new number of rows, and texts differ in length. Nobody reads
    that text, so it has no gradient.

    Args:
        rows: [N, D]; plan, positions, place: of it, as for `run_packed`; held: of its texts.
    """
    own = plan.m if plan.even else 0
    count = -(-(plan.rows + own + 1) // ROWS) * ROWS
    more = count - plan.rows
    tokens = more - own
    ends = torch.cat((plan.token_ends, plan.token_ends[-1:] + tokens))
    m = own if plan.even else [*plan.m.tolist(), own]
    full = Plan(ends, max(plan.longest, tokens), m, count)
    rows = torch.cat((rows, rows.new_zeros(more, rows.shape[1])))
    if positions is not None:
        positions = torch.cat((positions, torch.arange(more)))
    if place is not None:
        place = torch.cat((place, place.new_zeros(1)))
    if held is not None:
        held = replace(held, begins=torch.cat((held.begins, held.begins.new_zeros(1))))
    return rows, full, positions, place, held


class ComputeCopy(Remembered):
    """A backbone whose layers above k, and final norms, are in `dtype`; the rest is the model's.

    Args:
        backbone, family, k: as for `run_lower`; plain frozen layers (`why_padded`).
        dtype: of the weights, and of the rows that run through them.

    Attributes:
        backbone: for `run_packed` and `project_first`.
    """

    def __init__(self, backbone: nn.Module, family: Family, k: int, dtype: torch.dtype):
        self.dtype, self._k, self._of = dtype, k, backbone
        parts = frozen_above(backbone, family, k)
        weights = [p for part in parts for p in part.parameters()]
        self._watch = Watch(descendants(parts), ("_modules", "_parameters"), tensors=weights)
        layers = list(get_layers(backbone, family))
        copies = [cast_copy(layer, dtype) for layer in layers[k:]]
        if weights and weights[0].device.type == "cpu":
            prepack(copies, dtype)
        self.backbone = cut_copy(backbone, family.layers, [*layers[:k], *copies])
        for name in family.after:
            if getattr(self.backbone, name, None) is not None:
                setattr(self.backbone, name, cast_copy(getattr(self.backbone, name), dtype))

    def fits(self, backbone: nn.Module, k: int, dtype: torch.dtype) -> bool:
        """Whether this is still what a new copy would be."""
        mine = backbone is self._of and (k, dtype) == (self._k, self.dtype)
        return mine and self._watch.unchanged()
