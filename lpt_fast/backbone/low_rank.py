"""Low-rank updates of frozen linear layers (LoRA; Hu et al., ICLR 2022): what one is, which layers
above the insertion get one, and how the model's own code runs with them.

Names, formula and initialisation are PEFT's (`peft.tuners.lora`). The updates hang beside the
frozen layers, not in them: the backbone stays as it is, for other adapters and for a cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .copies import shallow_copy
from .families import Family, get_layers

ALL_LINEAR = "all-linear"


class LowRank(nn.Module):
    """x -> scaling B A dropout(x), added to what a frozen linear layer makes of x.

    A starts out as PEFT's does (Kaiming-uniform), B at zero, so that nothing is added at first.

    Args:
        in_features, out_features: of the frozen layer.
        r: the rank.
        alpha: the update is scaled by alpha / r.
        dropout: probability, on x, in training.
    """

    def __init__(
        self, in_features: int, out_features: int, r: int, alpha: float, dropout: float = 0.0
    ):
        super().__init__()
        self.lora_A = nn.Linear(in_features, r, bias=False)
        self.lora_B = nn.Linear(r, out_features, bias=False)
        self.lora_dropout = nn.Dropout(dropout)
        self.scaling = alpha / r
        if not self.lora_A.weight.is_meta:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
            nn.init.zeros_(self.lora_B.weight)

    @property
    def drops(self) -> bool:
        """Whether dropout is active."""
        return self.lora_dropout.training and self.lora_dropout.p > 0

    def delta(self) -> Tensor:
        """The update of the frozen weight, fp32 [out_features, in_features]."""
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x (masters are fp32)."""
        a, b = (m.weight.to(x.dtype) for m in (self.lora_A, self.lora_B))
        return F.linear(F.linear(self.lora_dropout(x), a), b) * self.scaling


class LowRankUpdates(nn.Module):
    """All updates of one adapter: a tree of modules with the names of the layers that they update,
    such as `4.attention.self.query.lora_A.weight` for the fifth layer.

    Args:
        targets: (number of the layer, name in it, the frozen module) of each.
        r, alpha, dropout: as of LowRank.
    """

    def __init__(
        self, targets: Iterable[tuple[int, str, nn.Module]], r: int, alpha: float, dropout: float
    ):
        super().__init__()
        self.names: list[tuple[int, str]] = []
        for layer, name, module in targets:
            holder: nn.Module = self
            *parents, last = f"{layer}.{name}".split(".")
            for parent in parents:
                if parent not in holder._modules:
                    holder.add_module(parent, nn.Module())
                holder = holder.get_submodule(parent)
            holder.add_module(last, LowRank(*_shape(module), r, alpha, dropout))
            self.names.append((layer, name))

    def by_layer(self) -> dict[int, dict[str, LowRank]]:
        """Number of the layer -> name in it -> update."""
        out: dict[int, dict[str, LowRank]] = {}
        for layer, name in self.names:
            out.setdefault(layer, {})[name] = self.get_submodule(f"{layer}.{name}")
        return out


class Adapted(nn.Module):
    """A frozen linear layer with an update, in a copy of its layer (`with_updates`)."""

    def __init__(self, base: nn.Module, update: LowRank):
        super().__init__()
        self.base, self.update = base, update

    # (Layers look at these: T5 for the dtype.)
    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """As of the frozen layer."""
        out = self.base(x)
        return out + self.update(x).to(out.dtype)


def with_updates(layer: nn.Module, updates: dict[str, LowRank]) -> nn.Module:
    """A copy of a layer over the same weights that runs with updates.

    Args:
        updates: by the name of the linear module in the layer.
    """
    clone = shallow_copy(layer)
    copied = {"": clone}
    for name, update in updates.items():
        path = ""
        *parents, last = name.split(".")
        for parent in parents:
            holder, path = copied[path], f"{path}.{parent}".lstrip(".")
            if path not in copied:
                copied[path] = shallow_copy(holder._modules[parent])
                holder._modules[parent] = copied[path]
        holder = copied[path]
        holder._modules[last] = Adapted(holder._modules[last], update)
    return clone


def _shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features


def _linears(backbone: nn.Module, family: Family) -> Iterator[tuple[int, str, nn.Module]]:
    for i, layer in enumerate(get_layers(backbone, family)):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                yield i, name, module


def find_targets(
    name: str, backbone: nn.Module, family: Family, k: int, wanted: str | Iterable[str]
) -> list[tuple[int, str, nn.Module]]:
    """The linear layers above the insertion that `lora_target_modules` means.

    Args:
        name: dotted name of the backbone in the model, "" for the model itself.
        backbone, family: as for `run_lower`.
        k: the insertion layer.
        wanted: names as PEFT takes them: endings of dotted names, or one regular expression for
            whole names, or "all-linear".

    Returns:
        (number of the layer from 0, name in it, module) of each, all above the insertion.

    Raises:
        ValueError: for a name that matches nothing, or only what lies at or below the insertion.
    """
    prefix = ".".join(part for part in (name, family.layers) if part)
    every = [(i, n, m, f"{prefix}.{i}.{n}") for i, n, m in _linears(backbone, family)]
    if wanted == ALL_LINEAR:
        found = [(i, n, m) for i, n, m, _ in every if i >= k]
        if not found:
            raise ValueError(
                f"`lora_target_modules` is {ALL_LINEAR!r} and {type(backbone).__name__} has no "
                f"nn.Linear above insertion_layer={k}, expected some; quantised in another way, or "
                "not at all, it has."
            )
        return found
    if isinstance(wanted, str):
        tests = {wanted: lambda full: re.fullmatch(wanted, full) is not None}
    else:
        # (The dot: a name is not the ending of another name.)
        tests = {w: lambda full, w=w: f".{full}".endswith(f".{w}") for w in wanted}
    chosen: dict[int, None] = {}
    for entry, matches in tests.items():
        found = [j for j, (*_, full) in enumerate(every) if matches(full)]
        above = [j for j in found if every[j][0] >= k]
        if found and not above:
            raise ValueError(
                f"`lora_target_modules` names {entry!r}, which lies at or below "
                f"insertion_layer={k} ({every[found[0]][3]}): those layers never change, so that a "
                "cache keeps what they give. Name modules above it, or lower insertion_layer."
            )
        if not above:
            names = dict.fromkeys(n.rpartition(".")[2] for _, n, _, _ in every)
            raise ValueError(
                f"`lora_target_modules` got {entry!r}, expected linear layers above "
                f"insertion_layer={k}, as PEFT names them: {_some(names)}, or {ALL_LINEAR!r}."
            )
        chosen.update(dict.fromkeys(above))
    return [every[j][:3] for j in sorted(chosen)]


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


@torch.no_grad()
def merged_weight(module: nn.Module, update: LowRank, safe: bool) -> Tensor:
    """The frozen weight with its update added, fp32.

    Args:
        module: the linear layer.
        update: of it.
        safe: whether to look for numbers that are not finite.

    Raises:
        ValueError: they are not finite, or the weight is no plain float tensor.
    """
    weight = module.weight
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        raise ValueError(
            f"merge got a {type(weight).__name__} in {type(module).__name__}, expected a plain "
            "float weight: an update cannot be added to quantised numbers. Keep the adapter."
        )
    delta = update.delta()
    merged = weight.float() + (delta.t() if isinstance(module, Conv1D) else delta)
    if safe and not merged.isfinite().all():
        raise ValueError(
            "merge got an update with NaN or infinite numbers, expected finite ones: the training "
            "has diverged. Train again with a lower learning rate."
        )
    return merged
