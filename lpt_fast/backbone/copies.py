"""Shallow copies of modules: other objects over the same weights, so that a half can be cut out
of a backbone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

LATE_PROMPT = "late_prompt"  # name of the adapter's place in the backbone


def shallow_copy(module: nn.Module, keep_hooks: bool = True) -> nn.Module:
    """A module of the same class over the same parameters, buffers and children.

    Children can then be replaced in the copy without touching the original. A `forward` patched
    onto the instance (this project's own, or Accelerate's) is not copied: the copy runs the code of
    its class.

    Args:
        module: what to copy.
        keep_hooks: False drops forward hooks, which users put on the whole backbone and not on a
            half of it.
    """
    clone = object.__new__(module.__class__)  # (FSDP's classes make something else in __new__)
    clone.__dict__.update(module.__dict__)
    clone.__dict__.pop("forward", None)
    clone._modules = dict(module._modules)
    if not keep_hooks:
        clone._forward_hooks = OrderedDict()
        clone._forward_pre_hooks = OrderedDict()
    return clone


def cut_copy(backbone: nn.Module, layers_path: str, layers: Sequence[nn.Module]) -> nn.Module:
    """A shallow copy of `backbone` with other layers in the place of its layer list, and without
    the adapter.
    """
    clone = shallow_copy(backbone, keep_hooks=False)
    clone._modules.pop(LATE_PROMPT, None)
    holder = clone
    *parents, last = layers_path.split(".")
    for name in parents:
        child = shallow_copy(getattr(holder, name))
        setattr(holder, name, child)
        holder = child
    setattr(holder, last, nn.ModuleList(layers))
    return clone


def set_submodule(module: nn.Module, path: str, value: nn.Module | None) -> None:
    """Sets `module.a.b = value` for "a.b". The parents must be copies already."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)
